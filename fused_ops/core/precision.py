"""float32 follows torch's own precision switches, per family."""

import torch


def _dot_precision(setting: str) -> str:
    return "tf32" if setting == "tf32" else "ieee"


def matmul_dot_precision() -> str:
    """Triton's `input_precision` for float32 in attention and RNN: as `torch.backends.cuda.matmul` says."""
    return _dot_precision(torch.backends.cuda.matmul.fp32_precision)


def convolution_dot_precision() -> str:
    """Triton's `input_precision` for float32 in convolution: as `torch.backends.cudnn.conv` says."""
    return _dot_precision(torch.backends.cudnn.conv.fp32_precision)
