"""VGG-16 and networks like it, as encoder-decoders want them: the poolings' maps, their switches, fc6 and fc7.

Simonyan & Zisserman 2014, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (arXiv:1409.1556),
configuration D. As changed by those who segment: fully connected layers as convolutions (Long et al. 2015,
arXiv:1411.4038, section 3.1), poolings left out with dilated layers in their place (Yu & Koltun 2016, arXiv:1511.07122,
section 4). fc6 is padded, so that maps keep their size and images of any size will do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F  # torch's own convention
from torch import Tensor, nn
from torchvision.models.vgg import make_layers

from detseg.nn.backbone import Backbone, published_weights
from detseg.nn.undrawn import undrawn
from detseg.nn.weights import load_weights
from detseg.ops.upsampling import pool_with_switches


class PoolingEncoder(Backbone):
    """Base of AlexNet's and VGG's encoders: ``features`` with their poolings, then ``fc``; see ``forward``."""

    features: nn.Sequential
    fc: nn.Sequential
    stem_stride = 1
    """Pixels per cell before the first pooling."""

    def load_published(self, name: str, weights: str | Path, layers: Mapping[str, str]) -> None:
        """Load torchvision's network, its fully connected layers too where they have the shape of ours.

        Args:
            name: of torchvision's network.
            weights: ``default`` or a name (both download), or the path of its state dict.
            layers: names of our convolutions and of its layers, such as ``{"fc.0": "classifier.0"}``.
        """
        state, mean, std = published_weights(name, weights)
        self.mean, self.std = mean or self.mean, std or self.std
        own = self.state_dict()
        kept = {key: value for key, value in own.items() if key.startswith("fc.")}
        found = {key: value for key, value in state.items() if key.startswith("features.")}
        load_weights(self, kept | found | _as_convolutions(own, state, layers), source=f"{name} {weights}")

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return one map per stride; see ``Backbone``. Sides are rounded down where a pooling halves odd ones."""
        maps, stride = {}, self.stem_stride
        for layer in self.features:
            images = layer(images)
            if isinstance(layer, nn.MaxPool2d):
                stride *= 2
                maps[stride] = images  # (B, C, H / stride, W / stride)
        maps[stride] = self.last(images)
        return [maps[wanted] for wanted in self.strides]

    def last(self, maps: Tensor) -> Tensor:
        """Return ``(B, D, h, w)``, what ``fc`` makes of the last map ``(B, C, h, w)``."""
        result: Tensor = self.fc(maps)
        return result


