"""Transposed convolutions on a backbone's last map: Xiao, Wu and Wei, Simple Baselines, 2018, arXiv:1804.06208.

Three of them lead from stride 32 to stride 4. CenterNet's form (Zhou et al. 2019, arXiv:1904.07850, section 5 and
appendix) is narrower, 256, 128 and 64 channels, with a 3x3 convolution before each, there a deformable one.

Differs: the map is cut to ceil(size / stride) cells, so that any image size fits.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from detseg.nn.backbone import Backbone
from detseg.nn.deformable import convolution_block


class DeconvBackbone(Backbone):
    """A backbone whose last map is doubled again and again.

    Args:
        backbone: gives the map; what it gives besides is not read, so ask it for one stride. Registered as ``body``.
        widths: channels of each transposed convolution, which doubles the map.
        convolution: a 3x3 convolution before each of them, as in CenterNet; without, as in Simple Baselines.
        deformable: of that convolution; slow on a CPU.

    Raises:
        ValueError: there are more doublings than the map's stride has halvings, or ``deformable`` without
            ``convolution``.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        widths: Sequence[int] = (256, 256, 256),
        convolution: bool = False,
        deformable: bool = False,
    ) -> None:
        super().__init__()
        stride = backbone.strides[-1]
        if not widths or stride % 2 ** len(widths):
            raise ValueError(
                f"DeconvBackbone: {len(widths)} transposed convolutions cannot bring a map of stride {stride} to a "
                "whole stride; give between one and as many widths as the stride has halvings"
            )
        if deformable and not convolution:
            raise ValueError("DeconvBackbone: deformable is set, but there is no convolution; set convolution too")
        self.body = backbone
        layers: list[nn.Module] = []
        before = backbone.channels[-1]
        for width in widths:
            if convolution:
                layers.append(convolution_block(before, width, deformable=deformable))
                before = width
            doubling = nn.ConvTranspose2d(before, width, 4, stride=2, padding=1, bias=False)
            layers += [doubling, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            before = width
        self.up = nn.Sequential(*layers)
        self.channels, self.strides = [before], [stride // 2 ** len(widths)]
        self.mean, self.std = backbone.mean, backbone.std

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return one map ``(B, widths[-1], ceil(H / stride), ceil(W / stride))``."""
        stride = self.strides[0]
        large = self.up(self.body(images)[-1])  # (B, C, >= H / stride, >= W / stride)
        return [large[:, :, : -(-images.shape[2] // stride), : -(-images.shape[3] // stride)]]
