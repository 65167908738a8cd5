"""The looks that count now, and one that is under way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from qpass.serving.collect import Stats


@dataclass
class Look:
    """One call that is looked at. at: 0 .. 1, chooses which values are counted. mask: of padding. found: by site. seconds:
    what looking took. error: what went wrong.
    """

    at: float
    mask: Tensor | None = None
    found: dict[str, Stats] = field(default_factory=dict)
    seconds: float = 0.0
    error: str = ""


@dataclass
class Window:
    """The last `size` looks, half of them at least: two halves, of which the older one goes when the newer one is full."""

    size: int
    looks: int = 0
    older: dict[str, Stats] = field(default_factory=dict)
    newer: dict[str, Stats] = field(default_factory=dict)

    def add(self, found: Mapping[str, Stats], looks: int = 1) -> None:
        """Adds one look, or what another monitor saw, which moves nothing on (looks = 0)."""
        if looks and self.looks and self.looks % max(self.size // 2, 1) == 0:
            self.older, self.newer = self.newer, {}
        for site, stats in found.items():
            self.newer[site] = self.newer.get(site, Stats()).merge(stats)
        self.looks += looks

    def all(self) -> dict[str, Stats]:
        """What is in the window, by site."""
        names = dict.fromkeys((*self.older, *self.newer))
        return {name: self.older.get(name, Stats()).merge(self.newer.get(name, Stats())) for name in names}
