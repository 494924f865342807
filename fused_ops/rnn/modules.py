"""torch.nn's recurrent modules on this package's functions: same constructors, parameters, errors and results."""

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fused_ops.core.errors import EXPLAINED, ArgumentError
from fused_ops.rnn import functional
from fused_ops.rnn.checks import check_noise
from fused_ops.rnn.noise import Noise
from fused_ops.rnn.reference import Static

_FUNCTIONS = {
    "RNN_TANH": functional.rnn_tanh,
    "RNN_RELU": functional.rnn_relu,
    "GRU": functional.gru,
    "LSTM": functional.lstm,
}


_EXTRAS = {"layer_norm": False, "zoneout": 0.0, "weight_dropout": 0.0, "variational_dropout": 0.0}


class _Recurrent(nn.RNNBase):
    """What RNN, GRU and LSTM share; from RNNBase, because Dynamo refuses every instance of torch.nn's three."""

    # Also those of a torch.nn module that became one of these by a change of class.
    layer_norm = False
    zoneout = weight_dropout = variational_dropout = 0.0

    def __init__(self, *args, layer_norm=False, zoneout=0.0, weight_dropout=0.0, variational_dropout=0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.layer_norm, self.zoneout = layer_norm, zoneout
        self.weight_dropout, self.variational_dropout = weight_dropout, variational_dropout
        check_noise(self._noise(), self._static())
        if layer_norm:
            self._add_norms()

    def _add_norms(self) -> None:
        """norm_ih, norm_hh[, norm_c, bias_c] of each cell, after its other parameters."""
        sizes = {"norm_ih": self.weight_ih_l0.size(0), "norm_hh": self.weight_ih_l0.size(0)}
        if self.mode == "LSTM":
            sizes |= {"norm_c": self.hidden_size, "bias_c": self.hidden_size}
        names = []
        for cell in self._all_weights:
            suffix = cell[0].removeprefix("weight_ih")
            for name, size in sizes.items():
                setattr(self, name + suffix, nn.Parameter(self.weight_ih_l0.new_empty(size)))
            names.append([*cell, *(name + suffix for name in sizes)])
        self._all_weights = names
        self._flat_weights_names = [name for cell in names for name in cell]
        self._parameters = {name: self._parameters[name] for name in self._flat_weights_names}
        self._init_flat_weights()
        self._reset_norms()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._reset_norms()

    def _reset_norms(self) -> None:
        for name, param in self.named_parameters(recurse=False):
            if name.startswith(("norm_", "bias_c_")):
                nn.init.constant_(param, float(name.startswith("norm_")))

    def flatten_parameters(self) -> None:
        """As torch.nn's, for cuDNN, which knows no layer norm."""
        if not self.layer_norm:
            super().flatten_parameters()

    def extra_repr(self) -> str:
        extras = [f"{name}={getattr(self, name)}" for name, off in _EXTRAS.items() if getattr(self, name) != off]
        return ", ".join([super().extra_repr(), *extras])

    def _static(self) -> Static:
        name = _FUNCTIONS[self.mode].__name__
        return Static(name, self.bias, self.num_layers, self.bidirectional, layer_norm=self.layer_norm)

    def _noise(self) -> Noise:
        return Noise(self.training, self.dropout, self.zoneout, self.weight_dropout, self.variational_dropout)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx=None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        return_all_states: bool = False,
    ):
        """As the torch.nn module's, and `lengths`, `resets` and `return_all_states` as in `fused_ops.gru`.

        Args:
            input: (time, batch, features), (batch, time, features) if batch_first, (time, features), or a
                PackedSequence.
            hx: h_0 (LSTM: (h_0, c_0)), (layers·directions, batch, hidden), or without batch like input. Default: zeros.
            lengths: (batch,); not with a PackedSequence, which has its own.
            resets: input's layout without features; that of `pad_packed_sequence` for a PackedSequence.

        Returns:
            (output, h_n) or (output, (h_n, c_n)), followed by h_all[, c_all] if return_all_states.
        """
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ArgumentError("lengths", "None with a PackedSequence", f"shape {tuple(lengths.shape)}")
            if resets is None and not return_all_states:
                return self._packed(input, hx)
            return self._padded(input, hx, resets, return_all_states)
        if input.dim() not in (2, 3):
            kind = self.mode.split("_")[0]
            got = f"{input.dim()}D tensor" if kind == "RNN" else f"{input.dim()}D"
            raise ValueError(f"{kind}: Expected input to be 2D or 3D, got {got} instead")
        batched, axis = input.dim() == 3, 0 if self.batch_first else 1
        self._check_states(hx, batched)
        if not batched:
            input = input.unsqueeze(axis)
            hx = self._each(hx, lambda state: state.unsqueeze(1))
            resets = resets if resets is None else resets.unsqueeze(axis)
            lengths = lengths if lengths is None else lengths.reshape(-1)
        hx = self._states(input, input.size(axis)) if hx is None else hx
        how = {"lengths": lengths, "resets": resets, "return_all_states": return_all_states}
        try:
            output, *states = self._function(input, hx, batch_first=self.batch_first, **how)
        except EXPLAINED:
            self.check_forward_args(input, hx, None)  # in torch's words, if it would have refused
            raise
        if not batched:
            count = 2 if self.mode == "LSTM" else 1
            output = output.squeeze(axis)
            states = [state.squeeze(1 if i < count else 2) for i, state in enumerate(states)]
        return self._result(output, states)

    def _function(self, input: Tensor, hx, **keywords):
        batch_first = keywords.pop("batch_first")
        return _FUNCTIONS[self.mode](
            input, hx, self._weights(), self.bias, self.num_layers, self.dropout, self.training, self.bidirectional,
            batch_first, layer_norm=self.layer_norm, zoneout=self.zoneout, weight_dropout=self.weight_dropout,
            variational_dropout=self.variational_dropout, **keywords,
        )  # fmt: skip

    def _packed(self, input: PackedSequence, hx):
        data, batch_sizes, sorted_indices, unsorted_indices = input
        hx = self._states(data, int(batch_sizes[0])) if hx is None else self.permute_hidden(hx, sorted_indices)
        self.check_forward_args(data, hx, batch_sizes)
        weights, static, noise = self._weights(), self._static(), self._noise()
        output, *states = functional.packed_sequence(data, batch_sizes, hx, weights, static, noise)
        output = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        hidden = tuple(states) if self.mode == "LSTM" else states[0]
        return output, self.permute_hidden(hidden, unsorted_indices)

    def _padded(self, input: PackedSequence, hx, resets, return_all_states: bool):
        """A PackedSequence with what torch's packed op does not know: padded, run by lengths, packed again."""
        padded, lengths = pad_packed_sequence(input, self.batch_first)
        output, *rest = self(padded, hx, lengths=lengths, resets=resets, return_all_states=return_all_states)
        if input.sorted_indices is None:
            return pack_padded_sequence(output, lengths, self.batch_first), *rest
        order = input.sorted_indices
        output = output.index_select(0 if self.batch_first else 1, order)
        packed = pack_padded_sequence(output, lengths[order.cpu()], self.batch_first)
        return PackedSequence(packed.data, packed.batch_sizes, order, input.unsorted_indices), *rest

    def _result(self, output, states: list[Tensor]):
        if self.mode == "LSTM":
            return output, (states[0], states[1]), *states[2:]
        return output, *states

    def _weights(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._flat_weights_names]

    def _states(self, input: Tensor, batch: int):
        layers = self.num_layers * (2 if self.bidirectional else 1)
        h = input.new_zeros(layers, batch, self.proj_size or self.hidden_size)
        return (h, input.new_zeros(layers, batch, self.hidden_size)) if self.mode == "LSTM" else h

    def _each(self, hx, function):
        if hx is None:
            return None
        return tuple(function(state) for state in hx) if self.mode == "LSTM" else function(hx)

    def _check_states(self, hx, batched: bool) -> None:
        dims = 3 if batched else 2
        kind = f"{'batched' if batched else 'unbatched'} {dims}-D input"
        if hx is None:
            return
        if self.mode == "LSTM":
            if hx[0].dim() != dims or hx[1].dim() != dims:
                raise RuntimeError(
                    f"For {kind}, hx and cx should also be {dims}-D but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
                )
        elif hx.dim() != dims:
            raise RuntimeError(f"For {kind}, hx should also be {dims}-D but got {hx.dim()}-D tensor")


