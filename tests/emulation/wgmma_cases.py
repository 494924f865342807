"""What calibrate.py is to ask of a GPU about common/wgmma.cuh: whole numbers in every layout, bit for bit."""

from collections.abc import Iterator

import torch

from tests.emulation import test_wgmma
from tests.emulation.calibrate import Case


def wgmma_cases() -> Iterator[Case]:
    for name in test_wgmma.PRODUCTS:
        kind, n, *_ = name.split("_")
        dtype = test_wgmma.TYPES[kind]
        for swizzle, rows in test_wgmma.ROWS.items():
            if int(n) > 64 and swizzle != 3:
                continue  # the data is committed
            k = 32 // dtype.itemsize * (rows // 2 or 2)
            a, b = (test_wgmma.whole(size, k, dtype=dtype) for size in (64, int(n)))
            arguments = test_wgmma.operands(name, a, b, swizzle, swizzle, 1)
            yield Case("wgmma", f"product_{name}", f"swizzle {swizzle}", arguments)
    a, b = (test_wgmma.whole(rows, 200, dtype=torch.bfloat16) for rows in (130, 65))
    yield Case("wgmma", "gemm", "", (a, b, torch.zeros(130, 65), 130, 65, 200))