class VGGEncoder(PoolingEncoder):
    """Stages of 3x3 convolutions, each ended by a pooling; layers bear torchvision's names (``features.0``, ...).

    Maps come after the poolings, at strides 2, 4, 8, ...; the last one may be that of fc7.

    Args:
        widths: channels of the stages.
        convolutions: of each stage.
        norm: batch norm after each, as in torchvision's ``vgg16_bn``.
        strides: of the maps wanted, ascending; ``None`` means all.
        fully_connected: width of fc6 and fc7 as convolutions on the last map there is; 0 leaves them out.
        kernel: side of fc6.
        dropout: probability, after fc6 and fc7.
        output_stride: of the last map; poolings beyond it are left out, and later layers dilated. ``None`` leaves none
            out.
        weights: ``default`` or a name of torchvision's for ``vgg16`` or ``vgg16_bn`` (both download), the path of its
            state dict, or ``None``. fc6 and fc7 start from its classifier where they have its shape.

    Raises:
        ValueError: stages and counts differ in number, a stride is not there or none is wanted, or the output
            stride is none of theirs.
    """

    def __init__(
        self,
        *,
        widths: Sequence[int] = (64, 128, 256, 512, 512),
        convolutions: Sequence[int] = (2, 2, 3, 3, 3),
        norm: bool = False,
        strides: Sequence[int] | None = None,
        fully_connected: int = 0,
        kernel: int = 7,
        dropout: float = 0.5,
        output_stride: int | None = None,
        weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        all_strides = [2 ** (stage + 1) for stage in range(len(widths))]
        self.output_stride = all_strides[-1] if output_stride is None else output_stride
        wanted = (
            [stride for stride in all_strides if stride <= self.output_stride] if strides is None else list(strides)
        )
        if len(widths) != len(convolutions) or self.output_stride not in all_strides or kernel % 2 == 0:
            raise ValueError(
                f"VGGEncoder: widths {list(widths)} and convolutions {list(convolutions)} need one number per stage, "
                f"output_stride {output_stride} must be one of {all_strides}, kernel {kernel} odd"
            )
        absent = [stride for stride in wanted if stride > self.output_stride or stride not in all_strides]
        if absent or not wanted:
            raise ValueError(f"VGGEncoder has maps of strides {all_strides} up to {self.output_stride}, not {absent}")
        layout = [step for width, count in zip(widths, convolutions, strict=True) for step in [*[width] * count, "M"]]
        self.features = make_layers(layout, batch_norm=norm)
        initialise(self.features)
        dilation = self._dilate()
        self.fc = fully_connected_layers(
            widths[-1], fully_connected, kernel, padding=dilation * (kernel // 2), dilation=dilation, dropout=dropout
        )
        self.strides = wanted
        self.channels = [widths[all_strides.index(stride)] for stride in wanted]
        if wanted[-1] == self.output_stride:  # the last map there is, of the last stage and of fc7
            self.channels[-1] = fully_connected or widths[-1]
        if weights is not None:
            layers = {"fc.0": "classifier.0", "fc.3": "classifier.3"}
            self.load_published("vgg16_bn" if norm else "vgg16", weights, layers)

    def _dilate(self) -> int:
        """Leave out the poolings beyond the output stride and dilate what follows; return fc6's dilation."""
        stride, dilation = 1, 1
        for index, layer in enumerate(self.features):
            if isinstance(layer, nn.MaxPool2d):
                if stride < self.output_stride:
                    stride *= 2
                else:
                    dilation *= 2
                    self.features[index] = nn.Identity()  # the numbers of the layers stay torchvision's
            elif isinstance(layer, nn.Conv2d):
                layer.dilation, layer.padding = (dilation, dilation), (dilation, dilation)
        return dilation

    def with_switches(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the last map, and of each pooling the places of the maxima, for unpooling.

        Args:
            images: normalised, ``(B, 3, H, W)``; both sides multiples of the output stride.

        Returns:
            ``(B, C, H / s, W / s)``; and per pooling ``(B, C, h, w)`` int64, first pooling first.
        """
        switches = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                images, places = pool_with_switches(images)  # (B, C, h / 2, w / 2) each
                switches.append(places)
            else:
                images = layer(images)
        return self.fc(images), switches


class SubgridConvolution(nn.Conv2d):
    """A dilated convolution that keeps the size; on a CPU done as an undilated one on each of ``d * d`` sub-grids.

    Cells that a dilated kernel sees together lie on one sub-grid, so the result is the same. torch 2.14 takes 17 s on
    one core for the gradient of a 7x7 kernel of dilation 4 from 512 to 4096 channels on 64 cells, and 1 s this way.
    """

    def forward(self, maps: Tensor) -> Tensor:
        """Return ``(B, D, H, W)`` of ``(B, C, H, W)``."""
        step = self.dilation[0]
        if step == 1 or maps.device.type != "cpu":
            return super().forward(maps)
        batch, channels, height, width = maps.shape
        rows, columns = -(-height // step), -(-width // step)
        maps = F.pad(maps, (0, columns * step - width, 0, rows * step - height))  # zeros, as all padding is
        grids = maps.reshape(batch, channels, rows, step, columns, step).permute(0, 3, 5, 1, 2, 4)
        grids = grids.reshape(batch * step * step, channels, rows, columns)  # (B * d * d, C, h, w)
        result = F.conv2d(grids, self.weight, self.bias, padding=self.kernel_size[0] // 2)  # (B * d * d, D, h, w)
        result = result.reshape(batch, step, step, -1, rows, columns).permute(0, 3, 4, 1, 5, 2)
        return result.reshape(batch, -1, rows * step, columns * step)[:, :, :height, :width]  # (B, D, H, W)


def fully_connected_layers(
    channels: int, width: int, kernel: int, *, padding: int, dilation: int = 1, dropout: float = 0.5
) -> nn.Sequential:
    """Return fc6 and fc7 as convolutions, each with ReLU and dropout, drawn but once: they are large.

    Args:
        channels: of the last map.
        width: channels of both; 0 gives no layers.
        kernel: side of fc6, in cells.
        padding: of fc6, in cells at each side.
        dilation: of fc6.
        dropout: probability.
    """
    if not width:
        return nn.Sequential()
    six = undrawn(lambda: SubgridConvolution(channels, width, kernel, padding=padding, dilation=dilation))
    seven = undrawn(lambda: nn.Conv2d(width, width, 1))
    layers = nn.Sequential(
        six, nn.ReLU(inplace=True), nn.Dropout(dropout), seven, nn.ReLU(inplace=True), nn.Dropout(dropout)
    )
    initialise(layers)
    return layers


def initialise(layers: nn.Module) -> None:
    """Draw the weights of every convolution for the ReLU after it (He et al. 2015, arXiv:1502.01852); biases are 0."""
    for layer in layers.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _as_convolutions(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], layers: Mapping[str, str]
) -> dict[str, Tensor]:
    """Return a classifier's fully connected layers in the shape of convolutions, or nothing.

    Args:
        own: state dict of the network that has the convolutions.
        state: the published one.
        layers: names of the former and of the latter's layers, such as ``{"fc.0": "classifier.0"}``.

    Returns:
        Weights and biases by ``own``'s names; nothing at all where one is missing, of another size or not finite.
    """
    found: dict[str, Tensor] = {}
    for ours, theirs in layers.items():
        for part in ("weight", "bias"):
            name, source = f"{ours}.{part}", state.get(f"{theirs}.{part}")
            fits = name in own and source is not None and source.numel() == own[name].numel()
            if not fits or source is None or not bool(torch.isfinite(source).all()):
                return {}
            found[name] = source.reshape(own[name].shape)
    return found
