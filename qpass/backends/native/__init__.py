"""Kernels of our own for the cpu backend: C++ for AVX-512 VNNI and BF16, built on the machine they run on."""

from qpass.backends.native import conv_ops as conv_ops
from qpass.backends.native import ops as ops  # registers qpass::packed_linear and qpass::attention
from qpass.backends.native import stored as stored
from qpass.backends.native.build import has_attention, unavailable

__all__ = ["conv_ops", "has_attention", "ops", "stored", "unavailable"]
