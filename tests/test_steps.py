"""Steps of weights in channels and groups, and GPTQ with them, against the plain algorithms."""

import pytest
import torch

from qpass import affine
from qpass.qparams import QParams
from qpass.qtype import QType, scale_shape
from qpass.solvers.gptq import damped, gptq
from qpass.solvers.rtn import round_to_nearest
from qpass.solvers.steps import best_qparams, squared_error


@pytest.mark.parametrize("qtype", ["i4/c0", "u4/c0", "i2/g8", "u3/g8", "i4/g24", "i8/c0", "u6/g3"])
def test_steps_are_no_worse_than_those_of_the_largest_weight(qtype):
    qtype, weight = QType.parse(qtype), torch.randn(7, 24) ** 3
    found = best_qparams(weight, qtype).check()
    widest = affine.choose_qparams(*affine.limits(weight, qtype), qtype)
    assert found.scale.shape == scale_shape(qtype, weight.shape)
    assert bool((squared_error(weight, found) <= squared_error(weight, widest)).all())
    if qtype.bits == 8:
        assert torch.equal(found.scale, widest.scale)


@pytest.mark.parametrize("value", [0.0, 1e-38, 3.0])
def test_constant_weights_have_usable_steps(value):
    for qtype in ("i4/c0", "u4/g4", "u2/c0"):
        packed = round_to_nearest(torch.full((3, 8), value), QType.parse(qtype))
        QParams(packed.scale, packed.zero, packed.type).check()
        found = affine.dequantize(packed.data, packed.scale, packed.zero, packed.type)
        torch.testing.assert_close(found, torch.full((3, 8), value), rtol=1e-5, atol=1e-37)


def naive_gptq(weight, covariance, params):
    """Column by column with a full update each, in float64."""
    order = covariance.diagonal().argsort(descending=True)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(covariance)[order][:, order]), upper=True)
    scale = affine.expand(params.scale, params.type, 2).double().expand_as(weight)[:, order]
    zero = torch.zeros_like(scale)
    if params.zero is not None:
        zero = affine.expand(params.zero, params.type, 2).double().expand_as(weight)[:, order]
    work, codes = weight.double()[:, order].clone(), torch.zeros(weight.shape)
    for j in range(work.shape[1]):
        code = ((work[:, j] / scale[:, j]).round() + zero[:, j]).clamp(params.type.qmin, params.type.qmax)
        codes[:, j] = code
        off = (work[:, j] - (code - zero[:, j]) * scale[:, j]) / upper[j, j]
        work[:, j + 1 :] -= off[:, None] * upper[j, j + 1 :]
    return codes[:, order.argsort()]


@pytest.mark.parametrize("qtype", ["i4/c0", "u4/c0", "i4/g5", "u3/g15", "i8/c0"])
def test_gptq_is_the_plain_algorithm(qtype):
    x = torch.randn(400, 150) @ torch.randn(150, 150)
    weight, covariance = torch.randn(9, 150), (x.t() @ x).double() / 400
    params = best_qparams(weight, QType.parse(qtype))
    codes = gptq(weight, covariance, params)
    assert codes.dtype == params.type.storage
    same = codes.float() == naive_gptq(weight, covariance, params)
    assert float(same.float().mean()) > 0.97  # a float32 sum on the edge of two codes may fall on either side

    def lost(q):
        off = (affine.dequantize(q, params.scale, params.zero, params.type) - weight).double()
        return float((off @ covariance * off).sum())

    assert lost(codes) < lost(affine.quantize(weight, params.scale, params.zero, params.type))
