"""One site in full: its types and scales, what it costs, its error, its lines in the graph, and the rules it missed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from torch import Tensor

from qpass.inspect.cost import SiteTime
from qpass.inspect.figures import SiteError
from qpass.plan import Decision
from qpass.served import Record

FLOAT_BYTES = 4


def explain(d: Decision, records: Iterable[Record], error: SiteError | None, time: SiteTime | None = None) -> str:
    """The page of one site. error, time: where they were measured."""
    records = tuple(records)
    lines = [f"{d.site}", *_head(d)]
    lines += _types(d)
    source = next((r.sources[d.site] for r in records if d.site in r.sources), None)
    lines += [] if source is None else _row("source", f"{source.file}, line {source.line}: {source.code}")
    lines += [] if error is None else _row("error", *_errors(error))
    if time is not None:
        lines += _row("time", f"{time.milliseconds:.3g} ms by itself, {time.roofline:.0%} of the roofline")
    lines += _row("note", d.note) if d.note else []
    for record in records:
        lines += [line for text in _lines(record, d.site) for line in _row(record.name, text)]
        lines += [line for miss in record.misses if d.site in miss.sites for line in _row("missed", str(miss))]
        lines += [line for site, why in record.kept if d.site in site.split("+") for line in _row("kept", why)]
    return "\n".join(lines)


def _errors(e: SiteError) -> list[str]:
    found = [
        f"SQNR {e.sqnr:.1f} dB, largest {e.worst:.3g}, cosine {e.cosine:.5f}: its float input through its integers"
    ]
    if e.clipped is not None:
        found.append(f"{e.clipped:.3%} of its input values are beyond the grid")
    if e.loss_alone is not None and e.loss_without is not None:
        found.append(f"at the model's output {e.loss_alone:.3g} alone; {e.loss_without:.3g} of all but this site")
    return found


def _row(head: str, *texts: str) -> list[str]:
    return [f"  {head if i == 0 else '':<8}{text}" for i, text in enumerate(texts)]


def _types(d: Decision) -> list[str]:
    if d.is_output:
        return _input(d, "type")
    return [*_weight(d), *_input(d)] if d.quantized else _row("type", _float_type(d))


def _head(d: Decision) -> list[str]:
    if d.is_output:
        return _row("what", "the value that its convolution leaves for others than sites to read")
    shape = f", weight {list(d.shape)} of {d.weight}" if d.weight else ""
    rows = f", {d.rows:,} rows in the example: {d.macs:,} multiply-adds" if d.rows and d.weight else ""
    return _row("what", f"{d.operation}{shape}{rows}")


def _float_type(d: Decision) -> str:
    size = f" ({FLOAT_BYTES * d.shape[0] * d.shape[1]:,} bytes in float32)" if len(d.shape) == 2 else ""
    return f"float{size}: {d.why}"


def _weight(d: Decision) -> list[str]:
    packed = d.packed
    if packed is None:
        return _row("weight", f"{d.weight_type}")
    before = FLOAT_BYTES * math.prod(packed.shape)
    size = f"{before:,} bytes in float32, {packed.nbytes:,} packed ({packed.nbytes / before:.3f})"
    return _row("weight", f"{d.weight_type}, {size}", f"scale {_span_of(packed.scale)}, {packed.scale.numel()} in all")


def _input(d: Decision, head: str = "input") -> list[str]:
    if d.input_type is None:
        return _row(head, f"float, seen {_span(d.lo, d.hi)}")
    texts = [f"{d.input_type}, seen {_span(d.lo, d.hi)}"]
    if d.input_scale is not None and d.input_zero is not None:
        texts.append(f"scale {float(d.input_scale):.6g}, zero point {int(d.input_zero)}")
    else:
        one = "image" if d.input_type.granularity == "sample" else "row"
        clip = "" if d.input_type.clip == 1 else f", {d.input_type.clip:.3g} of the range"
        texts.append(f"scale and zero point of each {one} at run time{clip}")
    if d.group and d.group != d.site:
        texts.append(f"shared with {d.group}: quantized once for both")
    if d.packed is not None and d.packed.in_mul is not None:
        texts.append(f"channels multiplied by {_span_of(d.packed.in_mul)} before")
    if d.input_shift is not None:
        texts.append(f"channels shifted by {_span_of(d.input_shift)} before")
    if d.input_extra is not None and int(d.input_extra.sum()):
        texts.append(f"{int(d.input_extra.sum())} copies of channels that reach far added")
    return _row(head, *texts)


def _lines(record: Record, site: str) -> Iterator[str]:
    """The site's lines in the lowered graph."""
    for line in record.steps[-1].text.splitlines():
        _, _, comment = line.partition("   # ")
        if site in comment.replace("+", " ").split():
            yield line.strip()


def _span(lo: float | None, hi: float | None) -> str:
    return "in no calibration batch" if lo is None or hi is None else f"{lo:.4g} .. {hi:.4g}"


def _span_of(values: Tensor) -> str:
    return f"{float(values.min()):.3g} .. {float(values.max()):.3g}"
