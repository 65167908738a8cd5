"""`qpass.save_pretrained`: a directory in the format of compressed-tensors, which transformers and servers load themselves.

    pack-quantized    weight_packed       int32 [N, K * bits / 32], codes densely, the first in the lowest bits
                      weight_shape        int64 [2]: N, K
                      weight_scale        [N, K / G] or [N, 1], in the dtype of the weight
                      weight_zero_point   int32 [N * bits / 32, K / G] of unsigned codes, packed along N
    int-quantized     weight              int8 [N, K]
                      weight_scale        [N, 1]
                      input_scale, input_zero_point   [1] and int8 [1], of a static input
    config.json       "quantization_config": types and the modules they are for

(Layout as compressed-tensors 0.20.0 reads it.) Unsigned codes are moved to signed ones with their zero point, so the numbers
stay the same. Weights alone, or of fewer than 8 bits, are pack-quantized; 8-bit weights with integer inputs int-quantized.

1. The model has a transformers configuration; each quantized weight belongs to one nn.Linear.
2. What the format has no place for is refused, with the site: factors, shifts and copies of input channels, and a corrected
   bias where the module has none.
3. Packed zero points are for weights of one type with float inputs: transformers 5.24 has no room for them in a model that
   stays packed ([N, K / G] where the file has [N * bits / 32, K / G]), so config.json asks it to dequantize as it loads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qpass.errors import QpassError
from qpass.install import packed_weights
from qpass.interchange.program import compiled_by_qpass
from qpass.packing import Packed
from qpass.plan import Decision, Plan
from qpass.qtype import QType
from qpass.shards import config_texts, write_model
from qpass.slices import slice_of

FACTORS = "the format has no place for {}; compile with the options smooth=none,bias=none"
CLIPPED = (
    "the format has no place for a clip of {} of each row's range; train with method=ste, or let no `log_clip` learn "
    "(requires_grad_(False))"
)
WORD = 32


def save_pretrained(model: nn.Module, directory: str | os.PathLike[str], shard_size: int | None = None) -> None:
    """Writes a compiled transformers model so that `AutoModelForCausalLM.from_pretrained(directory)` loads it.

    The reader needs the package compressed-tensors. shard_size: bytes a file holds at most (5 GB unless given). Written
    whole or not at all; other files in the directory stay. Raises QpassError for a model that qpass did not compile or that
    has no configuration, and for a site that the format cannot express.
    """
    plan = compiled_by_qpass(model).plan
    if not hasattr(getattr(model, "config", None), "to_json_string"):
        raise QpassError(
            f"this {type(model).__name__} has no transformers configuration, which says how to build it; use qpass.save."
        )
    if not plan.quantized:
        raise QpassError(f"no weight of this {type(model).__name__} is quantized; use its own save_pretrained.")
    modules = dict(_linears(model, plan))
    tensors = dict(_tensors(model, modules))
    config = quantization_config(model, modules)
    texts = config_texts(model, quantization_config=config)
    write_model(directory, tensors, {}, texts, shard_size)


def _linears(model: nn.Module, plan: Plan) -> Iterator[tuple[str, Decision]]:
    """Path of each quantized nn.Linear, and its decision; a site that the format cannot express is refused."""
    places: dict[int, list[str]] = {}
    for path in (name for name in packed_weights(model) if slice_of(name)[1] is None):
        data = model.get_submodule(path.rpartition(".")[0]).parametrizations[path.rpartition(".")[2]].original0
        places.setdefault(id(data), []).append(path)
    shared = {path: paths for paths in places.values() for path in paths}
    seen: dict[str, Decision] = {}
    for decision in plan.quantized:
        path = decision.weight.rpartition(".")[0]
        module = model.get_submodule(path)
        why = _why_not(decision, module, shared.get(decision.weight, []), seen.get(path))
        if why is not None:
            raise QpassError(f"{decision.site}: {why}; or leave the site in float with a recipe, or use qpass.save.")
        if path not in seen:
            yield path, decision
        seen[path] = decision


def _why_not(d: Decision, module: nn.Module, holders: list[str], before: Decision | None) -> str | None:
    """None where the format can say what a decision says, or what it cannot."""
    if not isinstance(module, nn.Linear) or d.transposed or d.packed is None:
        return f"its weight belongs to a {_kind(module)}, and the format is for nn.Linear"
    if len(holders) > 1:
        return f"its weight is shared by {' and '.join(holders)}"
    assert d.weight_type is not None
    if d.weight_type.widths:
        return f"the format has one width for a weight, and this one is {d.weight_type}: compile it with one, such as w4a16"
    if d.weight_type.is_float or (d.input_type is not None and d.input_type.is_float):
        return f"8-bit floats ({d.weight_type}) are not written in this format yet"
    if d.weight_type.granularity not in ("channel", "group"):
        return f"its weight is {d.weight_type}, and expected is a scale for each output or group"
    if d.input_type is not None and d.input_type.clip != 1:
        return CLIPPED.format(f"{d.input_type.clip:.3g}")
    if d.packed.in_mul is not None and not bool((d.packed.in_mul == 1).all()):
        return FACTORS.format("the factors of its input channels (smooth)")
    if d.input_shift is not None and bool(d.input_shift.any()):
        return FACTORS.format("the shifts of its input channels (smooth)")
    if d.input_extra is not None and bool(d.input_extra.any()):
        return FACTORS.format("the copies of its input channels (smooth)")
    if d.bias is not None and bool(d.bias.any()) and module.bias is None:
        return FACTORS.format("its corrected bias, as its module has none (bias)")
    return _second(d, before)


def _second(d: Decision, before: Decision | None) -> str | None:
    """Why a second site of one module cannot be said: its input has other scales, or its bias another correction."""
    pairs = () if before is None else ((d.input_scale, before.input_scale), (d.bias, before.bias))
    if any((a is None) != (b is None) or (a is not None and not torch.equal(a, b)) for a, b in pairs):
        return "its module is called twice, with inputs of other scales"
    return None


def _kind(module: nn.Module) -> str:
    return type(module).__name__.removeprefix("Parametrized")


def _tensors(model: nn.Module, modules: dict[str, Decision]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file by name: what state_dict holds, each once, the packed ones in the format's form."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        path, _, attribute = name.rpartition(".")
        decision = modules.get(path)
        if ".parametrizations." in f".{name}" or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if (
            attribute == "bias"
            and decision is not None
            and decision.bias is not None
            and decision.input_type is not None
        ):
            tensor = (tensor.float() + decision.bias.to(tensor.device)).to(tensor.dtype)
        yield name, tensor
    for path, decision in modules.items():
        dtype = next(iter(packed_weights(model.get_submodule(path)).values())).dtype
        yield from ((f"{path}.{key}", value) for key, value in weight_tensors(decision, dtype).items())


def weight_tensors(d: Decision, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one linear but for its bias. dtype: of its scales."""
    packed, qtype = d.packed, d.weight_type
    assert packed is not None
    assert qtype is not None
    rows, columns = packed.shape
    found = {"weight_scale": packed.scale.reshape(rows, -1).to(dtype)}
    zero = None if packed.zero is None else _signed(packed.zero.reshape(rows, -1), qtype)
    if format_of(d) == "pack-quantized":
        found["weight_packed"] = pack(_codes(packed), qtype.bits)
        found["weight_shape"] = torch.tensor([rows, columns])
        if zero is not None:
            found["weight_zero_point"] = pack(zero.t(), qtype.bits).t().contiguous()
    else:
        found["weight"] = _codes(packed)
        if zero is not None:
            found["weight_zero_point"] = zero
    if d.input_scale is not None:
        found["input_scale"] = d.input_scale.reshape(1).to(dtype)
        if d.input_zero is not None:
            found["input_zero_point"] = _signed(d.input_zero.reshape(1), d.input_type)
    return found


