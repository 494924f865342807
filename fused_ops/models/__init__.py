"""Whole models on this package's ops, one file each."""

from fused_ops.models.attention import Attention, AttentionConfig
from fused_ops.models.cnn import CNN, CNNConfig
from fused_ops.models.rnn import RNN, RNNConfig
