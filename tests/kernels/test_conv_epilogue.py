"""What the convolution kernel does with its sums: activations, residuals, types; and the arguments it refuses."""

import pytest
import torch

from qpass import conv_ops
from qpass_kernels import conv
from qpass_kernels.activations import NAMES
from qpass_kernels.conv_finish import SLOPED, Finish
from qpass_kernels.conv_weights import Window
from qpass_kernels.epilogue import OUTPUTS
from tests.kernels.images import check_same, codes, convolved, epilogue_case, problem, reference

EPILOGUES = (
    *(((act, "codes", torch.float32)) for act in (*NAMES, *SLOPED)),
    *(((act, "", torch.int8)) for act in (*NAMES, *SLOPED)),
    *((("relu", residual, dtype)) for residual in ("", "codes", "float32", "bfloat16", "float16") for dtype in OUTPUTS),
)


@pytest.mark.parametrize(("act", "residual", "dtype"), EPILOGUES, ids=str)
def test_epilogues(act, residual, dtype):
    (x, weight, window, groups), held = problem((3, 8, 7, 9, 7, (3, 3), (2, 2), (1, 1), (1, 1), 1), 5)
    after = epilogue_case(act, residual, dtype)
    expected = reference(*held, window, after, groups)
    check_same(conv.convolve(*held, window, after, groups), expected)
    real = convolved(x.double() - 5, weight.double(), window, groups) * after.alpha.double()[:, None, None]
    real = real + after.beta.double()[:, None, None]
    if residual:
        other = after.other.double()
        real = real + ((other + 7) * 0.03 if residual == "codes" else other)
    real = conv_ops.activate(real, act, after.slope)
    if dtype == torch.int8:
        real = (torch.round(real / 0.05) - 20).clamp(-128, 127)
    elif dtype == torch.float8_e4m3fn:
        real = (real / 0.01).clamp(-448, 448).float()
    check_same(real.to(dtype).contiguous(memory_format=torch.channels_last), expected)


ONES = torch.ones(7)
BAD = (
    ({"x": torch.randn(1, 16, 5, 5)}, "both int8 or float8_e4m3fn, not .*float32 and torch.int8"),
    ({"x": codes(16, 5, 5)}, r"x must be \[B, C, H, W\].*\(16, 5, 5\)"),
    ({"x": codes(1, 24, 5, 5)}, "of 24 channels has 216 values, not 144"),
    ({"x": codes(1, 16, 0, 5)}, "does not fit on an image of 0 x 5"),
    ({"x": codes(1, 0, 5, 5)}, "1 groups do not divide 0 channels and 7 outputs"),
    ({"weight": codes(144, 7).t()}, "weight must be contiguous"),
    ({"groups": 2}, "2 groups do not divide 16 channels and 7 outputs"),
    ({"correction": torch.zeros(9, 7, dtype=torch.int32)}, "correction must have 343 elements, not 63"),
    ({"correction": torch.zeros(49, 7)}, "correction must be torch.int32, not torch.float32"),
    ({"correction": torch.zeros(7, 49, dtype=torch.int32)}, "correction must have 49 rows, of int8, not 7"),
    ({"window": Window((3,), (1, 1), (1, 1), (1, 1))}, r"kernel must be 2 numbers from 1 on, not \[3\]"),
    ({"window": Window((3, 3), (1, 1), (1, -1), (1, 1))}, r"padding must be 2 or 4 numbers from 0 on, not \[1, -1\]"),
    ({"window": Window((3, 3), (0, 1), (1, 1), (1, 1))}, "stride must be 2 numbers from 1 on"),
    ({"window": Window((3, 3), (1, 1), (1, 1), (5, 1))}, "does not fit on an image of 5 x 5"),
    ({"after": Finish(torch.ones(8))}, "alpha must have 7 elements, not 8"),
    ({"after": Finish(ONES, act="prelu")}, "prelu and cap need slope"),
    ({"after": Finish(ONES, act="relu", slope=ONES)}, "prelu and cap need slope, .*: activation 'relu'"),
    ({"after": Finish(ONES, act="cap", slope=torch.ones(2))}, "slope must have 7 elements, not 2"),
    ({"after": Finish(ONES, act="tanh")}, "activation 'tanh' is not one of"),
    ({"after": Finish(ONES, other=torch.ones(1, 7, 5, 4))}, r"other must be \(1, 7, 5, 5\), not \(1, 7, 5, 4\)"),
    (
        {"after": Finish(ONES, other=codes(1, 7, 5, 5).int())},
        "other must be float32, bfloat16 or float16, not torch.int32",
    ),
    ({"after": Finish(ONES, other=codes(1, 7, 5, 5), other_scale=0.0)}, "codes as other must be on cpu .* 0.0 and 0"),
    ({"after": Finish(ONES, out_dtype=torch.int32)}, "writes .* not torch.int32"),
)


@pytest.mark.parametrize(("changes", "says"), BAD, ids=[says[:30] for _, says in BAD])
def test_bad_input(changes, says):
    fits = {"x": codes(1, 16, 5, 5), "weight": codes(7, 144), "correction": None, "groups": 1}
    held = {**fits, "window": Window((3, 3), (1, 1), (1, 1), (1, 1)), "after": Finish(ONES), **changes}
    for run in (conv.convolve, reference):
        with pytest.raises(ValueError, match=f"conv2d: .*{says}"):
            run(*(held[name] for name in ("x", "weight", "correction", "window", "after", "groups")))
