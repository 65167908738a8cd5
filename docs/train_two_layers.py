"""y = round(x / D) D in a network of two layers, in four steps: python docs/train_two_layers.py [--plot FILE] [--seed N]

Range analysis, choosing the integer range, training with the subgradient, validation: each prints its numbers. The network
has 2 inputs, 6 hidden units and 1 output, so 18 weights; it is to find sin(3 a) b + b^2 / 2 from points with noise. All is
float64, so that printed digits are the same on every machine. docs/training.md shows what this prints.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qpass
from qpass.plan import Plan

SEED, HIDDEN, NOISE, DTYPE = 29, 6, 0.3, torch.float64
POINTS, HELD_OUT = 1024, 4096
FLOAT_STEPS, FLOAT_RATE = 1000, 0.05
STEPS, RATE = 2500, 0.05  # of the training at few bits, D too, whose rate is relative to D
SCHEMES = ("w4a4-c", "w2a2-c")  # -c: a D for each output channel of a weight
PLAIN = "smooth=none,equalize=none,bias=none"  # nothing is folded into other numbers: the page shows all that there are
BLOCKS = " ▏▎▍▌▋▊▉█"


@dataclass
class Run:
    """All that the four steps print. start, trained: by scheme; curves: losses, and D of each activation."""

    points: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    model: nn.Sequential
    longer: nn.Sequential
    plans: dict[str, Plan]
    start: dict[str, nn.Sequential]
    trained: dict[str, nn.Sequential]
    curves: dict[str, tuple[list[float], list[list[float]]]]


def points(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs [count, 2], each of -1 .. 1, and the outputs [count, 1] to learn."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 2, generator=generator, dtype=DTYPE) * 2 - 1
    y = torch.sin(3 * x[:, :1]) * x[:, 1:] + x[:, 1:] ** 2 / 2
    return x, y + NOISE * torch.randn(count, 1, generator=generator, dtype=DTYPE)


def logs_of(model: nn.Module) -> dict[str, Tensor]:
    """Name -> ln D, the parameter that is trained."""
    return {name: p for name, p in model.named_parameters() if name.endswith("log_step")}


def fit(
    model: nn.Module, data: tuple[Tensor, Tensor], groups: list, steps: int
) -> tuple[list[float], list[list[float]]]:
    """An ordinary loop. Returns the loss of each step, and D of each activation then."""
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses, sizes, logs = [], [], logs_of(model).items()
    for _ in range(steps):
        loss = F.mse_loss(model(data[0]), data[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        sizes.append([float(log.detach().exp()) for name, log in logs if "input" in name])
    return losses, sizes


@functools.cache
def run(seed: int, schemes: tuple[str, ...] = SCHEMES) -> Run:
    """Trains in float, then at each of the schemes; a few seconds."""
    data, held_out = points(POINTS, 0), points(HELD_OUT, 1)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, HIDDEN, dtype=DTYPE), nn.ReLU(), nn.Linear(HIDDEN, 1, dtype=DTYPE))
    fit(model, data, [{"params": model.parameters(), "lr": FLOAT_RATE}], FLOAT_STEPS)
    longer = copy.deepcopy(model)  # what the same steps do in float
    fit(longer, data, [{"params": longer.parameters(), "lr": RATE}], STEPS)
    found = Run(data, held_out, model.eval(), longer.eval(), {}, {}, {}, {})
    for scheme in schemes:
        found.plans[scheme] = qpass.analyze(model, f"{scheme},{PLAIN}", data[0], [data[0]])
        t = qpass.prepare_qat(model, f"{scheme},smooth=none", data[0]).double()  # steps too
        for log in logs_of(t).values():
            log.data.round_(decimals=4)  # libraries differ in a logarithm's last bit, and training would enlarge that
        found.start[scheme] = copy.deepcopy(t).eval()
        found.curves[scheme] = fit(t.train(), data, qpass.qat.param_groups(t, RATE), STEPS)
        found.trained[scheme] = t.eval()
    return found


def loss_of(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Mean squared error."""
    with torch.no_grad():
        return float(F.mse_loss(model(data[0]), data[1]))


