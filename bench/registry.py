"""The op rows: what is measured against what, as data."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import fused_ops
from tests.support import randn

_VF = torch._VF


@dataclass(frozen=True)
class Case:
    """One op at one shape: our ways and PyTorch's to the same result (layouts, say), and the work that must be done."""

    ours: dict[str, Callable[[], object]]
    peers: dict[str, Callable[[], object]]
    flops: float
    bytes: float


@dataclass(frozen=True)
class Row:
    """A line of the op table. `build(device, dtype)` makes the inputs, so that listing rows costs nothing."""

    op: str
    shape: str
    build: Callable[[str, torch.dtype], Case]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    devices: tuple[str, ...] = ("cpu", "cuda")


def _bytes(*tensors: Tensor) -> float:
    return float(sum(t.numel() * t.element_size() for t in tensors))


def attention(batch: int, heads: int, length: int, dim: int, causal: bool = False, kv_heads: int | None = None):
    def build(device, dtype):
        q = randn(batch, heads, length, dim, dtype=dtype, device=device)
        k, v = (randn(batch, kv_heads or heads, length, dim, dtype=dtype, device=device, seed=seed) for seed in (1, 2))
        gqa = kv_heads is not None
        flops = 4.0 * batch * heads * length * length * dim / (2 if causal else 1)
        return Case(
            {"ours": lambda: fused_ops.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)},
            {"F": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)},
            flops,
            _bytes(q, k, v, q),
        )

    return build


def decode(batch: int, heads: int, kv_heads: int, capacity: int, dim: int):
    """One new token against a cache filled to between a half and all of its capacity."""

    def build(device, dtype):
        q = randn(batch, heads, 1, dim, dtype=dtype, device=device)
        k, v = (randn(batch, kv_heads, capacity, dim, dtype=dtype, device=device, seed=seed) for seed in (1, 2))
        lengths = torch.linspace(capacity // 2, capacity, batch, device=device).int()
        mask = (torch.arange(capacity, device=device) < lengths[:, None])[:, None, None]
        used = int(lengths.sum()) * kv_heads * dim
        return Case(
            {"ours": lambda: fused_ops.decode_attention(q, k, v, lengths)},
            {"F with a mask": lambda: F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)},
            4.0 * used * heads / kv_heads,
            2.0 * used * q.element_size(),
        )

    return build


def convolution(batch: int, cin: int, cout: int, size: int, kernel: int, groups: int = 1, act: str | None = "relu"):
    """act(conv(x)·scale + shift): a convolution with its folded batch norm; act None is the bare convolution."""

    def build(device, dtype):
        x = randn(batch, cin, size, size, dtype=dtype, device=device)
        w = randn(cout, cin // groups, kernel, kernel, dtype=dtype, device=device)
        scale, shift = (randn(cout, dtype=dtype, device=device, seed=seed) for seed in (3, 4))
        ones, zeros = torch.ones_like(scale), torch.zeros_like(shift)
        pad = kernel // 2

        def ours(x):
            if act is None:
                return fused_ops.conv2d(x, w, padding=pad, groups=groups)
            return fused_ops.conv2d(x, w, padding=pad, groups=groups, scale=scale, shift=shift, activation=act)

        def eager(x):
            y = F.conv2d(x, w, padding=pad, groups=groups)
            if act is None:
                return y
            y = F.batch_norm(y, zeros, ones, scale, shift, False, 0.0, 0.0)
            return getattr(F, act)(y, inplace=True)

        last = x.to(memory_format=torch.channels_last)
        out = batch * cout * size * size
        return Case(
            {"ours": lambda: ours(x), "ours channels_last": lambda: ours(last)},
            {"F": lambda: eager(x), "F channels_last": lambda: eager(last)},
            2.0 * out * cin // groups * kernel * kernel,
            _bytes(x, w) + out * x.element_size(),
        )

    return build


_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1}


