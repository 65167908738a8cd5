"""The argument blocks of the native kernels: the same fields in the same order as the structs in src/."""

from __future__ import annotations

import ctypes

import torch

POINTER, INT64, INT32, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
STRIDES = INT64 * 3
OUT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}
ACTIVATIONS = ("", "relu", "gelu", "gelu_tanh", "silu")  # index: enum Activation of src/simd.h
MASKS = {torch.bool: 1, torch.float32: 2, torch.bfloat16: 3}  # enum Mask of src/attention.cpp


class Linear(ctypes.Structure):
    """struct Linear of src/linear.cpp."""

    _fields_ = (
        *((name, POINTER) for name in ("x", "w", "alpha", "beta", "row_scale", "offset", "row_zero", "other", "out")),
        *((name, INT64) for name in ("m", "n", "k", "ldx", "ld_other", "ld_out")),
        *((name, INT32) for name in ("act", "out_type", "other_type", "threads")),
        ("out_inverse", FLOAT),
        ("out_zero", FLOAT),
    )


class Attention(ctypes.Structure):
    """struct Attention of src/attention.cpp."""

    _fields_ = (
        *((name, POINTER) for name in ("q", "k", "v", "mask", "out", "mul", "add")),
        *((name, INT64) for name in ("batch", "heads", "kv_heads", "queries", "keys", "width", "out_width")),
        *((name, STRIDES) for name in ("q_stride", "k_stride", "v_stride", "mask_stride", "out_stride")),
        *((name, INT32) for name in ("mask_type", "causal", "to_u8", "threads")),
        ("scale", FLOAT),
    )
