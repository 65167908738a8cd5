r"""What a monitor knows in the text format of Prometheus, version 0.0.4, and a WSGI app that serves it.

    # HELP name what it is              one HELP and one TYPE for each family, then its samples
    # TYPE name gauge
    name{label="value"} 0.25            in label values \ " and line ends are escaped: \\ \" \n

(prometheus.io/docs/instrumenting/exposition_formats.) Counters end in _total.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from qpass.serving.drift import DRIFT
from qpass.serving.drifts import DriftReport, SiteDrift

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# name, type, help, value of a row; None: no sample
SITES: tuple[tuple[str, str, str, Callable[[SiteDrift], float | None]], ...] = (
    ("qpass_input_clipped_ratio", "gauge", "Share of the values beyond the grid of a static input.", lambda r: r.clipped),
    ("qpass_input_psi", "gauge", "Population stability index against the calibration.", lambda r: r.psi),
    ("qpass_input_psi_noise", "gauge", "The index that chance alone makes of so many looks.", lambda r: r.verdict.noise),
    ("qpass_input_kl_nats", "gauge", "KL divergence from the calibration, nats.", lambda r: r.kl),
    ("qpass_input_drifting", "gauge", "1 where an input has drifted.", lambda r: float(r.status == DRIFT)),
    ("qpass_input_samples", "gauge", "Samples in the window that is judged.", lambda r: r.stats.samples),
)  # fmt: skip


def exposition(report: DriftReport, totals: Mapping[str, tuple[str, float]], labels: Mapping[str, str]) -> str:
    """The whole text. totals: name -> (help, value) of the counters; labels: of every sample."""
    lines: list[str] = []
    for name, (told, value) in totals.items():
        lines += _family(name, "counter", told, [(labels, value)])
    for name, kind, told, value_of in SITES:
        found = [({**labels, "site": row.site}, value) for row in report if (value := value_of(row)) is not None]
        lines += _family(name, kind, told, found)
    return "\n".join(lines) + "\n"


def _family(name: str, kind: str, told: str, samples: Sequence[tuple[Mapping[str, str], float]]) -> Iterable[str]:
    if not samples:
        return
    yield f"# HELP {name} {told}"
    yield f"# TYPE {name} {kind}"
    for labels, value in samples:
        inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        yield f"{name}{{{inside}}} {_number(value)}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    return {"inf": "+Inf", "-inf": "-Inf", "nan": "NaN"}.get(repr(float(value)), repr(float(value)))


def respond(text: Callable[[], str], environ: Mapping[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    """One request of WSGI (PEP 3333): GET and HEAD get the text of now, other methods 405."""
    method = environ.get("REQUEST_METHOD", "GET")
    if method not in ("GET", "HEAD"):
        headers = [("Allow", "GET, HEAD"), ("Content-Type", CONTENT_TYPE), ("Content-Length", "0")]
        start_response("405 Method Not Allowed", headers)
        return [b""]
    body = text().encode()
    start_response("200 OK", [("Content-Type", CONTENT_TYPE), ("Content-Length", str(len(body)))])
    return [b"" if method == "HEAD" else body]
