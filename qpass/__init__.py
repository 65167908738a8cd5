"""qpass: a quantizing compiler for PyTorch."""
from qpass import ops as _ops
from qpass.api import analyze, compile
