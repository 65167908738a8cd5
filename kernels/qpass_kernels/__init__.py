"""Triton kernels of qpass. Imports torch and triton only; nothing here is imported unless a CUDA device runs it."""
