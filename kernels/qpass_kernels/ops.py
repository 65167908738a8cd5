"""Registers every op: importing this module is enough."""

from qpass_kernels import (
    act_quantize,
    conv,
    conv_depthwise,
    conv_weights,
    launch,
    layouts,
    norm_quantize,
    pool,
    quantize,
    w4a8,
    w4a16,
    w8a8,
    w8a16,
)

LINEARS = (w8a8, w8a16, w4a16, w4a8)
QUANTIZES = (quantize, norm_quantize, act_quantize)
IMAGES = (conv, conv_depthwise, pool)
WEIGHTS = (layouts, conv_weights)
reserve = launch.reserve
