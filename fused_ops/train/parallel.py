"""One process or the many that torchrun started: where each runs, how they share a model, what they add up."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from fused_ops.core.errors import ArgumentError


@contextmanager
def processes(device: str | None) -> Iterator[torch.device]:
    """The device of this process. Under torchrun all are connected while the context lasts, unless they are already."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("device", "one that is here", device)
    found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if "LOCAL_RANK" not in os.environ:
        yield found
        return
    if found.type == "cuda":
        found = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(found)
    connects = not dist.is_initialized()
    if connects:
        dist.init_process_group("cpu:gloo,cuda:nccl" if found.type == "cuda" else "gloo")
    yield found
    if connects:  # not after an error: it would wait for the others before anybody reads why
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def wrap(model: nn.Module, kind: str, device: torch.device) -> nn.Module:
    """`model` on all processes: as a whole on each (ddp) or every weight cut into parts (fsdp).

    With fsdp the unit that is gathered is an element of the outermost lists of layers, as in Transformers and ResNets.
    """
    if not dist.is_initialized():
        return model
    if kind == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh(device.type, (world(),))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            yield from child
        else:
            yield from _blocks(child)


@contextmanager
def accumulating(model: nn.Module, last: bool) -> Iterator[None]:
    """Gradients are exchanged in the backward of the `last` batch of a step only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    delayed = isinstance(model, DistributedDataParallel) and not last
    with model.no_sync() if delayed else nullcontext():
        yield


def reshard(model: nn.Module) -> None:
    """After a forward without a backward: fsdp frees the weights that it gathered, and the model has its own again."""
    if isinstance(model, FSDPModule):
        model.reshard()


def add_up(values: Tensor) -> Tensor:
    """Σ of `values` over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def average_statistics(model: nn.Module) -> None:
    """The running statistics of batch norms become their mean over the processes."""
    for norm in model.modules():
        if dist.is_initialized() and isinstance(norm, _BatchNorm) and norm.track_running_stats:
            for statistic in (norm.running_mean, norm.running_var):
                add_up(statistic).div_(world())


def gather(value: Any) -> list:
    """Every process's `value`, in their order."""
    values = [value] * world()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def from_first(function: Callable[[], Any]) -> Any:
    """What `function` gives in the first process. What it raises there ends the others too, who say nothing."""
    if not dist.is_initialized():
        return function()
    box = [None, None]
    try:
        if rank() == 0:
            box[0] = function()
    except Exception:
        box[1] = "failed"
        raise
    finally:
        dist.broadcast_object_list(box)
    if box[1] is not None:
        time.sleep(10)  # torchrun ends all processes with the first that ends: let it be the one that says why
        sys.exit(1)
    return box[0]
