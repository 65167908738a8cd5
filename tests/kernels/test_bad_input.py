"""Arguments that do not fit: the sentence names the op, what was expected and what came."""

import dataclasses

import pytest
import torch

from qpass_kernels import matmul
from tests.kernels.samples import KINDS, OPS, activations, epilogue, weights

M, N, K = 4, 16, 256


def call(kind, x=None, held=None, **changes):
    own, top, column = weights(kind, N, K, 128 if kind in ("w4a16", "w4a8") else 0)
    after = dataclasses.replace(epilogue(kind, M, N, top, column), **changes)
    module = KINDS[kind]
    x = activations(kind, M, K) if x is None else x
    return matmul.run(OPS[kind], x, own if held is None else held(own), after, module.check, module.launch)


@pytest.mark.parametrize("kind", KINDS)
def test_what_fits(kind):
    assert call(kind).shape == (M, N)


EPILOGUE = (
    ({"alpha": torch.ones(N + 1)}, "alpha must have 16 elements, not 17"),
    ({"alpha": torch.ones(N, dtype=torch.float64)}, "alpha must be torch.float32, not torch.float64"),
    ({"beta": torch.ones(2 * N)[::2]}, "beta must be contiguous"),
    ({"row_scale": torch.ones(N)}, "row_scale must have 4 elements, not 16"),
    ({"row_zero": torch.zeros(M)}, "row_zero must be torch.int32, not torch.float32"),
    ({"offset": None}, "row_zero needs offset"),
    ({"other": torch.zeros(M, N + 1)}, r"other must be \[..., 16\] of 4 rows, not \(4, 17\)"),
    ({"other": torch.zeros(M, N, dtype=torch.int32)}, "other must be float32, bfloat16 or float16, not torch.int32"),
    ({"act": "swish"}, "activation 'swish' is not one of relu"),
    ({"out_dtype": torch.float64}, "not torch.float64"),
    ({"out_scale": 0.0}, "out_scale must be finite and positive, not 0.0"),
    ({"out_scale": float("nan")}, "out_scale must be finite and positive, not nan"),
    ({"out_zero": 3}, "out_zero must lie in -128 .. 127, and be 0 unless int8"),
    ({"out_zero": 200, "out_dtype": torch.int8}, "out_zero must lie in"),
    ({"alpha": torch.ones(N, device="meta")}, "alpha is on meta, the input on cpu"),
)


@pytest.mark.parametrize(("changes", "says"), EPILOGUE, ids=[says[:30] for _, says in EPILOGUE])
def test_epilogue(changes, says):
    with pytest.raises(ValueError, match=f"w8a8_linear: .*{says}"):
        call("w8a8", **changes)


WEIGHTS = (
    ("w8a8", activations("w8a8", M, K + 1), None, r"weight must be contiguous \[N, 257\], not \(16, 256\)"),
    ("w8a8", activations("fp8", M, K), None, "must both be int8 or float8_e4m3fn"),
    ("w8a8", None, lambda w: (w[0].t().contiguous().t(),), "weight must be contiguous"),
    ("w8a8", torch.tensor(1, dtype=torch.int8), None, "not a scalar"),
    ("w8a8", None, lambda w: (w[0].to("meta"),), "a weight is on meta, x on cpu"),
    ("w8a16", torch.randn(M, K), None, "x must be bfloat16 or float16, not torch.float32"),
    ("w8a16", None, lambda w: (w[0].view(torch.int16),), "must be contiguous torch.uint16"),
    ("w8a16", activations("w8a16", M, K + 1), None, "x has 257 columns, of which a packed row has 192 words, not 128"),
    ("w4a16", torch.randn(M, K), None, "x must be bfloat16 or float16"),
    ("w4a16", None, lambda w: (w[0], w[1].float(), w[2]), r"scale must be contiguous torch.float16 \[G, 16\]"),
    ("w4a16", None, lambda w: (w[0], w[1][:, :-1].contiguous(), w[2]), r"\[G, 16\], not torch.float16 \(2, 15\)"),
    ("w4a16", None, lambda w: (w[0], w[1].repeat(8, 1), w[2]), "groups are of 32, 64 or a multiple of 128, not 16"),
    ("w4a16", None, lambda w: (w[0], w[1].repeat(2, 1)[:3], w[2]), "3 groups do not divide 256 inputs"),
    ("w4a16", None, lambda w: (w[0], w[1], w[2][:1]), "zero has 1 groups, scale 2"),
    ("w4a16", None, lambda w: (w[0][:, :-1].contiguous(), *w[1:]), "a packed row has 64 words, not 63"),
    ("w4a8", activations("w4a16", M, K), None, "x must be int8, not torch.float16"),
    ("w4a8", None, lambda w: (w[0], w[1].repeat(2, 1)[:3]), "3 groups do not divide 256 inputs"),
)


@pytest.mark.parametrize(("kind", "x", "held", "says"), WEIGHTS, ids=[f"{k}-{s[:20]}" for k, *_, s in WEIGHTS])
def test_weights(kind, x, held, says):
    with pytest.raises(ValueError, match=says):
        call(kind, x, held)


def test_no_kernel_for_the_device(monkeypatch):
    monkeypatch.setattr("qpass_kernels.launch.interpreting", lambda: False)
    with pytest.raises(ValueError, match="w8a8_linear: its kernel runs on CUDA devices, or interpreted"):
        matmul.check_device("w8a8_linear", torch.zeros(1))
