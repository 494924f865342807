"""torchvision: its data sets and transforms.

Its usual wheel is a CUDA build, whose operators do not load beside torch for the CPU. Nothing here needs one, but
importing torchvision registers shapes for two, which therefore have to be defined.
"""

import contextlib

import torch

_DETECTION = torch.library.Library("torchvision", "FRAGMENT")
try:
    import torchvision
except RuntimeError:
    for _name in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):
            _DETECTION.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

from torchvision import datasets  # noqa: E402
from torchvision.transforms import InterpolationMode, v2  # noqa: E402

__all__ = ["InterpolationMode", "datasets", "torchvision", "v2"]