def _codes(packed: Packed) -> Tensor:
    return packed.data if packed.type.signed else _signed(packed.data, packed.type)


def _signed(codes: Tensor, qtype: QType | None) -> Tensor:
    """Unsigned codes less their middle, int8."""
    assert qtype is not None
    return (codes.int() - (0 if qtype.signed else 2 ** (qtype.bits - 1))).to(torch.int8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Signed codes [N, K] of `bits` bits -> int32 [N, ceil(K * bits / 32)], the first code in the lowest bits.

    >>> pack(torch.tensor([[-8, -7, 7]], dtype=torch.int8), 4)  # 0, 1, 15
    tensor([[3856]], dtype=torch.int32)
    """
    import numpy

    raised = (codes.cpu().int() + 2 ** (bits - 1)).to(torch.uint8).numpy()
    one_by_one = numpy.unpackbits(raised[..., None], axis=-1, bitorder="little")[..., :bits].reshape(len(raised), -1)
    padded = numpy.pad(one_by_one, ((0, 0), (0, -one_by_one.shape[1] % WORD)))
    return torch.from_numpy(numpy.packbits(padded, axis=-1, bitorder="little").view("<i4").astype("int32"))


def format_of(d: Decision) -> str:
    """The name of the layout that a linear's tensors have."""
    assert d.weight_type is not None
    return "int-quantized" if d.weight_type.bits == 8 and d.input_type is not None else "pack-quantized"


def quantization_config(model: nn.Module, modules: dict[str, Decision]) -> dict[str, Any]:
    """What config.json says of the quantization: one group of modules for each pair of types."""
    kinds: dict[tuple[str, str, bool], list[str]] = {}
    for path, d in modules.items():
        kinds.setdefault((str(d.weight_type), str(d.input_type or ""), d.input_scale is not None), []).append(path)
    groups = {}
    for i, paths in enumerate(kinds.values()):
        d = modules[paths[0]]
        targets = ["Linear"] if len(kinds) == 1 else paths
        groups[f"group_{i}"] = {
            "targets": targets,
            "weights": arguments(d.weight_type, dynamic=False),
            "input_activations": None if d.input_type is None else arguments(d.input_type, d.input_scale is None),
            "output_activations": None,
            "format": format_of(d),
        }
    formats = {group["format"] for group in groups.values()}
    zero = next((d for d in modules.values() if d.packed is not None and d.packed.zero is not None), None)
    if zero is not None and (len(kinds) > 1 or zero.input_type is not None):
        found = " and ".join(f"{weight} with {act or 'float'} inputs" for weight, act, _ in kinds)
        raise QpassError(
            f"{zero.site}: transformers reads weights with zero points ({zero.weight_type}) only where all are of one type "
            f"and inputs stay float, and this model has {found}; give them one scheme, or use qpass.save."
        )
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": [path for path in linears if path not in modules],
        **({} if zero is None else {"dequantize": True}),
    }


def arguments(qtype: QType | None, dynamic: bool) -> dict[str, Any]:
    """A type in the format's words."""
    assert qtype is not None
    return {
        "num_bits": qtype.bits,
        "type": "int",
        "symmetric": qtype.symmetric,
        "strategy": qtype.granularity,
        "group_size": qtype.group,
        "dynamic": dynamic,
    }
