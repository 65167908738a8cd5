"""The plot of drift.py: agreement with float before, lost and regained, and compiled anew, as an SVG of lines."""

from __future__ import annotations

COLOURS = ("#2a6f97", "#bc4b51", "#5b8e7d")


def figure(steps: dict[str, dict[str, float]], title: str, left: int = 0) -> str:
    """Agreement at the steps as a group of an SVG, 330 x 240: lost, then regained."""
    low = min(value for found in steps.values() for value in found.values())
    low, parts = min(low, 0.99) - 0.01, [f'<g transform="translate({left},0)"><text x="165" y="16">{title}</text>']
    for share in (low, 1.0):
        y = 190 - 160 * (share - low) / (1 - low)
        parts.append(
            f'<line x1="50" x2="290" y1="{y}" y2="{y}" stroke="#ccc"/><text x="28" y="{y + 4}">{share:.2f}</text>'
        )
    for i, step in enumerate(steps):
        parts.append(f'<text x="{60 + 72 * i}" y="208">{step}</text>')
    for n, (key, colour) in enumerate(zip(next(iter(steps.values())), COLOURS, strict=False)):
        places = [(60 + 72 * i, 190 - 160 * (found[key] - low) / (1 - low)) for i, found in enumerate(steps.values())]
        line = " ".join(f"{x},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{80 + 75 * n}" y="232" fill="{colour}">{key}</text>')
    return "\n".join([*parts, "</g>"])


def drawn(kept: dict[str, dict[str, dict[str, float]]]) -> str:
    """All that was kept, side by side."""
    groups = [figure(steps, name, 330 * i) for i, (name, steps) in enumerate(kept.items())]
    style = 'font-family="sans-serif" font-size="10" text-anchor="middle"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {330 * len(groups)} 240" {style}>'
    return "\n".join([head, *groups, "</svg>"]) + "\n"
