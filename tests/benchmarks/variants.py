"""MiniLM under qpass and its peers: each variant makes a function from a batch to the last hidden state, float32.

A peer that is not installed, or fails on this model, is skipped with the reason; nothing is installed from here.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qpass

Run = Callable[[dict[str, Tensor]], Tensor]
INPUTS = ("input_ids", "token_type_ids", "attention_mask")


class Positional(nn.Module):
    """The model with positional inputs and one output, as exporters want it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids, token_type_ids, attention_mask):
        inputs = dict(zip(INPUTS, (input_ids, token_type_ids, attention_mask), strict=True))
        return self.model(**inputs).last_hidden_state


def called(model: Callable[..., Any]) -> Run:
    def run(batch):
        with torch.no_grad():
            return model(**batch).last_hidden_state.float()

    return run


def compiled(model: nn.Module) -> Run:
    """Through torch.compile, one program a shape; as a code object of its own, for captures are counted and looked up by
    it: variants that share one run into the limit, and the next is silently eager.
    """

    def call(**batch):
        return model(**batch)

    code = call.__code__.replace(co_name="forward")
    own = types.FunctionType(code, call.__globals__, "forward", None, call.__closure__)
    return called(torch.compile(own, dynamic=False))


def eager(bench) -> Run:
    return called(bench.model)


def eager_bfloat16(bench) -> Run:
    return called(copy.deepcopy(bench.model).to(torch.bfloat16))


def inductor(bench) -> Run:
    return compiled(copy.deepcopy(bench.model))


def inductor_bfloat16(bench) -> Run:
    return compiled(copy.deepcopy(bench.model).to(torch.bfloat16))


def torch_dynamic(bench) -> Run:
    from torch.ao.quantization import quantize_dynamic

    torch.backends.quantized.engine = "onednn"
    return called(quantize_dynamic(copy.deepcopy(bench.model), {nn.Linear}))


def torchao_dynamic(bench) -> Run:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = copy.deepcopy(bench.model)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    run = compiled(model)
    with torch._inductor.config.patch(freezing=True):  # read while a shape is compiled, so each is met here
        for batch in bench.batches():
            run(batch)
    return run


def onnxruntime_dynamic(bench) -> Run:
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    folder = Path(tempfile.mkdtemp())
    sizes = {0: torch.export.Dim("batch", min=1, max=4096), 1: torch.export.Dim("length", min=2, max=512)}
    torch.onnx.export(
        Positional(bench.model), bench.sample(), folder / "fp32.onnx", input_names=list(INPUTS), dynamo=True,
        dynamic_shapes=(sizes,) * len(INPUTS), opset_version=18, external_data=False, verbose=False,
    )  # fmt: skip
    quantize_dynamic(folder / "fp32.onnx", folder / "int8.onnx", weight_type=QuantType.QInt8, per_channel=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / "int8.onnx", options, providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(session.run(None, {k: batch[k].numpy() for k in INPUTS})[0])


def openvino_int8(precision: str) -> Callable[[Any], Run]:
    def make(bench) -> Run:
        import nncf
        import openvino

        model = openvino.convert_model(Positional(bench.model), example_input=bench.sample())
        rows = [{k: v[i : i + 1] for k, v in batch.items()} for batch in bench.calibration for i in range(8)]
        data = nncf.Dataset(rows, lambda row: [row[k].numpy() for k in INPUTS])
        int8 = nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(rows))
        options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": precision}
        ready = openvino.Core().compile_model(int8, "CPU", options)
        return lambda batch: torch.from_numpy(ready([batch[k].numpy() for k in INPUTS])[0].copy())

    return make


def ours(scheme: str | None, with_data: bool = True) -> Callable[[Any], Run]:
    def make(bench) -> Run:
        data = bench.calibration if with_data else None
        return called(qpass.compile(bench.model, scheme, example_inputs=bench.calibration[0], calibration=data))

    return make


# name, a peer (so that the best of them is known), packages it needs, how it is made
VARIANTS = (
    ("fp32 eager", False, (), eager),
    ("bf16 eager", False, (), eager_bfloat16),
    ("fp32 inductor", False, (), inductor),
    ("bf16 inductor", True, (), inductor_bfloat16),
    ("torch quantize_dynamic", True, ("torch.ao",), torch_dynamic),
    ("torchao int8 dynamic", True, ("torchao",), torchao_dynamic),
    ("onnxruntime int8 dynamic", True, ("onnxruntime", "onnx", "onnxscript"), onnxruntime_dynamic),
    ("openvino int8, f32", True, ("openvino", "nncf"), openvino_int8("f32")),
    ("openvino int8, bf16", True, ("openvino", "nncf"), openvino_int8("bf16")),
    ("qpass w8a8", False, (), ours("w8a8")),
    ("qpass w8a8-dynamic", False, (), ours("w8a8-dynamic")),
    ("qpass w8a8-dynamic, no data", False, (), ours("w8a8-dynamic", with_data=False)),
    ("qpass w8a16, no data", False, (), ours("w8a16", with_data=False)),
    ("qpass w8a16", False, (), ours("w8a16")),
    ("qpass w4a16-g64", False, (), ours("w4a16-g64")),
    ("qpass w4a16-g64, no data", False, (), ours("w4a16-g64", with_data=False)),
    ("qpass, no scheme", False, (), ours(None)),
)
PEERS = tuple(name for name, peer, _, _ in VARIANTS if peer)


def made(bench, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Run]]:
    """Each variant that can be made here; the others are named with the reason."""
    for name, _, needs, make in VARIANTS:
        if not wanted(name):
            continue
        absent = [package for package in needs if importlib.util.find_spec(package) is None]
        if absent:
            print(f"{name}: skipped, {', '.join(absent)} is not installed", flush=True)
            continue
        try:
            run = make(bench)
            run(bench.calibration[0])
        except Exception as error:
            if name.startswith("qpass"):
                raise
            print(f"{name}: skipped, it fails on this model: {type(error).__name__}: {error}"[:300], flush=True)
            continue
        yield name, run
