"""A sequence classifier: a recurrent network whose last state is classified."""

from dataclasses import dataclass

from torch import Tensor, nn

import fused_ops
from fused_ops.models.checks import check_choice, check_shape

_KINDS = {"lstm": fused_ops.nn.LSTM, "gru": fused_ops.nn.GRU, "rnn": fused_ops.nn.RNN}


@dataclass(frozen=True)
class RNNConfig:
    """Sizes of an `RNN`. `kind` is "lstm", "gru" or "rnn" (tanh)."""

    input_size: int
    hidden_size: int
    num_layers: int
    num_classes: int
    kind: str = "lstm"
    dropout: float = 0.0

    def __post_init__(self):
        check_choice("kind", self.kind, _KINDS)


class RNN(nn.Module):
    """logits = W·h_T + b, h_T the top layer's state after the last step of a sequence.

    Args:
        input_size: features of a step.
        hidden_size, num_layers: of the recurrent network.
        num_classes: length of the logits.
        config: `kind` ("lstm" by default, "gru", "rnn") and `dropout` (between layers, 0 by default), by keyword.

    Raises:
        ValueError: `kind` is unknown, the input has another shape; what `fused_ops.nn.LSTM` finds wrong with them.

    Source: Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000.
    """

    def __init__(self, input_size: int, hidden_size: int, num_layers: int, num_classes: int, **config):
        super().__init__()
        self.config = config = RNNConfig(input_size, hidden_size, num_layers, num_classes, **config)
        self.rnn = _KINDS[config.kind](input_size, hidden_size, num_layers, batch_first=True, dropout=config.dropout)
        self.fc = nn.Linear(hidden_size, num_classes)

    def forward(self, input: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(batch, time, input_size) -> logits (batch, num_classes).

        lengths: (batch,), steps of each sequence; what lies past them is not read. Default: all.
        """
        check_shape("input", input, "batch", "time", self.config.input_size)
        states = self.rnn(input, lengths=lengths)[1]
        h_n = states[0] if isinstance(states, tuple) else states
        return self.fc(h_n.select(0, -1))
