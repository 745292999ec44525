"""Fully connected layers as convolutions, so that a classifier of patches slides over a whole image by itself.

Long et al. 2015, "Fully Convolutional Networks for Semantic Segmentation" (arXiv:1411.4038, section 3.1); earlier
Sermanet et al. 2014, "OverFeat" (arXiv:1312.6229, section 3.5).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F  # torch's own convention
from torch import Tensor, nn

from detseg.nn.undrawn import undrawn


class LinearAsConvolution(nn.Module):
    """A fully connected layer applied at every place; its weights stay the layer's own.

    Args:
        layer: of ``C * h * w`` inputs.
        shape: (C, h, w), of one patch's maps.
        dilation: cells between those that belong to one patch.

    Raises:
        ValueError: the layer has another number of inputs.
    """

    def __init__(self, *, layer: nn.Linear, shape: Sequence[int], dilation: int = 1) -> None:
        super().__init__()
        channels, height, width = shape
        if layer.in_features != channels * height * width:
            raise ValueError(
                f"a layer of {layer.in_features} inputs does not see maps of {tuple(shape)}, which have "
                f"{channels * height * width} numbers"
            )
        self.layer, self.shape, self.dilation = layer, (channels, height, width), dilation

    @property
    def kernel(self) -> Tensor:
        """Return the weights as ``(outputs, C, h, w)``, a view."""
        return self.layer.weight.view(-1, *self.shape)

    def forward(self, maps: Tensor) -> Tensor:
        """Return ``(B, outputs, H - d (h - 1), W - d (w - 1))`` of ``(B, C, H, W)``, d the dilation."""
        return F.conv2d(maps, self.kernel, self.layer.bias, dilation=self.dilation)

    def convolution(self) -> nn.Conv2d:
        """Return a convolution with a copy of the weights."""
        outputs, (channels, height, width) = self.layer.out_features, self.shape
        bias = self.layer.bias  # ``None`` where there is none, whatever torch's types say
        result = undrawn(
            lambda: nn.Conv2d(channels, outputs, (height, width), dilation=self.dilation, bias=bias is not None)
        )
        result.to(self.kernel.device)
        result.load_state_dict({"weight": self.kernel} | ({} if bias is None else {"bias": bias}))
        return result


def convolutionalise(
    network: nn.Sequential, shape: Sequence[int], *, share: bool = False, dilation: int = 1
) -> nn.Sequential:
    """Turn the end of a classifier into convolutions: what it says of a patch, it then says at every place of a map.

    Args:
        network: ``Flatten`` and ``Linear`` layers, with anything between that treats numbers one by one.
        shape: (C, h, w), of the maps that one patch gives; the first ``Linear`` becomes a convolution of h by w cells,
            later ones of one cell.
        dilation: cells of the map between those that belong to one patch.
        share: the result uses the weights of ``network`` themselves; otherwise copies of them, in ``nn.Conv2d``.

    Returns:
        from maps ``(B, C, H, W)`` to ``(B, outputs, H - d (h - 1), W - d (w - 1))``, d the dilation.

    Raises:
        ValueError: the shapes disagree.
    """
    layers: list[nn.Module] = []
    for layer in network:
        if isinstance(layer, nn.Flatten):
            continue
        if isinstance(layer, nn.Linear):
            converted = LinearAsConvolution(layer=layer, shape=shape, dilation=dilation)
            layers.append(converted if share else converted.convolution())
            shape = (layer.out_features, 1, 1)
        else:
            layers.append(layer)
    return nn.Sequential(*layers)
