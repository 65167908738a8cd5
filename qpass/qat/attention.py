"""torch's nn.MultiheadAttention with a call of its output layer, so that this can be fake-quantized as any linear is.

torch hands the weight of `out_proj` to one function, and never calls the module. The computation here is that function's, in
the layout [length, batch, channels], with masks and weights of attention as torch documents them; the input's weight,
`in_proj_weight`, is read from the module, where sites.py puts the fake-quantized one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.MultiheadAttention):
    """What an nn.MultiheadAttention is while it is in training; same parameters, same arguments, same results."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """[L, N, E], [S, N, E] (or batch first, or without N) -> [L, N, E], and weights [N, L, S] or [N, heads, L, S]."""
        batched = query.dim() == 3
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint of what attn_mask is, and there is none; pass attn_mask too.")
        causal = is_causal and key_padding_mask is None and not need_weights
        q, k, v = self._projected(*_laid_out((query, key, value), batched, self.batch_first))
        length, batch = q.shape[:2]
        padding = _as_floats(key_padding_mask, q.dtype)
        if padding is not None and not batched:
            padding = padding[None]
        mask = None if causal else _as_floats(attn_mask, q.dtype)
        if mask is not None and mask.dim() == 2:
            mask = mask[None]
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.repeat(1, batch, 1)])
            v = torch.cat([v, self.bias_v.repeat(1, batch, 1)])
            mask, padding = _longer(mask), _longer(padding)
        q, k, v = (
            x.contiguous().view(len(x), batch * self.num_heads, self.head_dim).transpose(0, 1) for x in (q, k, v)
        )
        if self.add_zero_attn:
            k, v = (torch.cat([x, x.new_zeros(len(x), 1, self.head_dim)], 1) for x in (k, v))
            mask, padding = _longer(mask), _longer(padding)
        if padding is not None:
            of_heads = padding[:, None, None].expand(-1, self.num_heads, -1, -1).reshape(len(q), 1, -1)
            mask = of_heads if mask is None else mask + of_heads
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            y, weights = _weighted(q, k, v, mask, dropout)
            weights = weights.view(batch, self.num_heads, length, -1)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        else:
            y, weights = _fused(q, k, v, mask, dropout, causal, self.num_heads), None
        y = self.out_proj(y.reshape(length * batch, self.embed_dim)).view(length, batch, -1)
        if not batched:
            return y[:, 0], weights
        return y.transpose(0, 1) if self.batch_first else y, weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values; one product where all three are of one tensor."""
        weight, bias, size = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        if weight is not None and query is key is value:
            return F.linear(query, weight, bias).chunk(3, -1)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        if weight is not None and key is value:
            both = F.linear(key, weight[size:], None if bias is None else bias[size:])
            return F.linear(query, weight[:size], biases[0]), *both.chunk(2, -1)
        parts = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if weight is None else weight.chunk(3)
        values = (query, key, value)
        return tuple(F.linear(x, part, b) for x, part, b in zip(values, parts, biases, strict=True))


def of_one_value(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> bool:
    """Whether a call's queries, keys and values are all of one tensor, so that they are one product."""
    return query is key is value


def split(module: nn.MultiheadAttention) -> None:
    """Makes the module call its output layer, in place."""
    module.__class__ = Attention


def whole(module: nn.Module) -> None:
    """The module as torch has it, in place."""
    if type(module) is Attention:
        module.__class__ = nn.MultiheadAttention


def _laid_out(values: tuple[Tensor, ...], batched: bool, batch_first: bool) -> list[Tensor]:
    """The same as [length, batch, channels]; what is one tensor stays one."""
    made: dict[int, Tensor] = {}
    for x in values:
        if id(x) not in made:
            made[id(x)] = x[:, None] if not batched else x.transpose(0, 1) if batch_first else x
    return [made[id(x)] for x in values]


def _as_floats(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What is added to the logits: minus infinity where a mask of booleans is true."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def _longer(mask: Tensor | None) -> Tensor | None:
    """With a key more, which everything sees."""
    return None if mask is None else F.pad(mask, (0, 1))


def _weighted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """([L, heads, D], weights [heads, L, S]); heads: those of all samples."""
    q, turned = q * math.sqrt(1.0 / q.shape[-1]), k.transpose(-2, -1)
    logits = torch.bmm(q, turned) if mask is None else torch.baddbmm(mask, q, turned)
    weights = F.dropout(F.softmax(logits, -1), dropout) if dropout else F.softmax(logits, -1)
    return torch.bmm(weights, v).transpose(0, 1), weights


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool, heads: int) -> Tensor:
    """[L, N, heads, D] of [N heads, L, D]."""
    q, k, v = (x.view(-1, heads, *x.shape[1:]) for x in (q, k, v))
    if mask is not None:
        mask = mask[None] if len(mask) == 1 else mask.view(-1, heads, *mask.shape[1:])
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal).permute(2, 0, 1, 3)
