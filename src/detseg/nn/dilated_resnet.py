"""ResNet whose last stages are dilated instead of strided, as segmenters have it.

Chen et al. 2017, "Rethinking Atrous Convolution for Semantic Image Segmentation" (arXiv:1706.05587, section 3.1) and
Yu et al. 2017, "Dilated Residual Networks" (arXiv:1705.09914), over torchvision's ResNets.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torchvision
from torch import Tensor

from detseg.nn.backbone import Backbone, published_weights
from detseg.nn.norm import freeze_batch_norm
from detseg.nn.weights import load_weights

DILATED = {32: (False, False, False), 16: (False, False, True), 8: (False, True, True)}
"""Output stride -> which of layer2, layer3 and layer4 are dilated."""


class DilatedResNet(Backbone):
    """A ResNet of torchvision up to ``layer4``; keys are torchvision's (``conv1``, ``layer1``).

    Args:
        name: of torchvision's, with bottlenecks: ``resnet50``, ``resnet101``, ``resnext50_32x4d``.
        weights: ``default`` or a name of torchvision's (both download), the path of a state dict, or ``None``.
        output_stride: of the last map: 8, 16 or 32.
        stages: whose maps are given, 1 to 4, ascending.
        frozen_norm: batch norm keeps its statistics, scale and shift.

    Raises:
        ValueError: the stride is another, a stage is not there, or torchvision cannot dilate that network.
    """

    def __init__(
        self,
        *,
        name: str = "resnet50",
        weights: str | Path | None = None,
        output_stride: int = 8,
        stages: Sequence[int] = (3, 4),
        frozen_norm: bool = False,
    ) -> None:
        super().__init__()
        if output_stride not in DILATED or not stages or not {1, 2, 3, 4} >= set(stages):
            raise ValueError(
                f"DilatedResNet: output_stride {output_stride} must be one of {list(DILATED)}, stages {list(stages)} "
                "among 1 to 4"
            )
        try:
            network: Any = torchvision.models.get_model(
                name, weights=None, replace_stride_with_dilation=DILATED[output_stride]
            )
        except (TypeError, NotImplementedError) as error:
            raise ValueError(f"torchvision cannot dilate {name}: it does so for resnet50 and deeper") from error
        if weights is not None:
            state, mean, std = published_weights(name, weights)
            self.mean, self.std = mean or self.mean, std or self.std
            load_weights(network, state, drop_head=True, source=f"{name} {weights}")
        for layer, module in network.named_children():
            if layer not in ("avgpool", "fc"):
                self.add_module(layer, module)
        self.stages = list(stages)
        plain = {stage: 2 ** (stage + 1) for stage in range(1, 5)}
        self.strides = [min(plain[stage], output_stride) for stage in stages]
        self.channels = [256 * 2 ** (stage - 1) for stage in stages]
        if frozen_norm:
            freeze_batch_norm(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return one map per stage; see ``Backbone``."""
        maps = {}
        for name, layer in self.named_children():
            images = layer(images)  # (B, C, H / s, W / s)
            if name.startswith("layer"):
                maps[int(name[-1])] = images
        return [maps[stage] for stage in self.stages]
