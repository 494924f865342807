"""Weights with a batch norm folded in, laid out as oneDNN wants them, kept while nothing they were made of changes.

Laying weights out costs oneDNN as much as the convolution itself where they are large and the image is small, and
PyTorch pays it in every call. What is kept here is checked against the values in every call: a fingerprint of the
weights' memory reads them once, and no write, by whatever way, is missed.
"""

import weakref
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fused_ops.core.library import define


class Folded(NamedTuple):
    """weight ⋆ x + shift is the convolution and its batch norm.

    made_of: a fingerprint, and how it was laid out; alive: drops it with the memory of either source.
    """

    made_of: tuple
    weight: Tensor
    shift: Tensor
    alive: tuple[weakref.ref, ...]


# By where the convolution's weight and the batch norm's mean lie. The references are to memory: one to a tensor would
# keep torch from swapping it for another.
_kept: dict[tuple[int, ...], Folded] = {}

define(
    "fingerprint_cpu(Tensor[] tensors, int lanes=16) -> int",
    lambda tensors, lanes=16: torch.library.get_ctx().new_dynamic_size(),
)


def folded(
    input: Tensor, weight: Tensor, bias: Tensor | None, scale_shift, sources: tuple, geometry: tuple, eps: float
) -> tuple[Tensor, Tensor]:
    """(weight·scale in oneDNN's layout for inputs like `input`, shift + bias·scale).

    Args:
        scale_shift: makes (scale, shift) where nothing is kept.
        sources: the tensors, or None, that `scale_shift` reads; the first is there.
        geometry: stride, padding, dilation, groups; eps: what else `scale_shift` depends on.
    """
    tensors = [t if _dense(t) else t.contiguous() for t in (weight, bias, *sources) if t is not None]
    present = tuple([t is not None for t in (bias, *sources)])
    how = (eps, present, geometry, weight.shape, weight.stride(), input.stride(1) == 1)
    made_of = (torch.ops.fused_ops.fingerprint_cpu(tensors), how)
    memory = weight.untyped_storage(), sources[0].untyped_storage()
    place = (memory[0]._cdata, weight.storage_offset(), memory[1]._cdata, sources[0].storage_offset())
    found = _kept.get(place)
    if found is None or found.made_of != made_of:
        with torch.inference_mode(False), torch.no_grad():
            laid_out, shift = _fold(input, weight, bias, *scale_shift(), geometry)
        alive = tuple([weakref.ref(storage, partial(_drop, place)) for storage in memory])
        found = _kept[place] = Folded(made_of, laid_out, shift, alive)
    return found.weight, found.shift


def _drop(place: tuple[int, ...], _: weakref.ref) -> None:
    _kept.pop(place, None)


def _fold(input, weight, bias, scale, shift, geometry) -> tuple[Tensor, Tensor]:
    stride, padding, dilation, groups = geometry
    shift = shift if bias is None else torch.addcmul(shift, bias, scale)
    laid_out = torch.ops.mkldnn._reorder_convolution_weight(
        weight * scale.view(-1, 1, 1, 1), padding, stride, dilation, groups, list(input.shape)
    )
    return laid_out, shift


def _dense(tensor: Tensor) -> bool:
    """Whether its memory has no gaps."""
    return tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