def bar(share: float, width: int) -> str:
    """A bar of `share` of the width, to an eighth of a character."""
    eighths = round(max(0.0, min(share, 1.0)) * width * 8)
    return "█" * (eighths // 8) + BLOCKS[eighths % 8].strip()


def activations(r: Run) -> dict[str, Tensor]:
    """What each layer reads, in float."""
    with torch.no_grad():
        return {"input": r.points[0], "hidden": r.model[:2](r.points[0])}


def ranges(r: Run) -> str:
    """Step 1: what the plan saw, and how the values lie in their range."""
    lines = [str(r.plans[SCHEMES[0]]).partition("\nw4a4")[0]]
    for name, values in activations(r).items():
        lo, hi = float(values.min()), float(values.max())
        counts = torch.histc(values, 10, lo, hi)
        lines += ["", f"{name}: {lo:.2f} .. {hi:.2f}, mean {float(values.mean()):.2f}, {values.numel()} values"]
        for i, count in enumerate(counts.tolist()):
            share = count / values.numel()
            lines.append(f"{lo + i * (hi - lo) / 10:6.2f} {share:5.0%} {bar(share, 60)}")
    lines.append("")
    for name, weight in (("hidden", r.model[0].weight), ("output", r.model[2].weight)):
        for i, row in enumerate(weight.tolist()):
            lines.append(f"{name} {i}: weights {min(row):5.2f} .. {max(row):5.2f}")
    return "\n".join(lines)


def rounded(x: Tensor, step: float, zero: int, codes: int) -> Tensor:
    """Y = (clamp(round(x / D) + zero, 0, codes - 1) - zero) D."""
    return ((torch.round(x / step) + zero).clamp(0, codes - 1) - zero) * step


def error(x: Tensor, codes: int, clip: float) -> tuple[float, float]:
    """(D, root mean square error in percent of x) where `clip` of the range of x has codes."""
    lo, hi = clip * min(float(x.min()), 0.0), clip * float(x.max())
    step = (hi - lo) / (codes - 1)
    wrong = rounded(x, step, round(-lo / step), codes) - x
    return step, 100 * float(wrong.square().mean().sqrt() / x.square().mean().sqrt())


def choice(r: Run) -> str:
    """Step 2: D and the error of numbers of codes, and of a clipped range of 16 codes."""
    lines = [f"{'':<12}" + "".join(f"{name + ': D':>12}{'error, %':>10}" for name in activations(r))]
    for codes, clip in ((256, 1.0), (16, 1.0), (16, 0.9), (16, 0.8), (16, 0.7), (16, 0.5), (4, 1.0), (4, 0.7)):
        row = [error(values, codes, clip) for values in activations(r).values()]
        lines.append(f"{codes:>3} of {clip:4.0%} " + "".join(f"{step:12.4f}{wrong:10.1f}" for step, wrong in row))
    for scheme, plan in r.plans.items():
        steps = [(float(d.input_scale), int(d.input_zero)) for d in plan.quantized]
        lines.append(
            f"{'plan ' + scheme[:4]:<12}" + "".join(f"{step:12.4f}{f'zero {zero}':>10}" for step, zero in steps)
        )
    return "\n".join(lines)


def numbers(t: nn.Sequential) -> str:
    """Every step, weight and code of a model in training."""
    lines = [f"{'':<10}{'D':>6}  {'weights':<42}  codes"]
    for name, layer in (("hidden", t[0]), ("output", t[2])):
        now = layer.weight_quantizer.params(layer.weight)
        codes = qpass.affine.quantize(layer.weight.detach(), now.scale, now.zero, now.type)
        for i, (row, code) in enumerate(zip(layer.weight.tolist(), codes.tolist(), strict=True)):
            shown, held = "".join(f"{w:7.2f}" for w in row), "".join(f"{c:4d}" for c in code)
            lines.append(f"{name} {i}  {float(now.scale[i]):6.3f}  {shown:<42}  {held}")
    for name, layer in (("input", t[0]), ("hidden", t[2])):
        now = layer.input_quantizer.params(layer.weight)
        lo, hi = ((code - int(now.zero)) * float(now.scale) for code in (now.type.qmin, now.type.qmax))
        lines.append(f"{name:<8}  {float(now.scale):6.3f}  {lo:.2f} .. {hi:.2f}, zero point {int(now.zero)}")
    return "\n".join(lines)


def subgradient(r: Run) -> str:
    """Step 3: the gradient of one D, added up by hand beside autograd's."""
    t = copy.deepcopy(r.start[SCHEMES[0]]).train()
    layer, kept = t[2], []
    layer.weight_quantizer.register_forward_hook(lambda module, args, y: (y.retain_grad(), kept.append(y))[0])
    F.mse_loss(t(r.points[0]), r.points[1]).backward()
    step, top = float(layer.weight_quantizer.log_step.detach().exp()[0]), layer.weight_quantizer.type.qmax
    lines, total = [f"{'w / D':>7}{'code':>6}{'dy/dD':>8}{'dL/dy':>9}{'product':>10}"], 0.0
    for w, grad in zip(layer.weight[0].tolist(), kept[0].grad[0].tolist(), strict=True):
        v = w / step
        code = min(max(round(v), -top - 1), top)
        slope = code - v if -top - 1 < v < top else code
        total += grad * slope
        lines.append(f"{v:7.2f}{code:6d}{slope:8.2f}{grad:9.4f}{grad * slope + 0.0:10.5f}")
    by_hand = total / (len(layer.weight[0]) * top) ** 0.5
    autograd = float(layer.weight_quantizer.log_step.grad[0]) / step
    lines.append(f"sum / sqrt({len(layer.weight[0])} x {top}): {by_hand:.5f}, autograd: {autograd:.5f}")
    return "\n".join(lines)


def curve(r: Run, scheme: str = SCHEMES[0], every: int = 100) -> str:
    """Step 3: the loss over the training, a mean of `every` steps a line, and D of both activations."""
    losses, sizes = r.curves[scheme]
    base = loss_of(r.model, r.points)
    lines = [f"{'step':>6}{'loss':>8}{'D input':>9}{'D hidden':>10}  beyond float", f"{'float':>6}{base:8.4f}"]
    for first in range(0, STEPS, every):
        mean = sum(losses[first : first + every]) / every
        d_input, d_hidden = sizes[first]
        lines.append(f"{first:6d}{mean:8.4f}{d_input:9.3f}{d_hidden:10.3f}  {bar((mean / base - 1) / 0.5, 40)}")
    return "\n".join(lines)


def figures(r: Run) -> dict[str, tuple[float, float]]:
    """Name -> (loss on the points, loss on the held out ones)."""
    models = {"float": r.model, "float, the same steps more": r.longer}
    for scheme in SCHEMES:
        name = scheme.removesuffix("-c")
        torch._dynamo.reset()
        compiled = qpass.compile(r.model, scheme, r.points[0], [r.points[0]], backend="reference")
        models[f"{name}, qpass.compile without training"] = compiled
        models[f"{name}, to nearest: where training begins"] = r.start[scheme]
        models[f"{name}, trained"] = r.trained[scheme]
        models[f"{name}, trained and compiled"] = qpass.compile(r.trained[scheme], backend="reference")
    return {name: (loss_of(model, r.points), loss_of(model, r.held_out)) for name, model in models.items()}


def apart(r: Run, scheme: str = SCHEMES[0]) -> float:
    """How far the compiled outputs are from those of t.eval() at most."""
    t = r.trained[scheme]
    q = qpass.compile(t, backend="reference")
    with torch.no_grad():
        return float((q(r.held_out[0]) - t(r.held_out[0])).abs().max())


def validated(r: Run) -> str:
    """Step 4: losses, and what they are beside float's."""
    found = figures(r)
    lines = [f"{'':<40}{'loss':>8}{'held out':>10}{'of float':>10}"]
    for name, (mine, other) in found.items():
        lines.append(f"{name:<40}{mine:8.4f}{other:10.4f}{other / found['float'][1]:10.3f}")
    lines.append(f"compiled w4a4 and t.eval() differ by less than 1e-6: {apart(r) < 1e-6}")
    return "\n".join(lines)


PARTS = {
    "1. Range analysis": ranges,
    "2. The integer range": choice,
    "3. Where training begins (w4a4)": lambda r: numbers(r.start[SCHEMES[0]]),
    "One subgradient: D of the output's weights": subgradient,
    "The loss on the way": curve,
    "Where it ends": lambda r: numbers(r.trained[SCHEMES[0]]),
    "4. Validation": validated,
}


def over_seeds(count: int) -> str:
    """What w4a4 adds to float's held-out loss, in percent, from as many first weights."""
    start, end = [], []
    for seed in range(count):
        r = run(seed, SCHEMES[:1])
        base = loss_of(r.model, r.held_out)
        for added, models in ((start, r.start), (end, r.trained)):
            added.append(100 * (loss_of(models[SCHEMES[0]], r.held_out) / base - 1))
        print(f"seed {seed}: {start[-1]:+.1f} % where training begins, {end[-1]:+.1f} % trained", flush=True)
    lines = [f"{name}: {min(v):+.1f} .. {max(v):+.1f} %, half above {statistics.median(v):+.1f} %"
             for name, v in (("to nearest", start), ("trained", end))]  # fmt: skip
    return "\n".join([*lines, f"trained, at most 1 % above float: {sum(v <= 1 for v in end)} of {count}"])


def plot(r: Run, path: str) -> None:
    """Loss and D of the activations over the training, for each scheme."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("--plot needs matplotlib (pip install matplotlib); all else is printed above") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    left.axhline(loss_of(r.model, r.points), color="black", label="float")
    for scheme, (losses, sizes) in r.curves.items():
        left.semilogy(losses, label=scheme)
        for i, name in enumerate(("input", "hidden")):
            right.plot([row[i] for row in sizes], label=f"{scheme}: D of the {name}")
    for axes, title in ((left, "loss"), (right, "step size D")):
        axes.set(title=title, xlabel="step of the training")
        axes.legend()
    figure.savefig(path)


def main() -> None:
    """Prints all parts."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--plot", metavar="FILE", help="also draw loss and steps into this file")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the first weights (default {SEED})")
    parser.add_argument("--seeds", type=int, metavar="N", help="only w4a4 beside float, from first weights of N seeds")
    options = parser.parse_args()
    if options.seeds:
        print(over_seeds(options.seeds))
        return
    r = run(options.seed)
    for title, part in PARTS.items():
        print(f"\n## {title}\n\n{part(r)}")
    if options.plot:
        plot(r, options.plot)


if __name__ == "__main__":
    main()
