"""Feature extractors by name, from torchvision and timm: an image in, one map per wanted stride out.

No paper of their own: each network's paper stands in the library that it comes from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from detseg.nn.norm import freeze_batch_norm
from detseg.nn.normalize import IMAGENET_MEAN, IMAGENET_STD
from detseg.nn.weights import HEADS, load_weights, read_state

FILE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")

VGG = {
    f"vgg{depth}{norm}": letter for depth, letter in zip((11, 13, 16, 19), "ABDE", strict=True) for norm in ("", "_bn")
}
"""torchvision's names of the VGGs, and their configurations in table 1 of the paper (arXiv:1409.1556)."""


class Backbone(nn.Module):
    """Base of every feature extractor.

    Attributes:
        channels: of each map that ``forward`` gives, finest first.
        strides: input pixels per cell of each map.
        mean: what the weights were trained with, RGB in [0, 1]; the model builds its ``Normalize`` from it.
        std: likewise.
    """

    channels: list[int]
    strides: list[int]
    mean: list[float]
    std: list[float]

    def __init__(self) -> None:
        super().__init__()
        self.channels, self.strides = [], []
        self.mean, self.std = list(IMAGENET_MEAN), list(IMAGENET_STD)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return maps ``(B, channels[i], ceil(H / strides[i]), ceil(W / strides[i]))`` of normalised images."""
        raise NotImplementedError


class TorchvisionBackbone(Backbone):
    """A classification network of torchvision, cut where its resolution halves.

    Its layers are registered under their own names (``conv1``, ``layer1``; or ``0``, ``1``, ... of ``features``),
    so the keys equal torchvision's: ``backbone.body.layer1...`` below a pyramid, ``backbone.layer1...`` without.

    Args:
        name: of ``torchvision.models``, such as ``resnet50`` or ``mobilenet_v2``.
        weights: ``default`` or a name of torchvision's (both download), the path of a state dict, or ``None``.
        strides: of the maps wanted, ascending powers of two.
        frozen_norm: batch norm keeps its statistics, scale and shift.
        frozen_stages: the first n halvings are not trained: 1 is the stem, 2 adds the layers of stride 4.
        v1_stride: ResNet as first published (He et al. 2015): stride 2 on the 1x1 convolution, as in Keras' weights.
            torchvision's own ("v1.5") has it on the 3x3.

    Raises:
        ValueError: the network has no map of a wanted stride, or no bottlenecks for ``v1_stride``.
    """

    def __init__(
        self,
        *,
        name: str,
        weights: str | Path | None = None,
        strides: Sequence[int] = (4, 8, 16, 32),
        frozen_norm: bool = False,
        frozen_stages: int = 0,
        v1_stride: bool = False,
    ) -> None:
        super().__init__()
        network = self._load(name, weights)
        if v1_stride:
            _move_stride_to_first_convolution(network, name)
        layers = dict((network.features if hasattr(network, "features") else network).named_children())
        outputs, self.channels = _cut(name, layers, strides)
        self.strides = list(strides)
        self.outputs = [outputs[stride] for stride in strides]
        last = list(layers).index(self.outputs[-1])
        self.layer_names = list(layers)[: last + 1]
        for layer in self.layer_names:
            self.add_module(layer, layers[layer])
        if frozen := [layer for stride, layer in outputs.items() if 1 < stride <= 2**frozen_stages]:
            early = self.layer_names[: self.layer_names.index(frozen[-1]) + 1]
            _freeze(self, [name for name, _ in self.named_parameters() if name.split(".")[0] in early])
        if frozen_norm:
            freeze_batch_norm(self)

    def _load(self, name: str, weights: str | Path | None) -> Any:
        known = torchvision.models.list_models(module=torchvision.models)
        if name not in known:
            raise ValueError(f"torchvision has no network {name!r}; it has {', '.join(known)}")
        if name in VGG:
            return self._load_vgg(name, weights)
        if weights is not None and not is_file(weights):
            enum = torchvision.models.get_model_weights(name)
            chosen: Any = enum["DEFAULT" if weights == "default" else str(weights)]
            transforms = chosen.transforms()
            self.mean, self.std = list(transforms.mean), list(transforms.std)
            return torchvision.models.get_model(name, weights=chosen)
        network: Any = torchvision.models.get_model(name, weights=None)
        for head in HEADS:
            if hasattr(network, head):
                setattr(network, head, nn.Identity())
        if weights is not None:
            load_weights(network, read_state(weights), drop_head=True, source=str(weights))
        return network

    def _load_vgg(self, name: str, weights: str | Path | None) -> nn.Module:
        """Build the convolutions alone: 90% of a VGG is its classifier, which takes seconds to draw."""
        network = nn.Module()
        network.features = _vgg_features(name)
        if weights is not None:
            state, mean, std = published_weights(name, weights)
            self.mean, self.std = mean or self.mean, std or self.std
            load_weights(network, state, drop_head=True, source=f"{name} {weights}")
        return network

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return one map per stride; see ``Backbone``."""
        maps = []
        for name in self.layer_names:
            images = self.get_submodule(name)(images)  # (B, C, H / s, W / s)
            if name in self.outputs:
                maps.append(images)
        return maps


