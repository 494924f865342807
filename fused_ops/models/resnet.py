"""Residual networks, under torchvision's names of weights: state dicts go both ways."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_ops
from fused_ops.conv.blocks import conv_bn_act
from fused_ops.core.errors import ArgumentError
from fused_ops.models.checkpoint import check_state, load_into, read_state, write_state
from fused_ops.models.checks import check_choice, check_shape

# depth -> (blocks of each of the four stages, whether they are bottlenecks)
_DEPTHS = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}
_STEMS = {"imagenet": 7, "cifar": 3}
_COUNTED = ("*.num_batches_tracked",)  # checkpoints from before torch 0.4.1 have none


@dataclass(frozen=True)
class ResNetConfig:
    """What a `ResNet` is made of.

    Attributes:
        depth: 18 or 34 (basic blocks), 50, 101 or 152 (bottlenecks).
        num_classes: length of the logits.
        in_channels: of the images.
        stem: "imagenet" (7×7 convolution of stride 2, then 3×3 max-pooling of stride 2) or "cifar" (3×3 convolution of
            stride 1, for images of about 32×32 pixels).
        zero_init_residual: every block starts as the identity, its last batch norm's weight 0 (Goyal et al. 2017).
    """

    depth: int = 50
    num_classes: int = 1000
    in_channels: int = 3
    stem: str = "imagenet"
    zero_init_residual: bool = False

    def __post_init__(self):
        check_choice("depth", self.depth, _DEPTHS)
        check_choice("stem", self.stem, _STEMS)


def _conv(in_channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Conv2d:
    return fused_ops.nn.Conv2d(in_channels, out_channels, size, stride, size // 2, bias=False)


class Shortcut(nn.Sequential):
    """BN(W ⋆ x), W 1×1: around a block that changes the shape."""

    def forward(self, x: Tensor) -> Tensor:
        return conv_bn_act(self[0], self[1], x)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> Shortcut | None:
    """None where the block keeps the shape: x itself goes around it."""
    if stride == 1 and in_channels == out_channels:
        return None
    return Shortcut(_conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """out = ReLU(BN(W_2 ⋆ ReLU(BN(W_1 ⋆ x))) + shortcut(x)), both convolutions 3×3, the first of stride `stride`."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = _conv(in_channels, channels, 3, stride), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = _conv(channels, channels, 3), nn.BatchNorm2d(channels)
        self.downsample = _shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = conv_bn_act(self.conv1, self.bn1, x, activation="relu")
        return conv_bn_act(self.conv2, self.bn2, y, x if self.downsample is None else self.downsample(x), "relu")


