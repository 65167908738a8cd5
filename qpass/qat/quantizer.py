"""One fake-quantized tensor of a model in training: its type, its rule of subgradients, and its step and offset.

log_step   float32 parameter, ln s: a step is positive whatever the optimizer does, and a learning rate is relative to it
offset     float32 parameter or buffer, the zero point before it is rounded; unsigned types alone
log_clip   float32 parameter, ln of what the range of each row or image is multiplied by (dynamic.py), where a rule learns
           it: of values of fewer than 8 bits; None elsewhere
low, high  float32 buffers in the step's stead where the rule learns none: the moving average of an input's range; a
           weight's range is looked at in every call
factor     float32 buffers [K], what the plan multiplies the channels of an input by (a weight's are divided by it), and
shift      what it subtracts from an input before: channels.py; None where the plan has none. They are constants
kind       uint8 buffer, the type as text: a checkpoint of another scheme is refused by it
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qpass import affine
from qpass.errors import QpassError
from qpass.qat.channels import Channels, scaled, undone
from qpass.qat.dynamic import fake_quantize_dynamic
from qpass.qat.fake_quantize import fake_quantize, whole
from qpass.qat.memo import Memo
from qpass.qat.subgradients.subgradient import Subgradient
from qpass.qparams import QParams
from qpass.qtype import QType, shortest

EMA = 0.01  # what a call in training moves an average by (Jacob et al. 2018, 1712.05877, section 3.1)
WHOLE = 8  # bits from which on a row has codes enough for all of its range, and kernels that look for it themselves
LOOKED_AT = 100  # calls between two looks at the steps of a GPU, each of which waits for it
BROKEN = (
    "{}: its step is {}. The training diverged there or before: lower the learning rate of the steps "
    "(qpass.qat.param_groups(model, lr, step_lr=...)), clip gradients, or look at the loss for NaN."
)
OTHER_SCHEME = (
    "{}: the checkpoint's type is {}, this model was prepared for {}; prepare it with the scheme of the checkpoint."
)
OTHER_CHANNELS = (
    "{}: the checkpoint has {} factors of its input channels, this model {}; prepare it with the scheme and the data of the "
    "checkpoint (`smooth=none` in a scheme leaves the factors out)."
)


class Quantizer(nn.Module):
    """Gives a tensor back as its codes stand for it. site: where, for messages; params: the first, None where dynamic."""

    def __init__(
        self,
        site: str,
        qtype: QType,
        rule: Subgradient,
        params: QParams | None,
        is_weight: bool,
        learns: bool = True,
        factor: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> None:
        super().__init__()
        clips = params is None and rule.learns and qtype.bits < WHOLE
        self.site, self.type, self.rule, self.is_weight = site, qtype.bare if clips else qtype, rule, is_weight
        self.on, self.readers, self.calls = True, 1, 0
        self.coded = not is_weight  # whether what reads it keeps codes (product.py)
        self._memo = Memo()
        text = torch.tensor(list(str(self.type).encode()), dtype=torch.uint8)
        self.register_buffer("kind", text)
        for name, values in (
            ("factor", factor),
            ("shift", shift),
        ):  # each its own memory: safetensors takes no shared one
            self.register_buffer(name, None if values is None else values.to(torch.float32, copy=True))
        self.dynamic = params is None
        self.log_clip = nn.Parameter(torch.tensor(qtype.clip).log(), requires_grad=learns) if clips else None
        if params is None:
            return
        if rule.learns:
            self.log_step = nn.Parameter(params.scale.log(), requires_grad=learns)
            if params.zero is not None:
                offset, moves = params.zero.float(), learns and rule.to_offset is not None
                if moves:
                    self.offset = nn.Parameter(offset)
                else:
                    self.register_buffer("offset", offset)
        elif not is_weight:
            zero = 0 if params.zero is None else params.zero
            self.register_buffer("low", (qtype.qmin - zero) * params.scale)
            self.register_buffer("high", (qtype.qmax - zero) * params.scale)

    def channels(self) -> Channels | None:
        """What a value is multiplied by, and what is taken off then; nothing where there are no factors.

        New tensors, since DistributedDataParallel writes to buffers, which a backward pass may still be waiting for.
        """
        if self.factor is None:
            return None
        factor = self.factor.to(torch.float32, copy=True)
        if self.is_weight:
            by = 1 / factor
            return (by[:, None] if self.type.axis == 1 else by), None
        return factor, None if self.shift is None else self.shift.to(torch.float32) * factor

    def seen(self, x: Tensor) -> Tensor:
        """What is rounded of a value: its channels times their factors, in float32 (float64 where it is); else x itself."""
        return x if self.factor is None else scaled(x, self.channels())

    def undone(self, y: Tensor) -> Tensor:
        """The value that was `seen` as y."""
        channels = self.channels()
        return y if channels is None else undone(y, channels)

    def params(self, weight: Tensor | None = None) -> QParams:
        """Scale and zero point in use. weight: where it is one, as some rules look at its range."""
        if self.rule.learns:
            offset = getattr(self, "offset", None)
            zero = None if offset is None else whole(offset.detach(), self.type).to(torch.int32)
            return QParams(self.log_step.detach().exp().to(torch.float32), zero, self.type)
        lo, hi = (
            (self.low, self.high) if weight is None else affine.limits(self.seen(weight.detach()).float(), self.type)
        )
        return affine.choose_qparams(lo, hi, self.type)

    def forward(self, x: Tensor, reader: int = 0, dtype: torch.dtype | None = None, multiplied: bool = False) -> Tensor:
        """X as it comes back from its codes, in dtype (that of x unless given). reader: id of the module that asks.

        multiplied: with the factors of its channels, else they are undone.
        """
        if not self.on or not x.is_floating_point():
            return x
        dtype = dtype or x.dtype
        if self.factor is None or multiplied:
            return self._once(x, reader, dtype)
        return self.undone(self._once(x, reader, affine.math_dtype(x.dtype))).to(dtype)

    def _once(self, x: Tensor, reader: int, dtype: torch.dtype) -> Tensor:
        """For all that read one value."""
        if self.readers < 2 or torch.compiler.is_compiling() or x.is_inference():
            return self._quantized(x, dtype)
        steps = tuple(p._version for p in self._parameters.values() if p is not None)
        state = (x._version, steps, torch.is_grad_enabled(), self.training, dtype)
        y = self._memo.get(x, state, reader, self.readers)
        if y is None:
            y = self._quantized(x, dtype)
            self._memo.put(x, state, reader, y)
        return y

    def _quantized(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        coded = self.coded and not torch.compiler.is_compiling()
        if self.dynamic:
            if self.training and self.log_clip is not None:
                self._check(self.log_clip.exp())
            return fake_quantize_dynamic(x, self.type, dtype, self.channels(), self.log_clip, self.rule, coded)
        if not self.rule.learns and not self.is_weight and self.training and x.numel():
            self._follow(self.seen(x.detach()))
        channels = self.channels()
        if not self.rule.learns:
            now = self.params(x if self.is_weight else None)
            zero = None if now.zero is None else now.zero.float()
            return fake_quantize(x, now.scale, zero, self.type, self.rule, dtype, self.is_weight, channels, coded)
        step = self.log_step.exp().to(torch.float32)
        if self.training:
            self._check(step)
        offset = getattr(self, "offset", None)
        return fake_quantize(x, step, offset, self.type, self.rule, dtype, self.is_weight, channels, coded)

    def _follow(self, x: Tensor) -> None:
        """Moves the range, once for each forward pass: activation checkpointing runs it again, inside of the backward one."""
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return
        lo, hi = affine.limits(x.float(), self.type)
        self.low.lerp_(lo, EMA)
        self.high.lerp_(hi, EMA)

    def _check(self, step: Tensor) -> None:
        """Raises where a step is no positive number."""
        if torch.compiler.is_compiling():
            return
        self.calls += 1
        if step.device.type != "cpu" and self.calls % LOOKED_AT:
            return
        found = step.detach()
        if not bool(((found > 0) & (found < torch.inf)).all()):
            bad = found[~((found > 0) & (found < torch.inf))].flatten()[0]
            raise QpassError(BROKEN.format(self.site, float(bad)))

    @property
    def clip(self) -> float | None:
        """What the range of each row or image is multiplied by; None where no rule learns it."""
        return None if self.log_clip is None else shortest(self.log_clip.detach().exp())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        theirs = state_dict.get(f"{prefix}kind")
        if theirs is not None and not torch.equal(theirs.cpu(), self.kind.cpu()):
            raise QpassError(OTHER_SCHEME.format(self.site, bytes(theirs.tolist()).decode(errors="replace"), self.type))
        held = self.factor is not None
        if theirs is not None and held != (f"{prefix}factor" in state_dict):
            raise QpassError(
                OTHER_CHANNELS.format(self.site, "no" if held else "the", "has them" if held else "has none")
            )
        if theirs is not None and self.log_clip is not None:  # trained before clips were
            state_dict.setdefault(f"{prefix}log_clip", torch.zeros_like(self.log_clip))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Moves to a device, and to float64 and back: model.bfloat16() leaves steps and ranges in float32."""

        def moved(t: Tensor) -> Tensor:
            there = fn(t)
            narrow = there.is_floating_point() and there.dtype.itemsize < torch.float32.itemsize
            return t.to(there.device) if narrow else there

        return super()._apply(moved, recurse)

    def extra_repr(self) -> str:
        """The type and how its step moves."""
        clip = "" if self.clip is None else f", {self.clip:.3g} of its range by {self.rule.name}"
        return f"{self.type}, {f'per call{clip}' if self.dynamic else self.rule.name}"


def product_dtype(x: Tensor) -> torch.dtype:
    """What autocast makes of an operand of a product, which then is made in one go; else the dtype of x."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype
