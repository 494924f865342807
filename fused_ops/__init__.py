"""Fused attention, convolution and RNN kernels for PyTorch."""

from fused_ops import nn
from fused_ops.attention.functional import decode_attention, scaled_dot_product_attention, varlen_attention
from fused_ops.conv.functional import batch_norm_act, causal_conv1d, conv1d, conv2d, max_pool2d
from fused_ops.convert import convert
from fused_ops.core.dispatch import explain, use_backend
from fused_ops.core.errors import BackendUnavailable
from fused_ops.fuse import fuse, unfuse
from fused_ops.integrations import dtensor as _dtensor  # its sharding rules
from fused_ops.rnn.functional import (
    gru,
    gru_cell,
    lstm,
    lstm_cell,
    rnn_relu,
    rnn_relu_cell,
    rnn_tanh,
    rnn_tanh_cell,
)
