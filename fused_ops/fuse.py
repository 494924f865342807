"""Swaps fused modules into a model somebody else wrote, in place, and takes them out again."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from fused_ops import chains, plans
from fused_ops import nn as fused
from fused_ops.core.dispatch import OPS
from fused_ops.tracing import watched

# Only exact types are swapped: a subclass may mean something else by forward.
LEAVES: dict[type, tuple[type, tuple[str, ...]]] = {
    nn.RNN: (fused.RNN, ("rnn_tanh", "rnn_relu")),
    nn.GRU: (fused.GRU, ("gru",)),
    nn.LSTM: (fused.LSTM, ("lstm",)),
    nn.RNNCell: (fused.RNNCell, ("rnn_tanh_cell", "rnn_relu_cell")),
    nn.GRUCell: (fused.GRUCell, ("gru_cell",)),
    nn.LSTMCell: (fused.LSTMCell, ("lstm_cell",)),
    nn.MultiheadAttention: (fused.MultiheadAttention, ("scaled_dot_product_attention",)),
    nn.TransformerEncoderLayer: (fused.TransformerEncoderLayer, ("scaled_dot_product_attention", "varlen_attention")),
    nn.TransformerDecoderLayer: (fused.TransformerDecoderLayer, ("scaled_dot_product_attention",)),
    nn.TransformerEncoder: (fused.TransformerEncoder, ("scaled_dot_product_attention", "varlen_attention")),
    nn.TransformerDecoder: (fused.TransformerDecoder, ("scaled_dot_product_attention",)),
    nn.Transformer: (fused.Transformer, ("scaled_dot_product_attention",)),
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
    """Make a model that somebody else wrote run on this package's ops, in place; `unfuse` reverses it.

    RNNs, cells, MultiheadAttention and convolutions change their class. A module whose forward runs convolution + batch
    norm + residual + activation one after the other, as modules or as functions, gets a forward that runs them as one
    op in evaluation without gradients, and otherwise does what its own did; see `fused_ops.chains`. Parameters, names,
    hooks, state_dict, copies and pickles stay what they are. Only exact torch.nn types are touched; parametrised and
    sharded (FSDP) modules are not.

    Args:
        filter_fn: (module, fully qualified name) -> whether the module may be changed; default: all may.

    Returns:
        A `Report` with a `Row` for every module changed, and for each that looks as if it could be and is left alone.

    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    allowed = [(fqn, module) for fqn, module in model.named_modules() if filter_fn is None or filter_fn(module, fqn)]
    rows, planned, inside_chain = [], [], set()
    with watched():
        for fqn, module in allowed:
            if isinstance(module, plans.FusedForward):
                inside_chain.update(plans.members(module))
            elif chains.has_candidates(module):
                found, refusals, parts = plans.plan(module)
                rows += [Row(fqn, type(module), None, "", reason) for reason in refusals]
                if found is not None:
                    planned.append((fqn, module, found, parts))
                    inside_chain.update(found.members)
    for fqn, module in allowed:
        row = None if module in inside_chain else _fuse_leaf(fqn, module)
        if row is not None:
            rows.append(row)
    rows += [_fuse_chains(fqn, module, found) for fqn, module, found, _ in planned]
    for _, module, found, parts in planned:  # what it depends on now is what its children have become
        plans.remember(module, found, parts)
    order = {fqn: place for place, (fqn, _) in enumerate(allowed)}
    return Report(sorted(rows, key=lambda row: (order[row.fqn], row.new is None)))


def _fuse_chains(fqn: str, module: nn.Module, found: plans.Plan) -> Row:
    old = type(module)
    module.__class__ = plans.fused_class(old)
    return Row(fqn, old, type(module), _backends("conv_bn_act2d"), ", ".join(found.names))


def _fuse_leaf(fqn: str, module: nn.Module) -> Row | None:
    old = type(module)
    if old in LEAVES and not chains.sharded(module):
        new, ops = LEAVES[old]
        module.__dict__[_ORIGINAL] = old
        module.__class__ = new
        return Row(fqn, old, new, _backends(*ops), "same parameters, fused forward")
    base = next((known for known in LEAVES if isinstance(module, known)), None)
    if base is not None and not isinstance(module, tuple(new for new, _ in LEAVES.values())):
        why = "sharded: fuse before fully_shard" if chains.sharded(module) else f"a subclass of {base.__name__}"
        return Row(fqn, old, None, "", why)
    return None


def _backends(*ops: str) -> str:
    return ", ".join(dict.fromkeys(name for op in ops for name in OPS[op].by_name))


def unfuse(model: nn.Module) -> nn.Module:
    """Give every module that `fuse` changed its class back, in place. Returns `model`."""
    for module in model.modules():
        plans.detach(module)
        if _ORIGINAL in module.__dict__:
            old = module.__dict__.pop(_ORIGINAL)
            module.__class__ = plans.without(type(module), LEAVES[old][0], old)
    return model
