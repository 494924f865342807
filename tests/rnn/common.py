"""Inputs of the RNN tests: a torch.nn module holds the parameters, `Case` the call."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fused_ops
from tests.support import randn

MODES = ("rnn_tanh", "rnn_relu", "gru", "lstm")
FUNCTIONS = {mode: getattr(fused_ops, mode) for mode in MODES}


@dataclass(frozen=True)
class Case:
    mode: str = "gru"
    time: int = 5
    batch: int = 3
    inputs: int = 4
    hidden: int = 6
    layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    batch_first: bool = False
    proj: int = 0
    dtype: torch.dtype = torch.float64

    def __str__(self) -> str:
        flags = [name for name in ("bidirectional", "batch_first") if getattr(self, name)]
        flags += [] if self.bias else ["nobias"]
        flags += [f"proj{self.proj}"] if self.proj else []
        sizes = f"T{self.time}B{self.batch}I{self.inputs}H{self.hidden}L{self.layers}"
        return "-".join([self.mode, sizes, *flags, str(self.dtype).removeprefix("torch.")])

    def to(self, dtype: torch.dtype) -> "Case":
        return replace(self, dtype=dtype)

    @property
    def cells(self) -> int:
        return self.layers * (2 if self.bidirectional else 1)

    def module(self) -> nn.RNNBase:
        """torch's own module with reproducible parameters, the same in every dtype up to rounding."""
        kind = {"gru": nn.GRU, "lstm": nn.LSTM}.get(self.mode, nn.RNN)
        extra = {"proj_size": self.proj} if self.mode == "lstm" else {}
        extra |= {"nonlinearity": self.mode.removeprefix("rnn_")} if kind is nn.RNN else {}
        module = kind(
            self.inputs, self.hidden, self.layers, bias=self.bias, batch_first=self.batch_first,
            bidirectional=self.bidirectional, **extra,
        )  # fmt: skip
        with torch.no_grad():
            for i, param in enumerate(module.parameters()):
                param.copy_(randn(*param.shape, seed=100 + i) * (1.5 / self.hidden**0.5))
        return module.to(self.dtype)

    def input(self) -> Tensor:
        x = randn(self.time, self.batch, self.inputs, dtype=self.dtype, seed=1)
        return x.transpose(0, 1).contiguous() if self.batch_first else x

    def states(self) -> Tensor | tuple[Tensor, Tensor]:
        h = randn(self.cells, self.batch, self.proj or self.hidden, dtype=self.dtype, seed=2)
        if self.mode != "lstm":
            return h
        return h, randn(self.cells, self.batch, self.hidden, dtype=self.dtype, seed=3)

    def run(self, input: Tensor, hx, params, **keywords):
        """The public function, flat: (output, h_n[, c_n], ...)."""
        return FUNCTIONS[self.mode](
            input,
            hx,
            list(params),
            self.bias,
            self.layers,
            0.0,
            False,
            self.bidirectional,
            self.batch_first,
            **keywords,
        )

    def tensors(self, requires_grad: bool = False) -> list[Tensor]:
        """input, states and parameters as one flat list of leaves, for `flat`."""
        hx = self.states()
        states = list(hx) if self.mode == "lstm" else [hx]
        found = [self.input(), *states, *self.module().parameters()]
        return [t.detach().clone().requires_grad_(requires_grad) for t in found]

    def flat(self, *tensors: Tensor, **keywords):
        """`run` on the list that `tensors` makes."""
        count = 2 if self.mode == "lstm" else 1
        states = tensors[1 : 1 + count]
        return self.run(tensors[0], states if count == 2 else states[0], tensors[1 + count :], **keywords)


def flat(result) -> list[Tensor]:
    """A module's (output, h_n) or (output, (h_n, c_n)) as a list."""
    output, states = result[0], result[1]
    return [output, *(states if isinstance(states, tuple) else (states,)), *result[2:]]


def torch_with_lengths(case: Case, module: nn.RNNBase, input: Tensor, hx, lengths: Tensor) -> list[Tensor]:
    """What PyTorch makes of rows of these lengths (all ≥ 1), by way of a PackedSequence."""
    packed = pack_padded_sequence(input, lengths, case.batch_first, enforce_sorted=False)
    output, states = module(packed, hx)
    output = pad_packed_sequence(output, case.batch_first, total_length=case.time)[0]
    return flat((output, states))


def poisoned(case: Case, input: Tensor, lengths: Tensor) -> Tensor:
    """`input` with NaN in its padding."""
    past = torch.arange(case.time)[:, None] >= lengths
    past = past.T if case.batch_first else past
    return input.masked_fill(past[..., None], float("nan"))
