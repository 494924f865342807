"""Fused attention, convolution and RNN kernels for PyTorch."""

from fused_ops.attention.functional import scaled_dot_product_attention
from fused_ops.core.dispatch import explain, use_backend
from fused_ops.core.errors import BackendUnavailable
