"""Registers every op: importing this module is enough."""

from qpass_kernels import act_quantize, layouts, norm_quantize, quantize, w4a8, w4a16, w8a8, w8a16

MODULES = (layouts, w8a8, w8a16, w4a16, w4a8, quantize, norm_quantize, act_quantize)
