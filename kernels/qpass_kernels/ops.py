"""Registers every op: importing this module is enough."""

from qpass_kernels import w4a8, w4a16, w8a8, w8a16

MODULES = (w8a8, w8a16, w4a16, w4a8)
