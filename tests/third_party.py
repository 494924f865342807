"""Other people's models.

torchvision's usual wheel is a CUDA build, whose operators do not load beside torch for the CPU. Its models need none of
them, but importing it registers shapes for two.
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

import timm  # noqa: E402 - it imports torchvision
import transformers  # noqa: E402

__all__ = ["timm", "torchvision", "transformers"]
