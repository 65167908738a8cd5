"""ResNet-50 and MobileNetV2 under qpass and its peers, in one run: times in turn, SQNR of the logits against fp32.

python tests/benchmarks/images.py [--net NAME ...] [--only GLOB ...] [--threads N] [--rounds N] [--write]

The networks are transformers' architectures with random weights, whose batch norms have seen data. Every round runs each
variant at each batch (three calls, of which the last counts), every other round in reverse; figures are medians. Read the
ratios of one run, not milliseconds of two. --write keeps the tables.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import qpass
from qpass.timing import interleaved

sys.path.insert(0, str(Path(__file__).parent))
from minilm import ROOT, markdown, ratios, where

BATCHES = (1, 8)
BURST = 3
Run = Callable[[Tensor], Tensor]


def images(count: int, seed: int) -> Tensor:
    """[count, 3, 224, 224]: low frequencies and a little noise of pixels, zero mean."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 14, 14, generator=generator)
    smooth = functional.interpolate(coarse, size=224, mode="bicubic")
    return smooth + 0.1 * torch.randn(count, 3, 224, 224, generator=generator)


class Logits(nn.Module):
    """A classifier of transformers as a function of pixels to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).logits


def resnet50() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(num_labels=1000))


def mobilenet_v2() -> nn.Module:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    return MobileNetV2ForImageClassification(MobileNetV2Config(num_labels=1000))


NETS = {"resnet50": resnet50, "mobilenet-v2": mobilenet_v2}


def network(name: str) -> Logits:
    """The network, seeded, with statistics of data in its batch norms."""
    torch.manual_seed(0)
    model = NETS[name]().train()
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.uniform_(-0.5, 0.5)
                norm.momentum = 0.3
        for step in range(12):
            model(pixel_values=images(8, 1000 + step))
    return Logits(model).eval()


def torch_bf16(net: Logits, data: list[Tensor]) -> Iterator[tuple[str, Run]]:
    import copy

    narrow = copy.deepcopy(net).to(torch.bfloat16).to(memory_format=torch.channels_last)
    yield "torch bf16, channels last", lambda x: narrow(x.to(torch.bfloat16)).float()


def onnxruntime_int8(net: Logits, data: list[Tensor]) -> Iterator[tuple[str, Run]]:
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter({"x": x.numpy()} for x in data)

        def get_next(self):
            return next(self.left, None)

    with tempfile.TemporaryDirectory() as folder:
        plain, int8 = (f"{folder}/{name}.onnx" for name in ("fp32", "int8"))
        size = {0: torch.export.Dim("b", min=1, max=64)}
        torch.onnx.export(
            net, (images(2, 0),), plain, input_names=["x"], dynamo=True, dynamic_shapes=(size,), opset_version=18,
            external_data=False,
        )  # fmt: skip
        quantize_static(plain, int8, Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(int8, options, providers=["CPUExecutionProvider"])
    yield "onnxruntime int8", lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def openvino_int8(net: Logits, data: list[Tensor]) -> Iterator[tuple[str, Run]]:
    import nncf
    import openvino

    graph = openvino.convert_model(net, example_input=images(2, 0))
    int8 = nncf.quantize(graph, nncf.Dataset(data, lambda x: x.numpy()), subset_size=len(data))
    for label, which, hint in (("openvino bf16", graph, "bf16"), ("openvino int8", int8, "f32")):
        options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": hint}
        compiled = openvino.Core().compile_model(which, "CPU", options)
        yield label, lambda x, c=compiled: torch.from_numpy(c(x.numpy())[0].copy())


def ours(net: Logits, data: list[Tensor]) -> Iterator[tuple[str, Run]]:
    for scheme in ("w8a8", "w8a8-dynamic"):
        calibration = data if scheme == "w8a8" else None
        yield f"qpass {scheme}", qpass.compile(net, scheme, example_inputs=data[0], calibration=calibration)


VARIANTS = (
    (("torch fp32",), lambda net, data: iter([("torch fp32", net)])),
    (("torch bf16, channels last",), torch_bf16),
    (("onnxruntime int8",), onnxruntime_int8),
    (("openvino bf16", "openvino int8"), openvino_int8),
    (("qpass w8a8", "qpass w8a8-dynamic"), ours),
)
INT8_PEERS = ("onnxruntime int8", "openvino int8")


def sqnr(found: Tensor, wanted: Tensor) -> float:
    """Signal to noise, dB."""
    signal, noise = (t.double().square().sum() for t in (wanted, found - wanted))
    return float(10 * torch.log10(signal / noise.clamp(min=1e-30)))


def table(name: str, globs: list[str], rounds: int) -> str:
    """Runs what is installed on one network."""
    net = network(name)
    data, scored = [images(8, seed) for seed in range(100, 108)], [images(8, seed) for seed in range(4)]
    wanted = torch.cat([net(x) for x in scored])
    runs: dict[str, Run] = {}
    for labels, make in VARIANTS:
        if not any(fnmatch.filter(labels, glob) for glob in globs):
            continue
        try:
            runs |= {label: run for label, run in make(net, data) if any(fnmatch.fnmatchcase(label, g) for g in globs)}
        except ImportError as error:
            print(f"{', '.join(labels)}: left out, {error}", flush=True)
    timed = {batch: images(batch, 1) for batch in BATCHES}
    calls = {(label, b): lambda r=run, x=x: r(x) for label, run in runs.items() for b, x in timed.items()}
    times = interleaved(calls, rounds=rounds, burst=BURST)
    rows = [(name, *(f"batch {b}, ms" for b in BATCHES), "SQNR, dB")]
    for label, run in runs.items():
        error = sqnr(torch.cat([run(x) for x in scored]), wanted)
        rows.append((label, *(f"{times[label, b]:.1f}" for b in BATCHES), f"{error:.1f}" if error < 100 else ""))
    rows += [(*row, "") for row in ratios(times, list(runs), INT8_PEERS)]
    return markdown(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", action="append", choices=list(NETS))
    parser.add_argument("--only", action="append", metavar="GLOB", help="variants by name; may be repeated")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", action="store_true", help="keep the results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(where(), flush=True)
    tables = []
    with torch.no_grad():
        for name in options.net or NETS:
            tables.append(table(name, options.only or ["*"], options.rounds))
            print(f"\n{tables[-1]}", flush=True)
    if options.write:
        today = datetime.date.today().isoformat()
        target = ROOT / f"tests/benchmarks/results/images-{today}.md"
        target.write_text("\n\n".join([f"# Images, {today}", f"{where()}; {options.threads} threads", *tables]) + "\n")
        print(f"\nwrote {target.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
