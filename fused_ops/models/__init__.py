"""Whole models on this package's ops, one file each."""

from fused_ops.models.attention import Attention, AttentionConfig
from fused_ops.models.bert import (
    BERT,
    BERTConfig,
    BERTForMaskedLM,
    BERTForQuestionAnswering,
    BERTForSequenceClassification,
)
from fused_ops.models.cnn import CNN, CNNConfig
from fused_ops.models.gpt import GPT, GPTConfig
from fused_ops.models.resnet import ResNet, ResNetConfig, resnet18, resnet34, resnet50, resnet101, resnet152
from fused_ops.models.rnn import RNN, RNNConfig
from fused_ops.models.transformer import Transformer, TransformerConfig
