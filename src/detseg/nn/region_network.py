"""A whole classification network as the head of a region: pixels of a crop in, features out.

What R-CNN runs on every crop (Girshick et al. 2014, `arXiv:1311.2524 <https://arxiv.org/abs/1311.2524>`_, sections 2.1
and 3.2). Each gives two kinds of features, which the paper compares: ``pool5``, its last map, and ``fc7``, the layer
below the classes. The networks' own papers stand in the libraries that they come from.

Letters: R crops, S pixels of a crop's side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from detseg.nn.backbone import Backbone, is_file
from detseg.nn.normalize import IMAGENET_MEAN, IMAGENET_STD
from detseg.nn.weights import load_weights, read_state


class RegionNetwork(nn.Module):
    """Base of the networks that look at crops.

    Attributes:
        map_features: numbers of one crop's ``pool5``.
        out_features: numbers of its ``fc7``.
        mean: what the weights were trained with, RGB in [0, 1]; the model normalises by it.
        std: likewise.
    """

    map_features: int
    out_features: int
    mean: list[float]
    std: list[float]

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.std = list(IMAGENET_MEAN), list(IMAGENET_STD)

    def maps(self, crops: Tensor) -> Tensor:
        """Return ``pool5``, the last map as one row: ``(R, map_features)`` of normalised crops ``(R, 3, S, S)``."""
        raise NotImplementedError

    def vectors(self, maps: Tensor) -> Tensor:
        """Return ``fc7``, ``(R, out_features)``, of what ``maps`` gave."""
        raise NotImplementedError

    def forward(self, crops: Tensor) -> Tensor:
        """Return ``fc7``, ``(R, out_features)``, of crops ``(R, 3, S, S)``."""
        return self.vectors(self.maps(crops))


class ClassifierNetwork(RegionNetwork):
    """A network of torchvision with fully connected layers of its own, without the one that names classes.

    Its layers keep their names (``features``, ``classifier``), and so its keys are torchvision's.

    Args:
        shape: of a crop, (3, S, S).
        name: of ``torchvision.models``: ``alexnet``, or ``vgg16`` and its kin.
        weights: ``default`` or a name of torchvision's (both download), the path of a state dict, or ``None``.

    Raises:
        ValueError: torchvision has no such network, it has no hidden fully connected layer, or the crop is too small.
        CheckpointMismatch: a file's layers differ, the one that names classes apart.
    """

    def __init__(self, *, shape: Sequence[int], name: str = "alexnet", weights: str | Path | None = None) -> None:
        super().__init__()
        network = self._load(name, weights)
        self.features, self.avgpool, self.classifier = network.features, network.avgpool, network.classifier
        self.map_features = math.prod(_shape_of(nn.Sequential(self.features, self.avgpool), shape, name))
        self.out_features = [layer.out_features for layer in self.classifier if isinstance(layer, nn.Linear)][-1]

    def _load(self, name: str, weights: str | Path | None) -> Any:
        known = torchvision.models.list_models(module=torchvision.models)
        if name not in known:
            raise ValueError(f"torchvision has no network {name!r}; it has {', '.join(known)}")
        chosen: Any = None
        if weights is not None and not is_file(weights):
            chosen = torchvision.models.get_model_weights(name)["DEFAULT" if weights == "default" else str(weights)]
            transforms = chosen.transforms()
            self.mean, self.std = list(transforms.mean), list(transforms.std)
        network: Any = torchvision.models.get_model(name, weights=chosen)
        layers: Any = getattr(network, "classifier", None)
        several = isinstance(layers, nn.Sequential)
        hidden = [layer for layer in layers if isinstance(layer, nn.Linear)] if several else []
        if len(hidden) < 2:
            raise ValueError(
                f"ClassifierNetwork: {name} has no fully connected layer below its classes; choose alexnet or a vgg, "
                "or take BackboneNetwork, which adds layers to any body"
            )
        last = f"classifier.{len(layers) - 1}."
        network.classifier = layers[:-1]
        if is_file(weights):
            state = {key: value for key, value in read_state(str(weights)).items() if not key.startswith(last)}
            load_weights(network, state, source=str(weights))
        return network

    def maps(self, crops: Tensor) -> Tensor:
        """Return the pooled last map; see ``RegionNetwork``."""
        pooled: Tensor = self.avgpool(self.features(crops))  # (R, C, P, P)
        return pooled.flatten(1)  # (R, map_features)

    def vectors(self, maps: Tensor) -> Tensor:
        """Return the last hidden layer; see ``RegionNetwork``."""
        vectors: Tensor = self.classifier(maps)  # (R, out_features)
        return vectors


class BackboneNetwork(RegionNetwork):
    """Any backbone, its coarsest map averaged to a small one, and fully connected layers above, from random weights.

    Args:
        shape: of a crop, (3, S, S).
        backbone: the body, with its own weights; of its maps the last is used.
        output_size: cells of the side to which that map is averaged.
        widths: of the fully connected layers, the last of which gives ``fc7``.
        dropout: probability of dropping a number before each of them while training.

    Raises:
        ValueError: there is no fully connected layer, or the crop is too small.
    """

    def __init__(
        self,
        *,
        shape: Sequence[int],
        backbone: Backbone,
        output_size: int = 2,
        widths: Sequence[int] = (256,),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not widths:
            raise ValueError("BackboneNetwork: widths is empty; give one width at least, such as [256]")
        self.mean, self.std = list(backbone.mean), list(backbone.std)
        self.backbone = backbone
        self.pool = nn.AdaptiveAvgPool2d(output_size)
        _shape_of(backbone, shape, type(backbone).__name__)
        self.map_features = backbone.channels[-1] * output_size**2
        layers: list[nn.Module] = []
        for below, width in zip([self.map_features, *widths], widths, strict=False):
            layers += [nn.Dropout(dropout), nn.Linear(below, width), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)
        self.out_features = widths[-1]

    def maps(self, crops: Tensor) -> Tensor:
        """Return the averaged last map; see ``RegionNetwork``."""
        pooled: Tensor = self.pool(self.backbone(crops)[-1])  # (R, C, P, P)
        return pooled.flatten(1)  # (R, map_features)

    def vectors(self, maps: Tensor) -> Tensor:
        """Return the last fully connected layer; see ``RegionNetwork``."""
        vectors: Tensor = self.layers(maps)  # (R, out_features)
        return vectors


@torch.no_grad()
def _shape_of(network: nn.Module, shape: Sequence[int], name: str) -> Sequence[int]:
    """Return the shape of one crop's last map, found by a black crop; statistics of batch norms stay as they are."""
    modes = {module: module.training for module in network.modules()}
    try:
        found: Any = network.eval()(torch.zeros(1, *shape))
    except RuntimeError as error:
        raise ValueError(f"{name} cannot read crops of {tuple(shape)}: {error}; raise pooling.output_size") from error
    finally:
        for module, training in modes.items():
            module.training = training
    last: Tensor = found if isinstance(found, Tensor) else found[-1]
    return last.shape[1:]
