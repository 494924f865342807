"""What every test shares: random inputs, the correctness rule, poisoned memory. bench/ uses the same rule."""

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor


def randn(*shape: int, dtype=torch.float32, seed: int = 0, device="cpu", requires_grad: bool = False) -> Tensor:
    """Reproducible normal values, never zeros; the same for every dtype up to rounding."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + sum((i + 1) * n for i, n in enumerate(shape)))
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return values.to(device=device, dtype=dtype).requires_grad_(requires_grad)


def noncontiguous(tensor: Tensor) -> Tensor:
    """The same values at another layout: every other element of a larger tensor, along the last dimension."""
    wide = torch.full((*tensor.shape, 2), float("nan"), dtype=tensor.dtype, device=tensor.device)
    wide[..., 0] = tensor.detach()
    return wide[..., 0].requires_grad_(tensor.requires_grad)


@contextmanager
def threads(count: int):
    """Within the block, torch computes with `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def error(value: Tensor, exact: Tensor) -> float:
    """Largest absolute difference from the float64 oracle; infinite if one is NaN where the other is not."""
    value, exact = value.detach().cpu().double(), exact.detach().cpu().double()
    assert value.shape == exact.shape, f"shape {tuple(value.shape)}, wanted {tuple(exact.shape)}"
    if value.numel() == 0:
        return 0.0
    same = (value == exact) | (value.isnan() & exact.isnan())
    difference = torch.where(same, 0.0, (value - exact).abs())
    return float("inf") if difference.isnan().any() else difference.max().item()


def assert_accurate(
    value: Tensor, exact: Tensor, torch_value: Tensor | None = None, *, factor: float = 2.0, terms: int = 1, ulps=4.0
) -> None:
    """The correctness rule: error at most `factor` times PyTorch's own in this dtype, or a few ulp·√terms.

    Args:
        exact: the oracle, `reference` in float64 on the CPU.
        torch_value: PyTorch's result in value's dtype; None leaves the floor alone as the bound.
        factor: 2 for values, 3 for gradients.
        terms: how many products are summed into an element.
    """
    dtype = value.dtype if value.dtype.is_floating_point else torch.float32
    size = exact.detach().abs()
    size = size[size.isfinite()].max().item() if size.isfinite().any() else 1.0
    floor = ulps * torch.finfo(dtype).eps * terms**0.5 * max(size, 1e-6)
    allowed = max(floor, factor * error(torch_value, exact) if torch_value is not None else 0.0)
    found = error(value, exact)
    assert found <= allowed, f"error {found:.3e}, allowed {allowed:.3e} (floor {floor:.3e})"


def leaves(*tensors: Tensor | None, dtype=None, device=None) -> list[Tensor | None]:
    """Detached copies, each a leaf that requires grad if its original does."""
    return [
        t if t is None else t.detach().to(dtype=dtype if t.is_floating_point() else None, device=device, copy=True)
        .requires_grad_(t.requires_grad)
        for t in tensors
    ]  # fmt: skip


def value_and_gradients(fn: Callable, inputs: list[Tensor | None], seed: int = 7) -> tuple[list[Tensor], list]:
    """fn(*inputs) as a list of tensors, and the gradients of a fixed random combination of them."""
    outputs = fn(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else [t for t in _flatten(outputs)]
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    if not wanted:
        return outputs, []
    total = sum(
        (out.double() * randn(*out.shape, dtype=torch.float64, seed=seed + i).to(out.device)).sum()
        for i, out in enumerate(outputs)
        if out.requires_grad
    )
    return outputs, list(torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True))


def _flatten(value):
    for part in value:
        if isinstance(part, Tensor):
            yield part
        else:
            yield from _flatten(part)


@contextmanager
def poisoned_memory():
    """Every uninitialised allocation is NaN (or the largest integer), so that reading one shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
