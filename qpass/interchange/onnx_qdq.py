"""A compiled model as an ONNX file with QuantizeLinear and DequantizeLinear, opset 18, for any runtime that reads QDQ.

    qpass.quantize(x, s, z, "u8/t")        ->   QuantizeLinear(x, s, z)              z uint8, both initializers
    qpass.dequantize(q, s, z, "u8/t")      ->   DequantizeLinear(q, s, z)
    linear(x, dequantize(w, s), b)         ->   Sub(MatMul(x, DequantizeLinear(w', s, axis=1)), -b)     w' = w turned, [K, N]
    convolution(x, dequantize(w, s), b)    ->   Conv(x, DequantizeLinear(w, s, axis=0), DequantizeLinear(int32 b))

Everything else is translated by torch.onnx. A runtime finds the integer products by these patterns (onnxruntime makes
MatMulIntegerToFloat and QLinearConv of them).

1. Inputs have a static scale for the whole tensor in 8 bits; weights are integers with a scale for each output (or one for
   all): QDQ has no scale that is found at run time for each row, and groups are not in opset 18.
2. Attention and residuals stay in the model's dtype: onnxruntime has no bfloat16 products on CPU.
3. The bias of a linear is subtracted negated, which is the same: onnxruntime would make a float Gemm of an Add.
4. A convolution's bias is rounded to int32 at the step of its accumulator, where it fits; onnxruntime asks for it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from qpass.calibrate import Batch
from qpass.convolutions import is_convolution
from qpass.errors import QpassError
from qpass.files import replacing
from qpass.graphs import add_call, add_constant, constant
from qpass.interchange.program import QDQ, qdq_program
from qpass.plan import Plan
from qpass.qtype import QType
from qpass.sites import module_path

aten = torch.ops.aten
Q = torch.ops.qpass
OPSET = 18
PASSES = tuple(each for each in QDQ if each.name != "hoist")  # its ops on integers have no translation, nor need one
NEEDS = ("onnx", "onnxscript")
CHATTER = ("torch.onnx._internal.exporter._registration", "onnxscript.optimizer._constant_folding")
INT32 = LARGEST = 2**31 - 1
ADVICE = "compile with scheme='w8a8' and calibration, or leave the site in float with a recipe"


def without_bfloat16(plan: Plan) -> Plan:
    """The plan with attention and residuals in the model's own dtype."""
    kept = {name: d for name, d in plan.decisions.items() if d.operation != "operand"}
    return dataclasses.replace(plan, decisions=kept, attention=None)


def to_onnx_form(graph: fx.GraphModule) -> None:
    """Checks the types of a graph at level qdq, and brings its products into the form above, in place."""
    for node in list(graph.graph.nodes):
        if (why := _why_not(node)) is not None:
            raise QpassError(f"{_place(node)}: {why}; {ADVICE}.")
        if node.target in (Q.quantize.default, Q.dequantize.default):
            _type_zero(graph, node)
    for node in list(graph.graph.nodes):
        if node.target is aten.linear.default:
            _turn(graph, node)
        elif is_convolution(node) and not node.args[6]:
            _quantize_bias(graph, node)
    graph.graph.eliminate_dead_code()


def _why_not(node: fx.Node) -> str | None:
    if node.target is Q.choose_qparams.default:
        return f"its input gets its scale at run time ({node.args[1]}), for which ONNX has no QDQ node"
    if node.target not in (Q.quantize.default, Q.dequantize.default):
        return None
    qtype = QType.parse(node.args[3])
    if qtype.is_float or qtype.granularity not in ("tensor", "channel"):
        return f"type {qtype} has no QuantizeLinear in opset {OPSET}"
    if node.target is Q.quantize.default and str(qtype) != "u8/t":
        return f"its input is {qtype}, and QuantizeLinear fills 8 bits of one scale (u8/t)"
    return None


def _place(node: fx.Node) -> str:
    """The site of a node, or of the first one behind it that has one; else its module."""
    ahead = [node]
    for each in ahead:
        if "site" in each.meta and each.target is not Q.quantize.default:
            return each.meta["site"]
        if len(ahead) < 32:
            ahead += [user for user in each.users if user not in ahead]
    return node.meta.get("site") or module_path(node) or node.name


def _type_zero(graph: fx.GraphModule, node: fx.Node) -> None:
    """A zero point in the dtype of the codes, as ONNX has it."""
    zero = constant(node.args[2])
    if zero is not None:
        typed = zero.detach().to(QType.parse(node.args[3]).storage)
        node.update_arg(2, add_constant(graph, f"{node.name}_zero", typed, node))


def _turn(graph: fx.GraphModule, node: fx.Node) -> None:
    """linear(x, dequantize(w), b)  ->  matmul(x, dequantize(turned w)) - (-b)."""
    x, weight, bias = node.args
    if getattr(weight, "target", None) is not Q.dequantize.default or (data := constant(weight.args[0])) is None:
        return
    qtype = QType.parse(weight.args[3])
    turned = str(dataclasses.replace(qtype, axis=1) if qtype.axis == 0 else qtype)
    held = add_constant(graph, f"{node.name}_weight", data.detach().t().contiguous(), node)
    real = add_call(graph, Q.dequantize.default, (held, *weight.args[1:3], turned, weight.args[4]), node)
    y = add_call(graph, aten.matmul.default, (x, real), node)
    if (held := constant(bias)) is not None:
        y = add_call(
            graph, aten.sub.Tensor, (y, add_constant(graph, f"{node.name}_minus_bias", -held.detach(), node)), node
        )
    elif bias is not None:
        y = add_call(graph, aten.add.Tensor, (y, bias), node)
    node.replace_all_uses_with(y)
    graph.graph.erase_node(node)


