"""Every module of the package: drop-in subclasses of torch.nn's, and fused blocks."""

from fused_ops.attention.modules import (
    MultiheadAttention,
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)
from fused_ops.conv.modules import BatchNormAct2d, CausalConv1d, Conv1d, Conv2d, ConvBNAct2d
from fused_ops.rnn.modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
