"""Kernels of our own for the cpu backend: C++ for AVX-512 VNNI and BF16, built on the machine they run on."""

from qpass.backends.native import conv_ops as conv_ops  # registers qpass::packed_conv
from qpass.backends.native import ops as ops  # registers qpass::packed_linear and qpass::attention
from qpass.backends.native import pool_ops as pool_ops  # registers qpass::packed_pool
from qpass.backends.native.build import has_attention, unavailable

__all__ = ["conv_ops", "has_attention", "ops", "pool_ops", "unavailable"]
