"""Which backend can serve an RNN, and where `auto` takes it."""

from functools import cache, partial

import torch
from torch import Tensor

from fused_ops.core import device, extension, verified
from fused_ops.core.dispatch import Backend, Op
from fused_ops.core.library import traced_as_constant
from fused_ops.core.precision import matmul_dot_precision
from fused_ops.rnn import layers, op, reference
from fused_ops.rnn.reference import Static, Tensors

# What auto knows of the C++ kernels' speed is in bench/results/cpu/rnn_cpu.json and rnn_cpu_other_host.json, measured
# with AVX-512 on two processors: a rule is for where it is no slower on both.
_VECTORISED = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
_NOT_MEASURED = "is slower than torch's GEMM without AVX2"
_TOO_SHORT = (
    "is bitwise independent of the batch, but packs its weights in every call: too much for so few steps"
    " (bench/results/cpu/rnn_cpu.json)"
)
_MANY_ROWS = (
    "is bitwise independent of the batch, but no faster than oneDNN's forward for so many rows"
    " (bench/results/cpu/rnn_cpu.json)"
)
_BFLOAT16 = (
    "is bitwise independent of the batch, but multiplies in float32, where torch's own products of bfloat16 are faster"
    " (bench/results/cpu/rnn_cpu.json)"
)
_NO_GPU_YET = "has not been measured against cuDNN"
_VARIANT = "torch's own, where a row's result may depend on its batch"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _differentiates(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors])


def _float_type(input: Tensor) -> str | None:
    return None if input.dtype in _FLOATS else "takes float32, float16 and bfloat16"


def _cpu(tensors: Tensors, params: tuple, static: Static, dropout: float) -> str | None:
    return _float_type(tensors.input)


def _cpu_worthwhile(tensors: Tensors, params: tuple, static: Static, dropout: float) -> str | None:
    if not _VECTORISED:
        return _NOT_MEASURED
    if not reference.torch_has_it(tensors, static):
        return None
    bfloat16 = tensors.input.dtype == torch.bfloat16
    if bfloat16 and static.is_lstm:
        return _BFLOAT16
    if tensors.lengths is not None and tensors.input.dtype == torch.float32:
        return None
    if torch.compiler.is_compiling():  # no guard on a size; a compiled reference runs forward again in its backward
        return None
    batch, hidden = tensors.h0.shape[1:]
    time = (tensors.input if tensors.batch_sizes is None else tensors.batch_sizes).size(0)
    if bfloat16 and batch * hidden > 8 * 256:
        return _BFLOAT16
    if tensors.input.dtype != torch.float32 or reference.projected(params, static):
        return None if time >= 8 else _TOO_SHORT
    trains = _differentiates(tensors.input, tensors.h0, tensors.c0, *params)
    if static.is_lstm:
        if tensors.batch_sizes is None and batch >= 32 and not trains:
            return _MANY_ROWS
        return None if time >= 8 or batch <= 8 else _TOO_SHORT
    return None if _long_enough(static.mode == "gru", trains, time, batch, hidden) else _TOO_SHORT


