"""Triton kernels of qpass: quantized matmul, convolution and the quantize in front of them, for CUDA.

Imports torch and triton only, and needs no GPU to be imported. `import qpass_kernels.ops` registers the ops
(`torch.ops.qpass_kernels`): kernels on CUDA, references in plain torch on CPU.
"""