class Bottleneck(nn.Module):
    """out = ReLU(BN(W_3 ⋆ ReLU(BN(W_2 ⋆ ReLU(BN(W_1 ⋆ x))))) + shortcut(x)): 1×1, 3×3 of stride `stride`, 1×1.

    The stride is the 3×3 convolution's, as in torchvision ("version 1.5"); He et al. give it to the first 1×1.
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1, self.bn1 = _conv(in_channels, channels, 1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = _conv(channels, channels, 3, stride), nn.BatchNorm2d(channels)
        self.conv3, self.bn3 = _conv(channels, out_channels, 1), nn.BatchNorm2d(out_channels)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = conv_bn_act(self.conv1, self.bn1, x, activation="relu")
        y = conv_bn_act(self.conv2, self.bn2, y, activation="relu")
        return conv_bn_act(self.conv3, self.bn3, y, x if self.downsample is None else self.downsample(x), "relu")


class ResNet(nn.Module):
    r"""logits = W·mean(stages(pool(ReLU(BN(stem ⋆ x))))) + b, four stages of residual blocks.

    In evaluation a convolution, its batch norm, the residual and ReLU are one op. Names of weights are torchvision's.

    Args:
        config: a `ResNetConfig`, by default ResNet-50; or its fields by keyword.

    Raises:
        ValueError: depth or stem is unknown; images have another shape.

    Source: He et al. 2016, "Deep residual learning for image recognition", sections 3 and 4.
    """

    def __init__(self, config: ResNetConfig | None = None, **fields):
        super().__init__()
        if config is not None and fields:
            raise ArgumentError("config", "a ResNetConfig or its fields by keyword, not both", (config, fields))
        self.config = config = config or ResNetConfig(**fields)
        counts, bottlenecks = _DEPTHS[config.depth]
        block = Bottleneck if bottlenecks else BasicBlock
        self.conv1 = _conv(config.in_channels, 64, _STEMS[config.stem], 2 if config.stem == "imagenet" else 1)
        self.bn1 = nn.BatchNorm2d(64)
        channels = 64
        for i, count in enumerate(counts):
            blocks = []
            for j in range(count):
                blocks.append(block(channels, 64 << i, 2 if i and not j else 1))
                channels = (64 << i) * block.expansion
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, config.num_classes)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """He et al. 2015, section 2.2, by fan-out, as torchvision does."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif self.config.zero_init_residual and isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)
            elif self.config.zero_init_residual and isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, in_channels, height, width), any size from 1×1 pixel on -> logits (batch, num_classes)."""
        return self.fc(F.adaptive_avg_pool2d(self.features(images), 1).flatten(1))

    def features(self, images: Tensor) -> Tensor:
        """What the classifier averages: (batch, 512 or 2048, height / 32, width / 32), by 8 with the "cifar" stem."""
        channels = self.config.in_channels
        check_shape("images", images, "batch", channels, "height", "width")
        if 0 in images.shape[2:]:
            raise ArgumentError("images", "at least a pixel high and wide", tuple(images.shape))
        if not images.is_floating_point():
            raise ArgumentError("images", "normalised floating point values", images.dtype)
        x = conv_bn_act(self.conv1, self.bn1, images, activation="relu")
        if self.config.stem == "imagenet":
            x = fused_ops.max_pool2d(x, 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike | Mapping[str, Tensor], *, num_classes: int | None = None
    ) -> "ResNet":
        """The model that a state dict of torchvision's (or timm's plain) ResNets belongs to, in eval mode.

        Depth, stem, channels and classes are read off the weights. Nothing is downloaded.

        Args:
            source: the state dict, or a path: a file of torch.save's (.pth, read with weights_only) or .safetensors, or
                a folder with model.safetensors or pytorch_model.bin.
            num_classes: where it is not the weights' own number, the classifier is a new one, to be trained.

        Raises:
            ValueError: the weights are another architecture's or incomplete (the error lists the keys), or the file is
                truncated.
        """
        argument = "state" if isinstance(source, Mapping) else "path"
        state = check_state(argument, source) if isinstance(source, Mapping) else read_state(source)
        config = _config_of(state, argument)
        fresh = _COUNTED
        if num_classes not in (None, config.num_classes):
            config, fresh = replace(config, num_classes=num_classes), (*_COUNTED, "fc.*")
            state = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
        model = cls(config)
        load_into(model, state, fresh=fresh, argument=argument)
        return model.eval()

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Write the weights as torchvision and timm read them: into a file, safetensors or torch.save's by its suffix.

        Args:
            path: *.safetensors, or *.pth or *.pt; its folder is made if need be.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            write_state(path, self.state_dict())
        elif path.suffix in (".pth", ".pt"):
            torch.save({name: tensor.detach().cpu() for name, tensor in self.state_dict().items()}, path)
        else:
            raise ArgumentError("path", "a file named *.safetensors, *.pth or *.pt", path)


def _config_of(state: Mapping[str, Tensor], argument: str) -> ResNetConfig:
    """The configuration of the ResNet that these weights would fit; which of them do not, `load_into` says."""
    shapes = {name: tuple(state[name].shape) for name in ("conv1.weight", "fc.weight") if name in state}
    counts = tuple(len({name.split(".")[1] for name in state if name.startswith(f"layer{i}.")}) for i in (1, 2, 3, 4))
    bottlenecks = "layer1.0.conv3.weight" in state
    depth = {described: depth for depth, described in _DEPTHS.items()}.get((counts, bottlenecks))
    stem = {size: name for name, size in _STEMS.items()}.get((shapes.get("conv1.weight") or (0,))[-1])
    if depth is None or stem is None or len(shapes["conv1.weight"]) != 4 or len(shapes.get("fc.weight", ())) != 2:
        wanted = f"the weights of a ResNet-{', '.join(map(str, _DEPTHS))} as torchvision names them"
        kind = "bottlenecks" if bottlenecks else "basic blocks"
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "neither conv1.weight nor fc.weight"
        raise ArgumentError(argument, wanted, f"{len(state)} tensors with {counts} {kind} in layer1 to layer4, {found}")
    return ResNetConfig(depth, shapes["fc.weight"][0], shapes["conv1.weight"][1], stem)


def resnet18(**fields) -> ResNet:
    """`ResNet` of 18 layers; `fields` are those of `ResNetConfig`."""
    return ResNet(depth=18, **fields)


def resnet34(**fields) -> ResNet:
    """`ResNet` of 34 layers; `fields` are those of `ResNetConfig`."""
    return ResNet(depth=34, **fields)


def resnet50(**fields) -> ResNet:
    """`ResNet` of 50 layers; `fields` are those of `ResNetConfig`."""
    return ResNet(depth=50, **fields)


def resnet101(**fields) -> ResNet:
    """`ResNet` of 101 layers; `fields` are those of `ResNetConfig`."""
    return ResNet(depth=101, **fields)


def resnet152(**fields) -> ResNet:
    """`ResNet` of 152 layers; `fields` are those of `ResNetConfig`."""
    return ResNet(depth=152, **fields)