def _quantize_bias(graph: fx.GraphModule, node: fx.Node) -> None:
    """A float bias  ->  dequantize(int32 bias) at the step of the accumulator, input scale times weight scale."""
    x, weight, bias = node.args[0], node.args[1], constant(node.args[2])
    if bias is None or any(getattr(n, "target", None) is not Q.dequantize.default for n in (x, weight)):
        return
    scales = [constant(n.args[1]) for n in (x, weight)]
    if scales[0] is None or scales[1] is None or not weight.args[3].endswith("/c0"):
        return
    step = scales[0].double() * scales[1].double()
    codes = torch.round(bias.detach().double() / step)
    if not bool((codes.abs() <= INT32).all()):
        return
    name = node.meta.get("site", node.name)
    data = add_constant(graph, f"{name}_bias_codes", codes.to(torch.int32), node)
    scale = add_constant(graph, f"{name}_bias_scale", step.float(), node)
    node.update_arg(2, add_call(graph, Q.dequantize.default, (data, scale, None, "i8/c0", bias.dtype), node))


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Our ops as ONNX nodes, for torch.onnx."""
    from onnxscript import opset18 as op  # pyright: ignore[reportMissingImports]

    def quantize(x: Any, scale: Any, zero: Any, type: str) -> Any:
        return op.QuantizeLinear(x, scale, zero)

    def dequantize(q: Any, scale: Any, zero: Any, type: str, dtype: int) -> Any:
        qtype = QType.parse(type)
        given = (q, scale) if zero is None else (q, scale, zero)
        return (
            op.DequantizeLinear(*given, axis=qtype.axis or 0) if qtype.axis is not None else op.DequantizeLinear(*given)
        )

    return {Q.quantize.default: quantize, Q.dequantize.default: dequantize}


def export_onnx(model: nn.Module, example: Batch, path: Path, dynamic_shapes: Any, plan: Plan) -> None:
    """Writes a compiled model as one ONNX file, whole or not at all."""
    places: dict[str, str] = {}

    def prepare(graph: fx.GraphModule) -> None:
        for node in graph.graph.nodes:
            places.setdefault(str(node.target).removeprefix("aten."), node.meta.get("site") or module_path(node))
        to_onnx_form(graph)

    program = qdq_program(model, example, dynamic_shapes, without_bfloat16(plan), PASSES, prepare)
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    if size > LARGEST:
        raise QpassError(f"the weights take {size / 1e9:.1f} GB, and one ONNX file holds 2; write a .pt2 file.")
    try:
        found = _translate(program)
    except torch.onnx.errors.OnnxExporterError as error:
        raise QpassError(_untranslated(error, places)) from error
    try:
        with replacing(path) as part:
            found.save(part, external_data=False)
    except OSError as error:
        raise QpassError(f"cannot write {path}: {error}; free some space or choose another folder.") from error


def _translate(program: torch.export.ExportedProgram) -> torch.onnx.ONNXProgram:
    chatter = [logging.getLogger(name) for name in CHATTER]
    before = [logger.level for logger in chatter]
    for logger in chatter:  # packages that are not installed, folding that was tried and left
        logger.setLevel(logging.ERROR)
    try:
        found = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=OPSET,
            output_names=output_names(program),
            custom_translation_table=translations(),
            verbose=False,
        )
    finally:
        for logger, level in zip(chatter, before, strict=True):
            logger.setLevel(level)
    assert found is not None
    return found


def output_names(program: torch.export.ExportedProgram) -> list[str]:
    """Of a dictionary its keys, of a tuple output_0, output_1, ..., of one tensor output."""
    spec = program.call_spec.out_spec
    leaves, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(range(spec.num_leaves), spec))
    taken = {node.name for node in program.graph.nodes if node.op == "placeholder"}
    names = []
    for path, _ in leaves:
        keys = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path]
        name = ".".join(keys if keys and not keys[0].isdigit() else ["_".join(["output", *keys])])
        names.append(f"{name}_out" if name in taken else name)
    return names


def _untranslated(error: BaseException | None, places: Mapping[str, str]) -> str:
    """What torch.onnx could not translate, and where the model has it."""
    first = str(error).splitlines()[0]
    while error is not None:
        found = re.search(r"<OpOverload\(op='([^']+)', overload='([^']+)'\)>", str(error))
        if found and "No ONNX function" in str(error):
            name = f"{found[1]}.{found[2]}"
            place = places.get(name.removeprefix("aten."))
            where = f"{place or 'the model'}: " if place is not None else ""
            return f"{where}{name} has no translation to ONNX; leave it out of what is exported, or write a .pt2 file."
        error = error.__cause__
    return f"torch.onnx cannot translate this model: {first}; write a .pt2 file."


def check_installed() -> None:
    """The packages that write ONNX are there."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise QpassError(f"an ONNX file needs {' and '.join(missing)}: pip install 'qpass-torch[onnx]'.")
