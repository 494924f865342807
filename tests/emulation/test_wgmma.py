"""common/wgmma.cuh under the emulator: products of operands in every layout, exact in whole numbers, and a GEMM."""

import pytest
import torch

from tests.emulation import kernels

pytestmark = kernels.needs_kernels
TYPES = {"half": torch.float16, "bfloat": torch.bfloat16, "tf32": torch.float32}
PRODUCTS = (
    "half_8_k_k", "half_64_k_mn", "bfloat_16_k_k", "bfloat_64_mn_k", "bfloat_128_mn_mn", "bfloat_192_k_k",
    "half_256_k_k", "tf32_96_k_k", "half_32_r_k", "bfloat_64_r_mn", "tf32_32_r_k",
)  # fmt: skip
ROWS = {0: 1, 1: 2, 2: 4, 3: 8}  # of a swizzle's pattern: a row has as many chunks of 16 bytes


def whole(*shape, dtype):
    return torch.randint(-8, 9, shape).to(dtype)


def swizzle_rows(tile, swizzle):
    """The image of rows of 32, 64 or 128 bytes: chunk c of 128-byte line r goes to where c ^ (r mod 2, 4 or 8) was."""
    lines = tile.reshape(-1).view(torch.uint8).view(-1, 8, 16)
    out = torch.empty_like(lines)
    for r in range(len(lines)):
        for c in range(8):
            out[r, c ^ r % ROWS[swizzle]] = lines[r, c]
    return out.view(-1)


def image_of(matrix, major, swizzle):
    """The bytes of `matrix` (rows of M or N, columns of K) in shared memory; (leading, stride, step) of its parts."""
    chunk = 16 // matrix.dtype.itemsize
    deep = 2 * chunk  # one product's part of K
    size, k = matrix.shape
    if swizzle == 0 and major == "k":  # bricks of 8 rows by 16 bytes, those along K next to each other
        bricks = matrix.view(size // 8, 8, k // chunk, chunk).permute(0, 2, 1, 3)
        return bricks.reshape(-1).view(torch.uint8), (128, 128 * k // chunk, 256)
    if swizzle == 0:  # bricks of 8 of K by 16 bytes, those along M or N next to each other
        bricks = matrix.view(size // chunk, chunk, k // 8, 8).permute(2, 0, 3, 1)
        return bricks.reshape(-1).view(torch.uint8), (128 * size // chunk, 128, 2 * 128 * size // chunk)
    row = 16 << swizzle
    wide = row // matrix.dtype.itemsize
    if major == "k":  # panels of one row's width along K, all M or N rows of each
        panels = matrix.view(size, k // wide, wide).transpose(0, 1)
        per_panel = wide // deep
        assert k // deep <= per_panel  # parts of K within a panel are 32 bytes apart
        return swizzle_rows(panels, swizzle), (16, 8 * row, 32)
    panels = matrix.t().reshape(k, size // wide, wide).transpose(0, 1)  # panels of one row's width along M or N
    return swizzle_rows(panels, swizzle), (k * row, 8 * row, deep * row)


def fragments_of(matrix, steps):
    """Of A (64 x K) in registers: (step, thread, 4) words."""
    parts = matrix.view(4, 2, 8, steps, 2, 4, 4 // matrix.dtype.itemsize)  # warp, h, row, step, c, quad, element
    return parts.permute(3, 0, 2, 5, 4, 1, 6).contiguous().view(-1).view(torch.int32)


def operands(name, a, b, a_swizzle, b_swizzle, keep):
    """The arguments of kernels/wgmma.cu's product_`name`, the third of which is its result."""
    _, n, a_major, b_major = name.split("_")
    nothing = torch.empty(0, dtype=torch.uint8), (0, 0, 0)
    a_image, a_layout = nothing if a_major == "r" else image_of(a, a_major, a_swizzle)
    b_image, b_layout = image_of(b, b_major, b_swizzle)
    gap = torch.full((-len(a_image) % 1024,), 0xFF, dtype=torch.uint8)
    image = torch.cat([a_image, gap, b_image]).view(torch.int32)
    steps = a.shape[1] * a.dtype.itemsize // 32
    fragments = fragments_of(a, steps) if a_major == "r" else torch.zeros(1, dtype=torch.int32)
    spec = [0, *a_layout, a_swizzle, len(a_image) + len(gap), *b_layout, b_swizzle, steps, keep]
    return image, fragments, torch.full((64, int(n)), float("nan")), torch.tensor(spec)


def multiply(name, *arguments, seed=0, checked=True):
    made = operands(name, *arguments)
    kernels.run("wgmma", f"product_{name}", *made, seed=seed, checked=checked)
    return made[2]


@pytest.mark.parametrize("swizzle", ROWS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_of_whole_numbers_is_exact_in_every_layout(name, swizzle):
    kind, n, *_ = name.split("_")
    dtype = TYPES[kind]
    k = 32 // dtype.itemsize * (ROWS[swizzle] // 2 or 2)  # as much as a swizzle's row holds
    a, b = whole(64, k, dtype=dtype), whole(int(n), k, dtype=dtype)
    for keep in (0, 1):
        out = multiply(name, a, b, swizzle, swizzle, keep)
        assert torch.equal(out.double(), a.double() @ b.double().t() - keep)


def test_the_schedule_does_not_change_a_product():
    a, b = whole(64, 64, dtype=torch.bfloat16), whole(16, 64, dtype=torch.bfloat16)
    run = lambda seed, checked: multiply("bfloat_16_k_k", a, b, 3, 3, 0, seed=seed, checked=checked)  # noqa: E731
    assert torch.equal(kernels.every_schedule(run).double(), a.double() @ b.double().t())


def test_tf32_leaves_out_the_lower_13_bits():
    a, b = torch.full((64, 8), 1 + 2.0**-11 + 2.0**-10), torch.eye(96)[:, :8].contiguous()
    out = multiply("tf32_96_k_k", a, b, 1, 1, 0)
    assert (out[:, :8] == 1 + 2.0**-10).all() and (out[:, 8:] == 0).all()


def test_random_numbers_are_within_rounding():
    a, b = torch.randn(64, 64).bfloat16(), torch.randn(16, 64).bfloat16()
    exact = a.double() @ b.double().t()
    error = (multiply("bfloat_16_k_k", a, b, 3, 3, 0).double() - exact).abs()
    assert (error <= 4 * 2.0**-23 * (a.double().abs() @ b.double().abs().t())).all()


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (128, 64, 64), (130, 65, 200), (77, 131, 333), (257, 64, 8)])
def test_a_pipelined_gemm_is_exact(m, n, k):
    padded = (k + 7) // 8 * 8
    a, b = (torch.full((rows, padded), float("nan"), dtype=torch.bfloat16) for rows in (m, n))
    a[:, :k], b[:, :k] = whole(m, k, dtype=torch.bfloat16), whole(n, k, dtype=torch.bfloat16)
    for seed in range(2):
        c = torch.full((m, n), float("nan"))
        kernels.run("wgmma", "gemm", a, b, c, m, n, k, seed=seed)
        assert torch.equal(c.double(), a[:, :k].double() @ b[:, :k].double().t())