class TimmBackbone(Backbone):
    """A network of timm in its ``features_only`` form, registered as ``net``.

    Args:
        name: of timm, such as ``tf_efficientnet_lite0``; any that has ``features_only``.
        weights: ``default`` or a tag of timm's such as ``a1_in1k`` (both download), the path of a state dict of the
            whole network with or without its classifier, or ``None``.
        strides: of the maps wanted, ascending.
        frozen_norm: batch norm keeps its statistics, scale and shift.
        frozen_stages: parameters of the layers up to the map of stride ``2 ** frozen_stages`` are not trained.

    Raises:
        ValueError: the network has no map of a wanted stride.
    """

    def __init__(
        self,
        *,
        name: str,
        weights: str | Path | None = None,
        strides: Sequence[int] = (4, 8, 16, 32),
        frozen_norm: bool = False,
        frozen_stages: int = 0,
    ) -> None:
        super().__init__()
        import timm  # 1.5 s: only where it is used

        tagged = name if weights in (None, "default") or is_file(weights) else f"{name}.{weights}"
        whole: Any = timm.create_model(name, features_only=True, pretrained=False)
        reductions: list[int] = list(whole.feature_info.reduction())
        if absent := [stride for stride in strides if stride not in reductions]:
            raise ValueError(f"{name} has maps of strides {reductions}, not {absent}; choose among those")
        places = [len(reductions) - 1 - reductions[::-1].index(stride) for stride in strides]
        chosen = [
            whole.feature_info.out_indices[place] for place in places
        ]  # DLA's first index, of stride 1, is left out
        net: Any = timm.create_model(
            tagged,
            features_only=True,
            out_indices=chosen,
            pretrained=weights is not None and not is_file(weights),
        )
        if weights is not None and is_file(weights):
            _load_timm(net, name, weights)
        self.net = net
        self.channels, self.strides = list(net.feature_info.channels()), list(strides)
        config = timm.get_pretrained_cfg(tagged)
        size = 64
        if config is not None:
            self.mean, self.std = list(config.mean), list(config.std)
            size = config.input_size[-1]
        if places[-1] < len(reductions) - 1:  # some families keep their last stages; DDP wants no unused parameters
            _freeze(net, set(dict(net.named_parameters())) - _reached(net, size, [True] * len(chosen)))
        if frozen_stages > 0:
            early = [stride <= 2**frozen_stages for stride in reductions]
            _freeze(net, _reached(whole, size, early))
        if frozen_norm:
            freeze_batch_norm(net)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return one map per stride; see ``Backbone``. Transformers' channels-last maps are permuted."""
        maps: list[Tensor] = self.net(images)
        return [
            level if level.shape[1] == channels else level.permute(0, 3, 1, 2).contiguous()  # (B, C, H / s, W / s)
            for level, channels in zip(maps, self.channels, strict=True)
        ]


