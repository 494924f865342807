"""Swaps fused modules into a model somebody else wrote, in place, and takes them out again."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from fused_ops import nn as fused
from fused_ops.conv.modules import ConvSequential, fusible_chains
from fused_ops.core.dispatch import OPS

# Only exact types are swapped: a subclass may mean something else by forward.
_LEAVES: dict[type, tuple[type, tuple[str, ...]]] = {
    nn.RNN: (fused.RNN, ("rnn_tanh", "rnn_relu")),
    nn.GRU: (fused.GRU, ("gru",)),
    nn.LSTM: (fused.LSTM, ("lstm",)),
    nn.RNNCell: (fused.RNNCell, ("rnn_tanh_cell", "rnn_relu_cell")),
    nn.GRUCell: (fused.GRUCell, ("gru_cell",)),
    nn.LSTMCell: (fused.LSTMCell, ("lstm_cell",)),
    nn.MultiheadAttention: (fused.MultiheadAttention, ("scaled_dot_product_attention",)),
    nn.Conv1d: (fused.Conv1d, ("conv1d",)),
    nn.Conv2d: (fused.Conv2d, ("conv2d",)),
}
_ORIGINAL = "_fused_ops_original"


@dataclass(frozen=True)
class Row:
    """One module: what it was, what it became (None: left alone), the backends it may use, and why."""

    fqn: str
    old: type
    new: type | None
    backend: str
    reason: str


class Report(tuple):
    """The rows of one `fuse` call; printing it gives a table."""

    def __str__(self) -> str:
        if not self:
            return "fuse: nothing to fuse"
        cells = [("module", "was", "is", "backends", "why")]
        for row in self:
            new = row.new.__name__ if row.new else "left alone"
            cells.append((row.fqn or "(the model)", row.old.__name__, new, row.backend, row.reason))
        widths = [max(len(line[column]) for line in cells) for column in range(5)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells)

    __repr__ = __str__


def fuse(model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None) -> Report:
    """Replace torch.nn modules inside `model` by their fused twins, in place; `unfuse` reverses it.

    RNNs, cells, MultiheadAttention and lone convolutions change their class; an nn.Sequential that holds
    convolution + batch norm + activation runs these as one op in eval mode. Parameters, names, hooks and state_dict
    stay as they are. Only exact torch.nn types are touched; parametrised and sharded (FSDP) modules are not.

    Args:
        filter_fn: (module, fully qualified name) -> whether the module may be changed; default: all may.

    Returns:
        A `Report` with a `Row` for every module changed, and for those left alone although their type is known.

    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    rows: list[Row] = []
    inside_chain: set[int] = set()
    for fqn, module in model.named_modules():
        if id(module) in inside_chain or (filter_fn is not None and not filter_fn(module, fqn)):
            continue
        row = _fuse_one(fqn, module, inside_chain)
        if row is not None:
            rows.append(row)
    return Report(rows)


def _fuse_one(fqn: str, module: nn.Module, inside_chain: set[int]) -> Row | None:
    old = type(module)
    if old in (nn.Sequential, ConvSequential):
        children, chains = list(module), fusible_chains(module)
        inside_chain.update(id(child) for start, stop in chains for child in children[start:stop])
        if not chains or old is ConvSequential:
            return None
        parts = ["+".join(type(child).__name__ for child in children[start:stop]) for start, stop in chains]
        return _swap(fqn, module, ConvSequential, ("conv2d",), ", ".join(parts))
    if old in _LEAVES:
        return _swap(fqn, module, *_LEAVES[old], "same parameters, fused forward")
    base = next((known for known in _LEAVES if isinstance(module, known)), None)
    if base is not None and not isinstance(module, tuple(new for new, _ in _LEAVES.values())):
        why = (
            "sharded: fuse before fully_shard" if old.__name__.startswith("FSDP") else f"a subclass of {base.__name__}"
        )
        return Row(fqn, old, None, "", why)
    return None


def _swap(fqn: str, module: nn.Module, new: type, ops: tuple[str, ...], reason: str) -> Row:
    old = type(module)
    module.__dict__[_ORIGINAL] = old
    module.__class__ = new
    backends = dict.fromkeys(name for op in ops for name in OPS[op].by_name)
    return Row(fqn, old, new, ", ".join(backends), reason)


def unfuse(model: nn.Module) -> nn.Module:
    """Give every module that `fuse` changed its class back, in place. Returns `model`."""
    for module in model.modules():
        if _ORIGINAL in module.__dict__:
            module.__class__ = module.__dict__.pop(_ORIGINAL)
    return model