class RNN(_Recurrent):
    """`torch.nn.RNN`, h_t = tanh(W_ih·x_t + b_ih + W_hh·h_{t−1} + b_hh) or ReLU; see `fused_ops.rnn_tanh`.

    Keyword-only beside torch's: layer_norm, zoneout, weight_dropout, variational_dropout. With layer_norm the
    parameters norm_ih_l{k}[_reverse] and norm_hh_l{k}[_reverse] (gates·hidden,) start as ones.
    """

    def __init__(self, *args, **kwargs):
        _refuse_projection(kwargs)
        if len(args) > 3:
            self.nonlinearity, args = args[3], (*args[:3], *args[4:])
        else:
            self.nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if self.nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{self.nonlinearity}'. Select from 'tanh' or 'relu'.")
        super().__init__(f"RNN_{self.nonlinearity.upper()}", *args, **kwargs)


class GRU(_Recurrent):
    """`torch.nn.GRU`, h_t = (1 − z)·n + z·h_{t−1}; see `fused_ops.gru`. Further arguments as for `RNN`."""

    def __init__(self, *args, **kwargs):
        _refuse_projection(kwargs)
        super().__init__("GRU", *args, **kwargs)


class LSTM(_Recurrent):
    """`torch.nn.LSTM`, c_t = f·c_{t−1} + i·g, h_t = o·tanh(c_t); see `fused_ops.lstm`.

    Further arguments as for `RNN`; zoneout may be a pair (for h, for c), and layer_norm also adds the parameters
    norm_c_l{k}[_reverse], ones, and bias_c_l{k}[_reverse], zeros (hidden,).
    """

    def __init__(self, *args, **kwargs):
        super().__init__("LSTM", *args, **kwargs)

    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args
    permute_hidden = nn.LSTM.permute_hidden


