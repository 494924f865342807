"""Three pretrained models in plain torch.nn, their real input, and what is known to be true of their output."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from . import efficientnet_lite0, g2p, minilm
from .weights import WeightsMissing

__all__ = ["PRETRAINED", "Pretrained", "WeightsMissing"]


@dataclass(frozen=True)
class Pretrained:
    """A pretrained model as the benchmark sees it. A call whose files can't be had raises WeightsMissing.

    build() gives the model in eval mode without gradients, its checkpoint loaded strictly; inputs() its real input as
    CPU tensors, so that model(*inputs()) is one tensor; truth(model) runs the model it is given, wherever that lives,
    on input of known meaning and gives (claim, holds) pairs.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    truth: Callable[[nn.Module], list[tuple[str, bool]]]


PRETRAINED = (
    Pretrained("MiniLM-L6", minilm.build, minilm.inputs, minilm.truth),
    Pretrained("EfficientNet-Lite0", efficientnet_lite0.build, efficientnet_lite0.inputs, efficientnet_lite0.truth),
    Pretrained("g2p", g2p.build, g2p.inputs, g2p.truth),
)
