r"""Losses from gradients: the second-order term at the output, of all groups and candidates from a few backward passes.

With y the output of a site in the float model, d = its quantized output - y on the same input, J the Jacobian of the model's
output z by y, and H the Hessian of the loss by z, the loss of quantizing the site is to second order (its gradient is zero)

    L = 1/2 d^T F d,      F = J^T H J

KL of softmax(z): H is the Fisher matrix of the label's distribution (Martens 2014, 1412.1193), and with labels drawn from the
model itself, k ~ p, and g = J^T (p - onehot(k)) the gradient of the loss of that label by y,

    F = E[g g^T],         L = 1/2 E[(sum of g * d over a sequence)^2]          labels of different rows being independent

Squared error, sum (z' - z)^2 / sum z^2: H = 2 I, and with signs v of +-1 in the label's stead, g = J^T v, 1/2 d^T F d is
E[(sum of g * d)^2]. Neither F nor a product with it is formed; one forward and a few backward passes serve all candidates,
and d has all that rounding does, that of inputs too. Sites of a group are summed before the square, so what they do together
counts.

Diagonals of the same matrix over weights are OBD (LeCun et al. 1989) and FIT (2210.08502); HAWQ-V3 (2011.10680) takes a
trace. What is left out: terms beyond the second, and how groups act together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from qpass.calibrate import Batch, buffers_kept, evaluating, shown
from qpass.errors import QpassError
from qpass.inspect.branches import Chosen
from qpass.inspect.metric import logits_of, tensors_of
from qpass.inspect.replay import Replay
from qpass.interrupts import stop_if_asked
from qpass.padding import unpadded
from qpass.search.candidates import Prepared
from qpass.search.groups import Group

DRAWS = 4  # of labels or signs, for each batch and tensor
KINDS = ("auto", "kl", "squared error")
ONLY_OUTPUTS = (
    "estimate='second order' is of the model's output, by kl or squared error, not of a function; take estimate='measured', "
    "or metric='kl'."
)
NO_GRADIENT = (
    "estimate='second order': no gradient of the output reaches {}: the call is captured as several graphs, or its output "
    "does not depend on it; take estimate='measured'."
)


class Recording(Chosen):
    """Runs a graph in float with gradients, and keeps each site's arguments and output."""

    def __init__(self, graph: fx.GraphModule, nodes: dict[str, fx.Node], tape: list[Any], base: Any) -> None:
        super().__init__(graph, nodes, base)
        self.tape = tape

    def run(self, *args: Any, **options: Any) -> Any:
        """The outputs, with their history."""
        with torch.enable_grad():
            return super().run(*args, **options)

    def run_node(self, n: fx.Node) -> Any:
        """One node; the output of a site begins a history of its own where none reaches it."""
        site = self.named.get(n)
        found = super().run_node(n)
        if site is None or not isinstance(found, Tensor) or not found.is_floating_point():
            return found
        found = found if found.requires_grad else found.detach().requires_grad_()
        self.tape.append((site, n, self.fetch_args_kwargs_from_env(n)[0], found))
        return found


class Recorder(Replay):
    """A session that records."""

    def __init__(self, model: nn.Module, base: Any) -> None:
        self.tape: list[Any] = []
        self.base = base
        super().__init__(model)

    def plain(self, graph: fx.GraphModule, nodes: dict[str, fx.Node]) -> fx.Interpreter:
        """Float, recorded."""
        return Recording(graph, nodes, self.tape, self.base)


def second_order(
    model: nn.Module, prepared: Prepared, groups: Sequence[Group], batches: Sequence[Batch], metric: object, seed: int
) -> dict[tuple[str, str], float]:
    """(group, candidate) -> estimated loss, in the units of the metric."""
    if not isinstance(metric, str) or metric not in KINDS:
        raise QpassError(ONLY_OUTPUTS)
    base = {site: prepared.products[next(iter(prepared.plans))] for site in prepared.fixed}
    recorder, generator = Recorder(model, base), torch.Generator().manual_seed(seed)
    sums: dict[tuple[str, str], Tensor] = {}
    weight = torch.zeros(())
    with buffers_kept(model), evaluating(model):
        for number, batch in enumerate(shown(batches, "estimating")):
            recorder.tape.clear()
            output = recorder.first(batch, f"batch {number}")
            if len(recorder.entered) != 1:
                raise QpassError(NO_GRADIENT.format(groups[0].name))
            found, seen = _batch(recorder, prepared, groups, output, metric, generator)
            weight = weight + seen
            for key, value in found.items():
                sums[key] = sums.get(key, torch.zeros(())) + value
            recorder.tape.clear()
    losses = {key: float((value / weight).mean()) for key, value in sums.items()}
    return {(g.name, c): losses.get((g.name, c), 0.0) for g in groups for c in g.takes}


