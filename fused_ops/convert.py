"""Rebuilds a model of torch.nn modules out of this package's: their constructors, the same parameters."""

import copy
import inspect
import warnings
from collections import Counter
from contextlib import suppress

import torch
from torch import nn

from fused_ops import chains
from fused_ops import nn as fused
from fused_ops.conv import blocks
from fused_ops.fuse import LEAVES

_TWINS = {kind: new for old, (new, _) in LEAVES.items() for kind in (old, new)}
_RECURRENT = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
_ARGUMENTS = {fused.RNN: (*_RECURRENT, "nonlinearity"), fused.GRU: _RECURRENT, fused.LSTM: (*_RECURRENT, "proj_size")}
_LISTS = {"_flat_weights", "_flat_weight_refs"}  # of an RNN's parameters
_OWN = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", *_LISTS}  # not one object for old and new
_NOT_SETTINGS = {*vars(nn.Module()), *_LISTS}


def convert(module: nn.Module) -> nn.Module:
    """The model with `fused_ops.nn` modules in the place of torch.nn's: the same parameters, the same numbers.

    Each RNN, cell, MultiheadAttention, Transformer, Transformer layer or stack, Conv1d and Conv2d becomes what the
    constructor of its `fused_ops.nn` twin makes of its settings. In an nn.Sequential, which is taken to be called as a
    whole, Conv2d + BatchNorm2d [+ activation] becomes a ConvBNAct2d and BatchNorm2d + activation a BatchNormAct2d. As
    in `torch.ao.quantization.fuse_modules` these stand where their first module stood, with nn.Identity in the other
    places: length, indices and names stay. Of the state_dict's keys only `{conv}.*` and `{bn}.*` of a ConvBNAct2d
    change, to `{conv}.conv.*` and `{conv}.bn.*`.

    The new modules hold the very Parameters and buffers, hooks, mode and further attributes of the old: an optimizer
    made before goes on training them. A module in two places is one new module in both. Containers are changed in
    place; a reference to a replaced module from outside of the model stays one to the old.

    Left alone: what is not of an exact torch.nn type (subclasses, parametrized and lazy modules), is sharded, pruned or
    compiled, has a forward of its own, or was changed into what its constructor does not make. In an nn.Sequential,
    modules with hooks or in two places are not put together, nor what a ConvBNAct2d is not: a convolution with bias or
    another padding mode, a batch norm without weights or statistics. `convert_sync_batchnorm` would drop the activation
    of a BatchNormAct2d: call it before.

    Returns:
        `module`, or what replaces it if it is of such a type itself.

    Raises:
        TypeError: `module` is not a module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    parts = list(module.modules())
    places = Counter(child for part in parts for child in part._modules.values())
    compiled = [part._modules.get("_orig_mod") for part in parts]  # whose parent calls it by a bound method
    done = {part: part for part in compiled if type(part) in LEAVES}
    return _converted(module, done, {part for part, count in places.items() if count > 1})


def _converted(module: nn.Module, done: dict[nn.Module, nn.Module], shared: set[nn.Module]) -> nn.Module:
    if module not in done:
        new = done[module] = _twin(module) or module
        if type(new) is nn.Sequential and not _hides(new):
            _merge(new, shared)
        for name, child in [] if isinstance(new, fused.ConvBNAct2d) else [*new._modules.items()]:
            if child is not None and (replacement := _converted(child, done, shared)) is not child:
                new.add_module(name, replacement)
    return done[module]


def _twin(module: nn.Module) -> nn.Module | None:
    """What replaces `module`, if it is of a type that has a twin and is just what its constructor made."""
    if type(module) in LEAVES and _movable(module):
        with suppress(Exception):  # settings that no constructor takes
            twin = _built(module)
            if _agrees(twin, module):
                return _moved(twin, module)
    return None


def _built(module: nn.Module) -> nn.Module:
    """What the twin's constructor makes of the settings of `module`, on the meta device."""
    return _construct(_TWINS[type(module)], module, **_further_settings(module))


def _construct(kind: type, *modules: nn.Module, **further) -> nn.Module:
    """kind(...) with the attributes of `modules` that are arguments of it, and `further` ones."""
    names = _ARGUMENTS.get(kind) or inspect.signature(kind).parameters.keys() - {"device", "dtype"}
    settings = {name: vars(part)[name] for part in modules for name in names if name in vars(part)}
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the old module's constructor has warned of
        return kind(**(settings | further))


