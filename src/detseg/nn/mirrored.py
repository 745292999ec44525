"""A decoder that undoes a VGG-like encoder stage by stage, with the switches of its poolings.

Noh et al. 2015, "Learning Deconvolution Network for Semantic Segmentation" (arXiv:1505.04366, section 3.2), and
Badrinarayanan et al. 2017, "SegNet" (arXiv:1511.00561, section 3), which share it but for the kind of layers.

B = images, C = channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from detseg.nn.upsampling import MaxUnpooling


class MirroredDecoder(nn.Module):
    """Per stage of the encoder, last first: enlarge twofold, then as many 3x3 layers, each with batch norm and ReLU.

    The last layer of a stage changes the channels to those of the stage before it.

    Args:
        widths: channels of the encoder's stages, first stage first.
        convolutions: of each stage.
        upsample: makes the layer that enlarges maps from channels, width and factor.
        transposed: layers are transposed convolutions of stride 1, as in DeconvNet.
        last: whether the first stage's last layer is built; SegNet scores in its place.
    """

    def __init__(
        self,
        *,
        widths: Sequence[int],
        convolutions: Sequence[int],
        upsample: Callable[..., nn.Module] = MaxUnpooling,
        transposed: bool = False,
        last: bool = True,
    ) -> None:
        super().__init__()
        kind = nn.ConvTranspose2d if transposed else nn.Conv2d
        self.enlarge, self.stages = nn.ModuleList(), nn.ModuleList()
        for stage in reversed(range(len(widths))):
            width, after = widths[stage], widths[max(stage - 1, 0)]
            self.enlarge.append(upsample(channels=width, width=width, factor=2))
            layers = convolutions[stage] - (stage == 0 and not last)
            steps: list[nn.Module] = []
            for layer in range(layers):
                result = after if layer == convolutions[stage] - 1 else width
                convolution = kind(width, result, 3, padding=1, bias=False)
                nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
                steps += [convolution, nn.BatchNorm2d(result), nn.ReLU(inplace=True)]
            self.stages.append(nn.Sequential(*steps))

    def forward(self, maps: Tensor, switches: Sequence[Tensor]) -> Tensor:
        """Return ``(B, widths[0], f h, f w)``, f two to the number of stages.

        Args:
            maps: ``(B, widths[-1], h, w)``.
            switches: of the encoder's poolings, first pooling first, ``(B, widths[i], ...)`` int64.
        """
        for enlarge, stage, places in zip(self.enlarge, self.stages, reversed(switches), strict=True):
            maps = stage(enlarge(maps, places))  # (B, C, 2 h, 2 w)
        return maps