def _batch(
    recorder: Recorder,
    prepared: Prepared,
    groups: Sequence[Group],
    output: Any,
    metric: str,
    generator: torch.Generator,
) -> tuple[dict[tuple[str, str], Tensor], Tensor]:
    """(group, candidate) -> [tensors], sums of a batch; and [tensors], what they are to be divided by."""
    logits = logits_of(output)
    divergence = metric == "kl" or (metric == "auto" and logits is not None)
    targets = [logits if logits is not None else tensors_of(output)[0]] if divergence else tensors_of(output)
    if not any(t.requires_grad for t in targets):
        raise QpassError(NO_GRADIENT.format(groups[0].name))
    mask = recorder.mask
    seeds = [(i, s) for i, t in enumerate(targets) for s in _seeds(t.detach(), mask, divergence, generator)]
    tape = [row for row in recorder.tape if row[3].requires_grad]
    reached = [(i, start) for i, start in seeds if targets[i].requires_grad]
    grads = []
    for number, (i, start) in enumerate(reached):
        again = number < len(reached) - 1
        ends = [row[3] for row in tape]
        grads.append(torch.autograd.grad(targets[i], ends, start, retain_graph=again, allow_unused=True))
    dots = _dots(prepared, groups, tape, grads, tuple(targets[0].shape))
    return _sums(dots, [i for i, _ in reached], targets, mask, divergence)


def _seeds(z: Tensor, mask: Tensor | None, divergence: bool, generator: torch.Generator) -> list[Tensor]:
    """What each backward pass begins with: shaped as z, zero where rows are padding."""
    counted = _counted(z, mask)
    found = []
    for _ in range(DRAWS):
        if divergence:
            p = torch.softmax(z.float(), -1)
            label = torch.multinomial(p.reshape(-1, p.shape[-1]).cpu(), 1, generator=generator).to(z.device)
            start = (
                p.reshape(-1, p.shape[-1])
                .scatter_add(1, label, -torch.ones_like(label, dtype=p.dtype))
                .reshape(z.shape)
            )
        else:
            start = torch.randint(0, 2, z.shape, generator=generator).to(z.device) * 2.0 - 1.0
        found.append((start * counted).to(z.dtype))
    return found


def _counted(z: Tensor, mask: Tensor | None) -> Tensor:
    """1 where a row counts, 0 where the batch's mask calls it padding; broadcasts against z."""
    if mask is None or z.dim() != 3 or z.shape[:2] != mask.shape:
        return torch.ones((), device=z.device)
    return mask.to(z.device, torch.float32)[..., None]


def _dots(
    prepared: Prepared, groups: Sequence[Group], tape: list[Any], grads: list[Any], shape: tuple[int, ...]
) -> dict[tuple[str, str], list[Tensor | float]]:
    """(group, candidate) -> sum(g * d) over each sequence, one tensor for each backward pass."""
    owner = {site: group for group in groups for site in group.sites}
    dots: dict[tuple[str, str], list[Tensor | float]] = {}
    with torch.no_grad():
        for at, (site, node, args, y) in enumerate(tape):
            stop_if_asked()
            for name in owner[site].takes if site in owner else ():
                products = prepared.products.get(name)
                d = None if products is None else products.decisions.get(site)
                if products is None or d is None:
                    continue
                change = products(d, node, torch.utils._pytree.tree_map(_detached, args)).float() - y.detach().float()
                found = dots.setdefault((owner[site].name, name), [0.0] * len(grads))
                for number, each in enumerate(grads):
                    if each[at] is not None:
                        found[number] = found[number] + _by_sequence(each[at].float() * change, shape)
                products.weights.clear()
    return dots


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _by_sequence(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Sums over each sequence, where the first axis counts sequences, or all rows, as that of the output of `shape` does.

    Others, such as positions that all sequences share, are one sum.
    """
    known = values.dim() > 1 and len(values) in (shape[0], math.prod(shape[:-1]))
    return values.reshape(shape[0] if known else 1, -1).sum(1, dtype=torch.float64)


def _sums(
    dots: dict[tuple[str, str], list[Tensor | float]], of: list[int], targets: list[Tensor], mask: Tensor | None,
    divergence: bool,
) -> tuple[dict[tuple[str, str], Tensor], Tensor]:  # fmt: skip
    found: dict[tuple[str, str], Tensor] = {}
    for key, passes in dots.items():
        found[key] = torch.zeros(len(targets), dtype=torch.float64)
        for target, dot in zip(of, passes, strict=True):
            power = float(torch.as_tensor(dot, dtype=torch.float64).square().sum())
            found[key][target] += power * (0.5 if divergence else 1.0) / DRAWS
    rows = [unpadded(t.detach(), mask).float() for t in targets]
    counts = [float(r[..., 0].numel()) if divergence else float(r.square().sum(dtype=torch.float64)) for r in rows]
    return found, torch.tensor(counts, dtype=torch.float64)
