"""Image classification: scikit-learn's digits, CIFAR, or any folder in ImageNet's layout."""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from fused_ops.core.errors import ArgumentError
from fused_ops.models import CNN, ResNet
from fused_ops.train.config import Config
from fused_ops.train.data import digits, held_out
from fused_ops.train.recipe import Classification
from fused_ops.train.vision import InterpolationMode, datasets, v2

_STATISTICS = {  # mean and standard deviation of each channel
    "digits": ((0.305,), (0.376,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagefolder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass(frozen=True)
class ImageConfig(Config):
    """Train an image classifier.

    Attributes:
        dataset: digits (part of scikit-learn); cifar10, cifar100 (their python archives, unpacked in data_path);
            imagefolder (a folder a class in data_path/train, data_path/val and, if there is one, data_path/test).
        data_path: where the data is.
        val_split: share of the training images that validation takes. Held-out are the data set's own test images; a
            fifth of the digits; an imagefolder's test, or else its val. With a test, its val is for validation.
        model: cnn, or a residual network.
        image_size: height and width of an imagefolder's images, once cropped.
        label_smoothing: share of a label that all classes have in common.
    """

    dataset: Literal["digits", "cifar10", "cifar100", "imagefolder"] = "digits"
    data_path: Path | None = None
    val_split: float = 0.1
    model: Literal["cnn", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = "cnn"
    image_size: int = 224
    label_smoothing: float = 0.1
    epochs: int = 40
    lr: float = 2e-3
    weight_decay: float = 0.05

    free = Config.free | {"data_path"}
    least = Config.least | {"image_size": 1}
    shares = Config.shares | {"val_split", "label_smoothing"}


class Images(Dataset):
    """(transform(image), label) of a data set of images and labels."""

    def __init__(self, data: Sequence, transform: nn.Module):
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.data[index]
        return self.transform(image), int(label)


def read_image(path: str) -> Image.Image:
    try:
        return datasets.folder.pil_loader(path)
    except OSError as error:
        raise OSError(f"data_path must be a folder of readable images, got {path}: {error}") from error


def read_folder(path: Path) -> datasets.ImageFolder:
    """A folder of images a class."""
    try:
        return datasets.ImageFolder(path, loader=read_image)
    except OSError as error:
        raise ArgumentError("data_path", "a folder of train/<class>/<image>, val/<class>/<image>", error) from error


def read_cifar(config: ImageConfig) -> tuple[Sequence, Sequence]:
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[config.dataset]
    try:
        train, test = (kind(config.data_path, train=train) for train in (True, False))
    except (RuntimeError, OSError, pickle.UnpicklingError, EOFError) as error:
        wanted = f"a folder that holds {kind.base_folder}, whole"
        raise ArgumentError("data_path", wanted, f"{config.data_path}: {error}") from error
    return train, test


def read_image_folder(path: Path) -> list[Sequence]:
    """Training data, validation data if there is a third split, and held-out data."""
    names = ("train", "val", "test") if (path / "test").is_dir() else ("train", "val")
    splits = [read_folder(path / name) for name in names]
    for other in splits[1:]:
        if other.classes != splits[0].classes:
            got = f"{len(splits[0].classes)} in train, {len(other.classes)} in {other.root}"
            raise ArgumentError("data_path", "a folder with the same classes in each split", got)
    return splits


def transforms(config: ImageConfig) -> tuple[nn.Module, nn.Module]:
    """What images go through in training, and in validation."""
    normalised = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*_STATISTICS[config.dataset])]
    if config.dataset == "digits":
        affine = v2.RandomAffine(10, (0.1, 0.1), (0.9, 1.1), interpolation=InterpolationMode.BILINEAR)
        return v2.Compose([affine, normalised[-1]]), normalised[-1]
    if config.dataset == "imagefolder":
        size = config.image_size
        drawn = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.TrivialAugmentWide()]
        fixed = [v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)]
    else:
        drawn = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), v2.TrivialAugmentWide()]
        fixed = []
    return v2.Compose([*drawn, *normalised]), v2.Compose([*fixed, *normalised])


class ImageClassification(Classification):
    """A CNN or ResNet on images, moved, flipped and recoloured at random."""

    name = "image"
    config_class = ImageConfig

    def __init__(self, config: ImageConfig):
        super().__init__(config)
        if config.dataset != "digits" and config.data_path is None:
            raise ArgumentError("data_path", f"the folder of {config.dataset}", None)
        if config.dataset == "imagefolder":
            train, *valid, test = read_image_folder(config.data_path)
        else:
            valid, (train, test) = [], digits() if config.dataset == "digits" else read_cifar(config)
        self.num_classes = 10 if config.dataset == "digits" else len(train.classes)
        train, valid = (train, *valid) if valid else held_out(train, config.val_split)
        drawn, fixed = transforms(config)
        self.train, self.valid, self.test = Images(train, drawn), Images(valid, fixed), Images(test, fixed)

    def model(self) -> nn.Module:
        """Weights of a ResNet are drawn as in He et al. 2015; a CNN's too."""
        config = self.config
        channels, size, _ = self.valid[0][0].shape
        if config.model == "cnn":
            model = CNN(size, in_channels=channels, num_classes=self.num_classes)
            for module in model.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                    nn.init.zeros_(module.bias)
            return model
        depth = int(config.model.removeprefix("resnet"))
        stem = "cifar" if size <= 64 else "imagenet"
        return ResNet(depth=depth, num_classes=self.num_classes, in_channels=channels, stem=stem)
