"""Other people's models."""

from fused_ops.train.vision import torchvision  # isort: skip - first: the others import torchvision too
import timm
import transformers

__all__ = ["timm", "torchvision", "transformers"]