def _further_settings(module: nn.Module) -> dict[str, object]:
    """The constructor's arguments that are not attributes of their name."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return {"bias": module.bias is not None}
    if isinstance(module, nn.MultiheadAttention):
        return {"bias": module.in_proj_bias is not None, "add_bias_kv": module.bias_k is not None}
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        return {
            "d_model": module.self_attn.embed_dim,
            "nhead": module.self_attn.num_heads,
            "dim_feedforward": module.linear1.out_features,
            "dropout": module.dropout.p,
            "activation": module.activation,
            "layer_norm_eps": module.norm1.eps,
            "batch_first": module.self_attn.batch_first,
            "bias": module.linear1.bias is not None,
        }
    if isinstance(module, nn.TransformerEncoder):
        return {"encoder_layer": _built(module.layers[0]), "norm": module.norm}
    if isinstance(module, nn.TransformerDecoder):
        return {"decoder_layer": _built(module.layers[0]), "norm": module.norm}
    if isinstance(module, nn.Transformer):
        return {"custom_encoder": nn.Identity(), "custom_decoder": nn.Identity()}  # the children come with the state
    return {}


def _agrees(built: nn.Module, module: nn.Module) -> bool:
    """Whether both have the same settings, and the same tensors by name and shape."""
    ours, theirs = vars(built), vars(module)
    settings = (ours.keys() & theirs.keys()) - _NOT_SETTINGS
    return _shapes(built) == _shapes(module) and all(ours[name] == theirs[name] for name in settings)


def _shapes(module: nn.Module) -> dict[str, torch.Size | None]:
    tensors = module._parameters | module._buffers
    return {name: tensor if tensor is None else tensor.shape for name, tensor in tensors.items()}


def _moved(new: nn.Module, module: nn.Module) -> nn.Module:
    """`new` with the tensors, children, mode, hooks (whose handles go on removing them) and attributes of `module`."""
    vars(new).update({name: copy.copy(value) if name in _OWN else value for name, value in vars(module).items()})
    return new


def _movable(module: nn.Module) -> bool:
    """Whether nothing that `module` does or holds is bound to this object."""
    bound = any(hook.with_module for hook in module._load_state_dict_pre_hooks.values())
    managed = getattr(module, "_is_fsdp_managed_module", False) or any(map(chains.sharded, module.modules()))
    return not (bound or managed or _hides(module))


def _hides(module: nn.Module) -> bool:
    """Whether the instance has a forward, a compiled call or the like in front of its class's."""
    return any(hasattr(type(module), name) for name in vars(module))


def _merge(sequential: nn.Sequential, shared: set[nn.Module]) -> None:
    """Put one module in the place of the first, nn.Identity in that of the others, wherever `_block` makes one."""
    parts, place = [*sequential, None, None], 0
    while place < len(sequential):
        block, taken = _block(*parts[place : place + 3], shared)
        if block is not None:
            sequential[place] = block
        for emptied in range(place + 1, place + taken):
            sequential[emptied] = nn.Identity().train(parts[emptied].training)
        place += taken


def _block(
    first: nn.Module, second: nn.Module | None, third: nn.Module | None, shared: set[nn.Module]
) -> tuple[nn.Module | None, int]:
    """The module that does what the next ones do, if there is one, and how many of them it stands for."""

    def mergeable(module: nn.Module | None, kind: type) -> bool:
        return type(module) is kind and module not in shared and blocks.untouched(module) and _movable(module)

    if mergeable(first, nn.Conv2d) and mergeable(second, nn.BatchNorm2d):
        activation = blocks.activation_of(third)
        with suppress(Exception):
            block = _construct(fused.ConvBNAct2d, first, second, activation=activation)
            if _agrees(block.conv, first) and _agrees(block.bn, second):
                block.conv, block.bn, block.training = first, second, second.training
                return block, 2 if activation is None else 3
    if mergeable(first, nn.BatchNorm2d) and (activation := blocks.activation_of(second)) is not None:
        with suppress(Exception):
            block = _construct(fused.BatchNormAct2d, first, activation=activation)
            if _agrees(block, first):
                return _moved(block, first), 2
    return None, 1