def _refuse_projection(kwargs: dict) -> None:
    if "proj_size" in kwargs:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")


def _check_dims(cell: str, input: Tensor, states: tuple[tuple[str, Tensor], ...]) -> None:
    for name, tensor in (("input", input), *states):
        if tensor.dim() not in (1, 2):
            raise ValueError(f"{cell}: Expected {name} to be 1D or 2D, got {tensor.dim()}D instead")


def _zeros(cell: nn.Module, input: Tensor) -> Tensor:
    return input.new_zeros(*input.shape[:-1], cell.hidden_size)


class RNNCell(nn.RNNCell):
    """`torch.nn.RNNCell`, h' = tanh(W_ih·x + b_ih + W_hh·h + b_hh) or ReLU; see `fused_ops.rnn_tanh_cell`."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        _check_dims("RNNCell", input, () if hx is None else (("hidden", hx),))
        functions = {"tanh": functional.rnn_tanh_cell, "relu": functional.rnn_relu_cell}
        if self.nonlinearity not in functions:
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        hx = _zeros(self, input) if hx is None else hx
        return functions[self.nonlinearity](input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)


class GRUCell(nn.GRUCell):
    """`torch.nn.GRUCell`, h' = (1 − z)·n + z·h; see `fused_ops.gru_cell`."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        _check_dims("GRUCell", input, () if hx is None else (("hidden", hx),))
        hx = _zeros(self, input) if hx is None else hx
        return functional.gru_cell(input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)


class LSTMCell(nn.LSTMCell):
    """`torch.nn.LSTMCell`, c' = f·c + i·g, h' = o·tanh(c'); see `fused_ops.lstm_cell`."""

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        _check_dims("LSTMCell", input, () if hx is None else tuple((f"hx[{i}]", state) for i, state in enumerate(hx)))
        hx = (_zeros(self, input), _zeros(self, input)) if hx is None else hx
        return functional.lstm_cell(input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
