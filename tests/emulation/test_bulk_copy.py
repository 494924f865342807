"""common/bulk_copy.cuh under the emulator: bulk and tensor copies, their boxes, swizzles and what lies outside."""

import math

import pytest
import torch

from tests.emulation import kernels

pytestmark = kernels.needs_kernels
NAMES = dict(float=torch.float32, half=torch.float16, bfloat=torch.bfloat16, byte=torch.uint8, int=torch.int32)
NAMES = {dtype: name for name, dtype in NAMES.items()}
ROWS = {0: 1, 1: 2, 2: 4, 3: 8}  # of a swizzle's pattern


def numbers(*shape, dtype=torch.float32):
    return torch.randint(1, 100, shape).to(dtype)


def swizzled(tile, swizzle):
    """`tile`'s bytes in the order in which they lie in shared memory, by chunks of 16."""
    chunks = tile.reshape(-1).view(torch.uint8).view(-1, 16)
    address = torch.arange(len(chunks)) * 16
    moved = address ^ ((address >> 7) % ROWS[swizzle] << 4)
    return torch.empty_like(chunks).index_copy_(0, moved // 16, chunks).view(-1).view(tile.dtype)


def specification(tensor, box, at, swizzle=0, fill=0, steps=()):
    """What kernels/bulk_copy.cu reads: the innermost dimension first."""
    five = [list(reversed(tensor.shape)), list(reversed(tensor.stride())), *([*x] for x in (box, steps, at))]
    return torch.tensor([v for values in five for v in (*values, *[0] * (5 - len(values)))] + [swizzle, fill])


def box_of(tensor, box, at, fill, steps=()):
    """The box's elements, innermost dimension last, by indexing."""
    counts = [math.ceil(n / (s or 1)) for n, s in zip(box, steps or (1,) * len(box), strict=True)]
    index = torch.meshgrid(
        *(
            torch.arange(n) * (s or 1) + a
            for n, s, a in reversed(list(zip(counts, steps or (1,) * len(box), at, strict=True)))
        ),
        indexing="ij",
    )
    inside = torch.ones_like(index[0], dtype=torch.bool)
    for i, size in zip(index, tensor.shape, strict=True):
        inside &= (i >= 0) & (i < size)
    found = tensor[tuple(i.clamp(0, size - 1) for i, size in zip(index, tensor.shape, strict=True))]
    return torch.where(inside, found, torch.tensor(fill, dtype=tensor.dtype)), inside, index


@pytest.mark.parametrize(("n", "tile"), [(4, 64), (64, 64), (68, 64), (1000, 128), (12, 4)])
def test_tiles_pass_through_shared_memory(n, tile):
    source = numbers(n)

    def run(seed, checked):
        out = torch.full((n,), float("nan"))
        kernels.run("bulk_copy", "add_one", source, out, tile, seed=seed, checked=checked)
        return out

    assert torch.equal(kernels.every_schedule(run), source + 1)


def loading(tensor, box, at, swizzle=0, fill=0, steps=()):
    """The arguments of kernels/bulk_copy.cu's load_..., the second of which is its result."""
    count = math.prod(math.ceil(n / (s or 1)) for n, s in zip(box, steps or (1,) * len(box), strict=True))
    out = torch.full((count,), 3, dtype=tensor.dtype)
    spec = specification(tensor, box, at, swizzle, fill, steps)
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    storage = tensor.as_strided((last + 1,), (1,))
    return storage, out, spec, tensor.dim()


def loaded(tensor, *options, seed=0, **more):
    arguments = loading(tensor, *options, **more)
    kernels.run("bulk_copy", f"load_{NAMES[tensor.dtype]}", *arguments, seed=seed)
    return arguments[1]


@pytest.mark.parametrize("dtype", NAMES, ids=str)
@pytest.mark.parametrize("swizzle", ROWS)
@pytest.mark.parametrize("at", [(0, 0), (5, 3), (-3, -1), (90, 14), (200, 0), (0, -99)], ids=str)
def test_a_box_of_a_matrix_is_swizzled_and_filled(dtype, swizzle, at):
    tensor = numbers(17, 112, dtype=dtype)[:, :99]
    box = ((16 << swizzle if swizzle else 48) // dtype.itemsize, 11)
    want = box_of(tensor, box, at, 0)[0]
    assert torch.equal(loaded(tensor, box, at, swizzle), swizzled_tile(want, swizzle))


def swizzled_tile(tile, swizzle):
    """`tile` with a tail of whole patterns cut off again."""
    row = tile.shape[-1] * tile.dtype.itemsize
    lines = -tile.numel() * tile.dtype.itemsize % 128 // row
    padded = torch.cat([tile, tile.new_zeros(lines, tile.shape[-1])])
    return swizzled(padded, swizzle)[: tile.numel()]


@pytest.mark.parametrize("swizzle", ROWS)
def test_a_swizzle_of_16_bytes_in_the_documented_order(swizzle):
    """The first chunk of each row of the box, 0 to 7: where it lies in its row of 32, 64 or 128 bytes."""
    if swizzle == 0:
        return
    width = 16 << swizzle
    tensor = torch.arange(8, dtype=torch.int32)[:, None].mul(100) + torch.arange(width // 4, dtype=torch.int32)
    out = loaded(tensor, (width // 4, 8), (0, 0), swizzle).view(8, width // 16, 4)
    first = [int((out[row, :, 0] == 100 * row).nonzero()) for row in range(8)]
    assert first == {1: [0, 0, 0, 0, 1, 1, 1, 1], 2: [0, 0, 1, 1, 2, 2, 3, 3], 3: [0, 1, 2, 3, 4, 5, 6, 7]}[swizzle]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_lies_outside_can_be_nan(dtype):
    tensor = numbers(5, 24, dtype=dtype)
    got = loaded(tensor, (16, 4), (16, 3), fill=1).view(4, 16)
    want = box_of(tensor, (16, 4), (16, 3), float("nan"))[0]
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(), want.nan_to_num())


@pytest.mark.parametrize(
    ("shape", "box", "at", "steps"),
    [
        ((40,), (16,), (-4,), ()),
        ((3, 5, 16), (8, 3, 2), (4, 3, -1), ()),
        ((3, 4, 5, 8), (8, 3, 2, 2), (-2, 3, 0, 2), ()),
        ((2, 3, 4, 5, 8), (4, 2, 3, 2, 1), (2, -1, 2, 2, 1), ()),
        ((9, 8), (8, 7), (0, -1), (0, 3)),
        ((6, 9, 8), (4, 8, 4), (1, 2, -2), (1, 2, 3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, 1])
def test_boxes_of_one_to_five_dimensions_and_of_every_nth_element(shape, box, at, steps, seed):
    tensor = numbers(*shape)
    want = box_of(tensor, box, at, 0, steps)[0].reshape(-1)
    assert torch.equal(loaded(tensor, box, at, steps=steps, seed=seed), want)


@pytest.mark.parametrize("dtype", NAMES, ids=str)
@pytest.mark.parametrize("swizzle", ROWS)
@pytest.mark.parametrize("at", [(0, 0), (-3, -1), (90, 14), (200, 0)], ids=str)
def test_a_store_writes_what_lies_inside(dtype, swizzle, at):
    tensor = numbers(17, 112, dtype=dtype)
    box = ((16 << swizzle if swizzle else 48) // dtype.itemsize, 8)
    tile = numbers(8, box[0], dtype=dtype)
    want = tensor.clone()
    _, inside, index = box_of(tensor, box, at, 0)
    want[index[0][inside], index[1][inside]] = tile[inside]
    spec = specification(tensor, box, at, swizzle)
    kernels.run("bulk_copy", f"store_{NAMES[dtype]}", swizzled(tile, swizzle), tensor, spec, 2)
    assert torch.equal(tensor, want)


@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
@pytest.mark.parametrize("tensor", [0, 1])
def test_a_multicast_reaches_every_block(cluster, tensor):
    source = numbers(cluster * 32)

    def run(seed, checked):
        out = torch.full((cluster, len(source)), float("nan"))
        kernels.run("bulk_copy", "multicast", source, out, cluster, tensor, seed=seed, checked=checked)
        return out

    assert torch.equal(kernels.every_schedule(run), source.expand(cluster, -1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(box=(3, 4)), "12 bytes, no multiple of 16"),
        (dict(box=(16, 4), swizzle=1), "64 bytes, the swizzle's has 32"),
        (dict(box=(4, 257)), "a box of 257 in dimension 1"),
        (dict(box=(4, 4), steps=(1, 9)), "a step of 9 in dimension 1"),
        (dict(box=(4, 4), columns=30), "a stride of 120 bytes in dimension 1"),
        (dict(box=(4, 4), offset=1), "address is no multiple of 16"),
        (dict(box=(4, 4), fill=1, dtype=torch.int32), "NaN fills only floating-point types"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_tensor_map_that_the_driver_refuses_is_refused(change, said):
    options = dict(columns=32, offset=0, dtype=torch.float32, swizzle=0, fill=0, steps=(1, 1)) | change
    tensor = numbers(8 * options["columns"] + 4, dtype=options["dtype"])[options["offset"] :]
    tensor = tensor[: 8 * options["columns"]].view(8, options["columns"])
    with pytest.raises(RuntimeError, match=said):
        loaded(tensor, options["box"], (0, 0), options["swizzle"], options["fill"], options["steps"])