def _long_enough(gru: bool, trains: bool, time: int, batch: int, hidden: int) -> bool:
    """Whether a GRU or plain RNN is no slower than torch's, by bench/results/cpu/rnn_cpu.json."""
    if time >= max(8, hidden // 32) or (gru and trains and hidden <= 64):
        return True
    if time >= 4:
        return trains or batch * hidden >= 2048 or (gru and hidden <= 128)
    if time >= 2:
        return (batch >= 128 and hidden >= 64) or (gru and trains and hidden <= 128)
    return batch >= 128 and hidden >= 128 and not trains


def _triton(tensors: Tensors, params: tuple, static: Static, dropout: float) -> str | None:
    return _float_type(tensors.input)


def _cuda(tensors: Tensors, params: tuple, static: Static, dropout: float) -> str | None:
    if reason := _float_type(tensors.input):
        return reason
    if tensors.input.dtype == torch.float32 and matmul_dot_precision() != "tf32":
        return "multiplies float32 in TF32, which torch.backends.cuda.matmul.fp32_precision does not ask for"
    if extension.host is None:
        return f"has no planner: {extension.host_missing}"
    index, features = tensors.input.get_device(), tensors.h0.size(-1)
    hidden = tensors.c0.size(-1) if static.is_lstm else features
    if features > hidden:
        return "takes a projected state of at most as many features as a layer has units"
    projected = features if reference.projected(params, static) else 0
    sizes = (hidden, tensors.input.element_size(), projected, static.layer_norm)
    passes = (False, True) if _differentiates(*tensors, *params) else (False,)
    if all(_fits(static.mode, backward, *sizes, index) for backward in passes):
        return None
    return f"cannot keep the weights of hidden size {hidden} in this chip's shared memory"


@traced_as_constant
def _fits(*call) -> bool:
    """Whether a layer's W_hh stays on chip; the batch has no say."""
    return _design(*call) != "none"


@cache
def _design(mode: str, backward: bool, hidden: int, element_bytes: int, projected: int, norm: bool, index: int) -> str:
    chip = device.chip(index)
    return extension.host.plan_rnn_layer(mode, backward, hidden, 1, 1, element_bytes, *chip, projected, norm)["design"]


def _gpu_worthwhile(*call) -> str:
    return _NO_GPU_YET


def _cell_cpu(input, *rest) -> str | None:
    return None if input.dtype == torch.float32 else "takes float32"


def _cell_cpu_worthwhile(input, *rest) -> str | None:
    if not _VECTORISED:
        return _NOT_MEASURED
    enough = input.size(0) >= 256 and rest[0].size(1) >= 64 and not _differentiates(input, *rest)
    return None if enough else _TOO_SHORT


def _cell_gpu(input, *rest) -> str | None:
    return _float_type(input)


def _csrc(*names: str) -> tuple[str, ...]:
    return (*(f"rnn/{name}" for name in names), *verified.CUDA_COMMON)


_COMMON = ("async_copy", "cluster", "grid_sync", "mma", "shared", "swizzle", "sync")
_KERNELS = {
    "cells": {
        "cuda": verified.kernel("rnn.cells.cuda", *_csrc("cells.cu", "cells.cuh")),
        "triton": verified.kernel("rnn.cells.triton", "rnn/triton_kernels.py", "rnn/triton_gates.py"),
    },
    "layers": {
        "cuda": verified.kernel(
            "rnn.layers.cuda",
            *(f"common/{name}.cuh" for name in _COMMON),
            *_csrc(
                "exchange.cuh", "gates.cuh", "gates_bwd.cuh", "layer.h", "layer_bwd.cu", "layer_bwd.cuh",
                "layer_bwd_extra.cu", "layer_bwd_launch.h", "layer_bwd_state.cuh", "layer_fwd.cu", "layer_fwd.cuh",
                "layer_fwd_extra.cu", "layer_fwd_launch.h", "layer_launch.h", "layer_plan.h", "projection.cu",
                "projection.cuh", "resident.cuh", "row_norm.cuh",
            ),
        ),
        "triton": verified.kernel(
            "rnn.layers.triton",
            *(f"rnn/triton_{n}.py" for n in ("fused", "gates", "layers", "plan", "projection", "rows", "steps")),
        ),
    },
}  # fmt: skip


def _sequence(mode: str) -> Op:
    gpu = [
        Backend(
            name,
            partial(layers.sequence, name),
            supports,
            _gpu_worthwhile,
            needs="rnn_layer_bwd_cuda" if name == "cuda" else None,
            kernel=_KERNELS["layers"][name],
        )
        for name, supports in (("cuda", _cuda), ("triton", _triton))
    ]
    cpu = Backend("cpu", op.sequence_cpu, _cpu, _cpu_worthwhile, needs="rnn_fwd_cpu")
    return Op(mode, *gpu, cpu, Backend("reference", op.sequence_reference, note=_VARIANT))


def _cell(index: int, name: str, kind: str) -> Op:
    gpu = [
        Backend(
            backend,
            op.CELLS[backend][index],
            _cell_gpu,
            needs=f"{kind}_cell_fwd_cuda" if backend == "cuda" else None,
            kernel=_KERNELS["cells"][backend],
        )
        for backend in ("cuda", "triton")
    ]
    cpu = Backend("cpu", op.CPU_CELLS[index], _cell_cpu, _cell_cpu_worthwhile, needs="rnn_fwd_cpu")
    return Op(name, *gpu, cpu, Backend("reference", getattr(reference, name), note=_VARIANT))


SEQUENCES = {mode: _sequence(mode) for mode in ("rnn_tanh", "rnn_relu", "gru", "lstm")}
CELLS = {f"{mode}_cell": _cell(i, f"{mode}_cell", mode.split("_")[0]) for i, mode in enumerate(SEQUENCES)}