def recurrent(op: str, batch: int, hidden: int, steps: int = 64, ragged: bool = False, backward: bool = False):
    """One layer, I = H, input projection included; ragged: lengths evenly from T to T/2, PyTorch's packed; backward:
    a forward and the gradients of x and all parameters."""

    def build(device, dtype):
        x = randn(steps, batch, hidden, dtype=dtype, device=device)
        gates = _GATES[op]
        params = [
            (randn(*shape, dtype=dtype, device=device, seed=i) * hidden**-0.5)
            for i, shape in enumerate([(gates * hidden, hidden)] * 2 + [(gates * hidden,)] * 2)
        ]
        h = randn(1, batch, hidden, dtype=dtype, device=device, seed=9)
        hx = (h, h.clone()) if op == "lstm" else h
        lengths = torch.linspace(steps, steps // 2, batch).long()
        ours, theirs = getattr(fused_ops, op), getattr(_VF, op)
        settings = (params, True, 1, 0.0, False, False)
        on_device = lengths.to(device) if ragged else None

        def packed():
            data = pack_padded_sequence(x, lengths)
            return theirs(data.data, data.batch_sizes, hx, *settings)

        def padded():
            return ours(x, hx, *settings, False, lengths=on_device)

        rival, name = (packed, "packed") if ragged else (lambda: theirs(x, hx, *settings, False), "torch")
        if backward:
            seed = torch.randn_like(x)
            leaves = [t.requires_grad_() for t in (x, *params)]
            padded = _differentiated(padded, leaves, seed)
            rival = _differentiated(rival, leaves, pack_padded_sequence(seed, lengths).data if ragged else seed)
        tokens = int(lengths.sum()) if ragged else steps * batch
        return Case(
            {"ours": padded},
            {name: rival},
            (12.0 if backward else 4.0) * tokens * gates * hidden * hidden,
            (4 if backward else 2) * _bytes(x) + (2 if backward else 1) * _bytes(*params),
        )

    return build


def _differentiated(forward: Callable, leaves: list[Tensor], seed: Tensor) -> Callable[[], object]:
    @torch.enable_grad()
    def call():
        return torch.autograd.grad(forward()[0], leaves, seed)

    return call


def cell(op: str, batch: int, hidden: int):
    def build(device, dtype):
        x, h = (randn(batch, hidden, dtype=dtype, device=device, seed=seed) for seed in (1, 2))
        gates = _GATES[op.removesuffix("_cell")]
        params = [
            randn(*shape, dtype=dtype, device=device, seed=i) * hidden**-0.5
            for i, shape in enumerate([(gates * hidden, hidden)] * 2 + [(gates * hidden,)] * 2)
        ]
        hx = (h, h.clone()) if op == "lstm_cell" else h
        ours, theirs = getattr(fused_ops, op), getattr(_VF, op)
        flops = 4.0 * batch * gates * hidden * hidden
        return Case(
            {"ours": lambda: ours(x, hx, *params)},
            {"torch": lambda: theirs(x, hx, *params)},
            flops,
            _bytes(x, h, h, *params),
        )

    return build


_HALF = (torch.float16, torch.bfloat16)
_CPU, _CUDA = ("cpu",), ("cuda",)

_RECURRENT = tuple(
    Row(op, f"B={batch} H={hidden} T=64{what}", recurrent(op, batch, hidden, backward=bool(what)), devices=_CPU)
    for op in ("gru", "rnn_tanh", "lstm")
    for batch, hidden in ((1, 64), (8, 128), (32, 512))
    for what in ("", ", forward+backward")
)

ROWS = (
    Row("scaled_dot_product_attention", "1×1×4×8 (call overhead)", attention(1, 1, 4, 8), devices=_CPU),
    Row("scaled_dot_product_attention", "4×12×128×32", attention(4, 12, 128, 32), devices=_CPU),
    Row("scaled_dot_product_attention", "1×8×512×64 causal", attention(1, 8, 512, 64, True), devices=_CPU),
    Row("scaled_dot_product_attention", "4×32×4096×64", attention(4, 32, 4096, 64), _HALF, _CUDA),
    Row("scaled_dot_product_attention", "4×16×4096×128", attention(4, 16, 4096, 128), _HALF, _CUDA),
    Row("scaled_dot_product_attention", "4×16×4096×128 causal", attention(4, 16, 4096, 128, True), _HALF, _CUDA),
    Row("scaled_dot_product_attention", "4×32:4×4096×128", attention(4, 32, 4096, 128, kv_heads=4), _HALF, _CUDA),
    Row("decode_attention", "4×8:2×1024×64", decode(4, 8, 2, 1024, 64), devices=_CPU),
    Row("decode_attention", "1×32:8×32768×128", decode(1, 32, 8, 32768, 128), _HALF, _CUDA),
    Row("decode_attention", "16×32:8×8192×128", decode(16, 32, 8, 8192, 128), _HALF, _CUDA),
    Row("conv2d", "1×1 on 1×4×4×4 (call overhead)", convolution(1, 4, 4, 4, 1, act=None), devices=_CPU),
    Row("conv2d", "1×1 2×64→256 at 56², BN, ReLU", convolution(2, 64, 256, 56, 1), devices=_CPU),
    Row("conv2d", "3×3 2×64→64 at 56², BN, ReLU", convolution(2, 64, 64, 56, 3), devices=_CPU),
    Row("conv2d", "3×3 depthwise 2×144 at 56², BN, ReLU6", convolution(2, 144, 144, 56, 3, 144, "relu6"), devices=_CPU),
    Row("conv2d", "1×1 64×64→256 at 56², BN, ReLU", convolution(64, 64, 256, 56, 1), _HALF, _CUDA),
    Row("conv2d", "3×3 depthwise 128×384 at 28², ReLU6", convolution(128, 384, 384, 28, 3, 384, "relu6"), _HALF, _CUDA),
    *_RECURRENT,
    Row("gru", "B=32 H=256 T=64 ragged", recurrent("gru", 32, 256, ragged=True), devices=_CPU),
    Row("lstm", "B=16 H=64 T=500 ragged", recurrent("lstm", 16, 64, 500, True), devices=_CPU),
    Row("lstm", "B=16 H=64 T=500 ragged, forward+backward", recurrent("lstm", 16, 64, 500, True, True), devices=_CPU),
    Row("gru_cell", "B=256 H=256", cell("gru_cell", 256, 256)),
    Row("lstm_cell", "B=256 H=256", cell("lstm_cell", 256, 256)),
)  # fmt: skip


def cases(device: str):
    """(row, dtype) for every row that runs on `device`."""
    return [(row, dtype) for row in ROWS if device in row.devices for dtype in row.dtypes]
