"""The argument blocks of the native kernels: the same fields in the same order as the structs in src/.

A block is packed to bytes for each call, which is quicker than to fill in a structure and lets threads share a graph.
"""

from __future__ import annotations

import struct

import torch

# P pointer, q int64, i int32, f float32; native alignment
LINEAR = struct.Struct("9P 6q 5i 2f")  # src/linear.cpp
ATTENTION = struct.Struct("7P 7q 15q 4i f")  # src/attention.cpp
NORM = struct.Struct("9P 2q 2i f")  # src/norm.cpp
CONV = struct.Struct("10P 23q 8i 7f")  # src/conv.cpp
IMAGE = struct.Struct("2P 3q i 3f")  # src/image.cpp
POOL = struct.Struct("2P 20q i")  # src/pool.cpp
# src/chain.cpp: kind, three places of three numbers each, one of the blocks above as C rounds the largest up
STEP = struct.Struct(f"q 9q {-(-CONV.size // 8) * 8}s")

OUT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}  # enum Type of src/epilogue.h
ACTIVATIONS = ("", "relu", "gelu", "gelu_tanh", "silu")  # index: enum Activation of src/simd.h
CONV_ACTIVATIONS = (
    *("", "relu", "gelu", "gelu_tanh", "silu", "relu6", "hardswish", "hardsigmoid", "sigmoid", "prelu", "cap"),
)  # index: enum ConvActivation of src/epilogue.h
MASKS = {torch.bool: 1, torch.float32: 2, torch.bfloat16: 3}  # enum Mask of src/attention.cpp
