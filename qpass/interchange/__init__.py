"""Compiled models for other programs: .pt2, ONNX, compressed-tensors; one file a format."""
