"""Losses as they are measured: each group of sites by itself under each candidate, all others as a base has them.

base float       loss[g, c] = loss of the model with g alone quantized to c
base a recipe    loss[g, c] = what g moved to c adds to the loss, all other groups being as the recipe has them

Every value in front of a group is computed once a batch (inspect/branches.py). A function of the model is called once for
each group and candidate; what it calls is a copy of the model that shares all tensors and runs its graphs with the group
quantized.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qpass.calibrate import Batch, buffers_kept, evaluating, shown
from qpass.checks import check_inputs
from qpass.errors import QpassError
from qpass.inspect.branches import Assigned
from qpass.inspect.metric import Function, Losses, name_of
from qpass.inspect.replay import Replay
from qpass.interrupts import stop_if_asked
from qpass.search.candidates import FLOAT, Prepared, simulated
from qpass.search.groups import Group, by_site
from qpass.search.kept import Kept, digest_of
from qpass.search.metric import of_model, value_of

ALL = ("", "all")
UNSEEN = "metric {} did not call the model it was given as model(...), so nothing can be measured with it."
Values = dict[tuple[str, str], float]


class Measurement:
    """One model, its groups and candidates, the batches and the metric. float_value: of a function of the model."""

    def __init__(
        self,
        model: nn.Module,
        prepared: Prepared,
        groups: Sequence[Group],
        batches: Sequence[Batch],
        metric: str | Function,
        float_value: float,
        kept: Kept,
    ) -> None:
        self.model, self.prepared, self.groups, self.batches = model, prepared, list(groups), batches
        self.metric, self.float_value, self.kept = metric, float_value, kept
        self.chosen = name_of(metric) if not isinstance(metric, str) else metric
        self.twin = copy.copy(model)
        self.replay = Replay(self.twin)
        self.fixed = {site: prepared.products[next(iter(prepared.plans))] for site in prepared.fixed}

    def losses(self, base: Mapping[str, str] | None = None) -> tuple[Values, float]:
        """(group, candidate) -> what it adds to the loss of the base, and that loss. base: by group; None: all float."""
        under = {**self.fixed, **self._assigned(base or {})}
        variants = {(g.name, c): self._assigned({g.name: c}) for g in self.groups for c in self._others(g, base)}
        name = "losses" if base is None else f"losses-{digest_of(base)}"
        found = (self._of_model if of_model(self.metric) else self._of_outputs)(under, variants, name)
        own = found.get(ALL, 0.0)
        return {(g.name, c): found.get((g.name, c), own) - own for g in self.groups for c in g.takes}, own

    def loss(self, chosen: Assigned) -> float:
        """The loss with sites quantized as a plan's products have them."""
        return (self._of_model if of_model(self.metric) else self._of_outputs)(chosen, {}, "")[ALL]

    def of_choice(self, chosen: Mapping[str, str]) -> float:
        """The loss of a choice by group, each group as its candidate's own plan has it."""
        return self.loss({**self.fixed, **self._assigned(chosen)})

    def _others(self, group: Group, base: Mapping[str, str] | None) -> list[str]:
        here = FLOAT if base is None else base[group.name]
        return [c for c in group.takes if c != here]

    def _assigned(self, chosen: Mapping[str, str]) -> Assigned:
        return simulated(self.prepared, by_site([g for g in self.groups if g.name in chosen], chosen))

    def _of_outputs(self, base: Assigned, variants: Mapping[Any, Assigned], name: str) -> Values:
        losses, done = Losses(self.metric), 0
        if name and (known := self.kept.data(name)):
            losses.sums = {tuple(key.split("\n")): [tuple(p) for p in pairs] for key, pairs in known["sums"].items()}
            losses.chosen, done = known["chosen"], known["batches"]
        with buffers_kept(self.model), evaluating(self.model), torch.no_grad():
            for number, batch in enumerate(shown(self.batches, "measuring")):
                if number >= done:
                    self._batch(losses, base, variants, batch, f"batch {number}")
                    if name:
                        sums = {"\n".join(key): pairs for key, pairs in losses.sums.items()}
                        self.kept.keep(name, {"batches": number + 1, "chosen": losses.chosen, "sums": sums})
        self.chosen = losses.chosen
        return {key: losses.of(*key) or 0.0 for key in losses.sums}

    def _batch(self, losses: Losses, base: Assigned, variants: Mapping[Any, Assigned], batch: Batch, what: str) -> None:
        check_inputs(self.model, batch, what)
        self._forget()
        wanted = self.replay.first(batch, what)
        if any(base.values()):
            losses.add(ALL, self.replay.quantized(base, batch, what), wanted, self.replay.mask)
        elif not variants:
            losses.add(ALL, wanted, wanted, self.replay.mask)
        last = ""
        for key, output in self.replay.variants(batch, what, base, variants):
            losses.add(key, output, wanted, self.replay.mask)
            if key[0] != last and not any(base.values()):
                self._forget()  # the float weights of the groups before
            last = key[0]

    def _forget(self) -> None:
        for products in self.prepared.products.values():
            products.weights.clear()
            products.forget()

    def _of_model(self, base: Assigned, variants: Mapping[Any, Assigned], name: str) -> Values:
        """f(model with a group quantized) - f(float model), one call for each variant."""
        found = {tuple(key.split("\n")): value for key, value in (self.kept.data(name) if name else {}).items()}
        wanted: dict[Any, Assigned] = {key: {**base, **change} for key, change in variants.items()}
        if any(base.values()) or not variants:
            wanted[ALL] = base
        self.twin._compiled_call_impl = self.replay.call
        try:
            with buffers_kept(self.model):
                for key in shown([key for key in wanted if key not in found], "measuring", lambda key: key[0]):
                    stop_if_asked()
                    self._forget()
                    found[key] = self._value(wanted[key], " of ".join(filter(None, key[::-1])))
                    if name:
                        self.kept.keep(name, {"\n".join(key): value for key, value in found.items()})
        finally:
            self.twin.__dict__["_compiled_call_impl"] = None
        return found

    def _value(self, chosen: Assigned, what: str) -> float:
        self.replay.entered.clear()
        self.replay.chosen = chosen
        try:
            value = value_of(self.metric, self.twin, f"the model with {what}")
        finally:
            self.replay.chosen = None
        if not self.replay.entered:
            raise QpassError(UNSEEN.format(name_of(self.metric)))
        return value - self.float_value