def is_file(weights: str | Path | None) -> bool:
    """Tell the path of a weights file from the name of published weights."""
    return weights is not None and (isinstance(weights, Path) or str(weights).endswith(FILE_SUFFIXES) or "/" in weights)


def published_weights(
    name: str, weights: str | Path
) -> tuple[dict[str, Tensor], list[float] | None, list[float] | None]:
    """Return a state dict, and with which mean and standard deviation its images were normalised, where that is known.

    Args:
        name: of ``torchvision.models``.
        weights: ``default`` or a name of torchvision's (both download), or the path of a state dict.
    """
    if is_file(weights):
        return read_state(weights), None, None
    enum: Any = torchvision.models.get_model_weights(name)
    chosen = enum["DEFAULT" if weights == "default" else str(weights)]
    transforms = chosen.transforms()
    return chosen.get_state_dict(progress=False, check_hash=True), list(transforms.mean), list(transforms.std)


def _vgg_features(name: str) -> nn.Sequential:
    """Return ``features`` of one of torchvision's VGGs, drawn as it draws them."""
    features: nn.Sequential = make_layers(cfgs[VGG[name]], batch_norm=name.endswith("_bn"))
    for layer in features.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # it has a bias
    return features


def _load_timm(network: nn.Module, name: str, weights: str | Path) -> None:
    """Hold a state dict against the whole network, where every difference shows, then fill its cut form.

    timm joins some names when it cuts a network (``stages.0`` becomes ``stages_0``), so names are compared with
    their dots replaced.
    """
    import timm

    state = read_state(weights)
    load_weights(timm.create_model(name, pretrained=False, num_classes=0), state, drop_head=True, source=str(weights))
    joined = {key.replace(".", "_"): value for key, value in state.items()}
    own = [key for key in network.state_dict() if key.replace(".", "_") in joined]
    load_weights(network, {key: joined[key.replace(".", "_")] for key in own}, source=str(weights))


@torch.no_grad()
def _cut(name: str, layers: dict[str, Any], strides: Sequence[int]) -> tuple[dict[int, str], list[int]]:
    """Find the last layer at each stride by running a small black image, and the channels there."""
    last: dict[int, tuple[str, int]] = {}
    image = torch.zeros(1, 3, 64, 64)
    for layer, module in layers.items():
        training = module.training
        image = module.eval()(image)
        module.train(training)
        if image.ndim != 4 or image.shape[2] == 0 or image.shape[2] != image.shape[3]:
            break
        if layer == "avgpool" or layer in HEADS:
            break
        last[64 // image.shape[2]] = (layer, image.shape[1])
    if absent := [stride for stride in strides if stride not in last]:
        raise ValueError(f"torchvision's {name} has maps of strides {list(last)}, not {absent}; choose among those")
    return {stride: layer for stride, (layer, _) in last.items()}, [last[stride][1] for stride in strides]


def _reached(network: Any, size: int, chosen: Sequence[bool]) -> set[str]:
    """Name the parameters that the chosen maps depend on, found by a backward pass through one grey image."""
    maps = network.eval()(torch.zeros(1, 3, size, size))
    total = sum(level.sum() for level, wanted in zip(maps, chosen, strict=True) if wanted)
    network.train()
    names, parameters = zip(*network.named_parameters(), strict=True)
    if not isinstance(total, Tensor):
        return set()
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return {name for name, gradient in zip(names, gradients, strict=True) if gradient is not None}


def _freeze(network: nn.Module, names: Iterable[str]) -> None:
    """Stop the named parameters, and the statistics of batch norms among them, from changing."""
    for name in names:
        network.get_parameter(name).requires_grad_(False)
    freeze_batch_norm(network, untrained_only=True)


def _move_stride_to_first_convolution(network: Any, name: str) -> None:
    for stage in ("layer2", "layer3", "layer4"):
        block = getattr(network, stage, [None])[0]
        if not hasattr(block, "conv3"):
            raise ValueError(f"v1_stride is for ResNets with bottlenecks (resnet50 and deeper), not for {name}")
        block.conv1.stride, block.conv2.stride = (2, 2), (1, 1)
