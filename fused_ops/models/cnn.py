"""A small convolutional classifier: two convolutions with pooling, two linear layers."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fused_ops
from fused_ops.core.errors import ArgumentError
from fused_ops.models.checks import check_shape


@dataclass(frozen=True)
class CNNConfig:
    """Sizes of a `CNN`. `image_size` is the height and width of its images in pixels, at least 4."""

    image_size: int = 28
    in_channels: int = 3
    channels: tuple[int, int] = (32, 64)
    hidden_size: int = 128
    num_classes: int = 10

    def __post_init__(self):
        if self.image_size < 4:
            raise ArgumentError("image_size", "at least 4 (it is halved twice)", self.image_size)


class CNN(nn.Module):
    """logits = W_2·ReLU(W_1·flatten(ReLU(pool(conv_2(ReLU(pool(conv_1(x)))))))), 3×3 convolutions, 2×2 max-pooling.

    Args:
        image_size: height and width of the images. Default: 28.
        config: the other fields of `CNNConfig`, by keyword.

    Raises:
        ValueError: image_size is less than 4; an image of another size or number of channels comes.

    Source: LeCun et al. 1998, section II, with ReLU and max-pooling.
    """

    def __init__(self, image_size: int = 28, **config):
        super().__init__()
        self.config = config = CNNConfig(image_size, **config)
        first, second = config.channels
        self.conv1 = nn.Conv2d(config.in_channels, first, 3, padding=1)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1)
        self.fc1 = nn.Linear(second * (image_size // 4) ** 2, config.hidden_size)
        self.fc2 = nn.Linear(config.hidden_size, config.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, in_channels, image_size, image_size) -> logits (batch, num_classes)."""
        config = self.config
        check_shape("images", images, "batch", config.in_channels, config.image_size, config.image_size)
        x = images
        for conv in (self.conv1, self.conv2):
            x = fused_ops.max_pool2d(fused_ops.conv2d(x, conv.weight, conv.bias, padding=1), 2)
            x = torch.relu(x)  # ReLU(pool(x)) is pool(ReLU(x)), over a quarter of the values
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))
