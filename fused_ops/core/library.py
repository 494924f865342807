"""Registration: schemas once, in Python; implementations from Python here, from C++ in `_C.so`."""

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("fused_ops", "DEF")


def define(schema: str, fake: Callable, implementation: Callable | None = None, keys: tuple[str, ...] = ()) -> None:
    """Define fused_ops::`schema` with its fake kernel, and implement it in Python for dispatch keys `keys`."""
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"fused_ops::{name}", fake, lib=LIBRARY)
    for key in keys:
        LIBRARY.impl(name, implementation, key)


def traced_as_constant(fn: Callable) -> Callable:
    """torch._dynamo.assume_constant_result, without importing torch._dynamo (over a second, and it imports Triton)."""
    fn._dynamo_marked_constant = True
    return fn
