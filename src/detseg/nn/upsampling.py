"""Enlarging maps inside a network: six ways behind one interface, so that a decoder takes any of them.

Nearest and bilinear interpolation, bed of nails and max-unpooling learn nothing; where the number of channels changes
a 1x1 convolution does that before. Transposed convolution: Long et al. 2015, "Fully Convolutional Networks for Semantic
Segmentation" (arXiv:1411.4038, section 3.3), with their bilinear initial weights on request. Resize-convolution:
Odena et al. 2016, "Deconvolution and Checkerboard Artifacts" (Distill).

B = images, C = channels before, D = width, channels after, h, w = cells before, f = factor.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # torch's own convention
from torch import Tensor, nn

from detseg.ops.upsampling import bed_of_nails, bilinear_kernel, unpool


class Upsampling(nn.Module):
    """Base of what has nothing to learn but the change of channels.

    ``needs_switches`` says whether ``forward`` wants the places of the maxima from the pooling that it undoes.

    Args:
        channels: of the maps before.
        width: channels after.
        factor: by which both sides grow.
    """

    needs_switches = False

    def __init__(self, *, channels: int, width: int, factor: int = 2) -> None:
        super().__init__()
        self.factor = factor
        self.project = nn.Identity() if channels == width else nn.Conv2d(channels, width, kernel_size=1)

    def forward(self, maps: Tensor, switches: Tensor | None = None) -> Tensor:
        """Return ``(B, D, f h, f w)``.

        Args:
            maps: ``(B, C, h, w)``.
            switches: ``(B, D, h, w)`` int64 of the pooling, read by unpooling alone.
        """
        return self.enlarge(self.project(maps), switches)

    def enlarge(self, maps: Tensor, switches: Tensor | None) -> Tensor:
        """Return ``(B, D, f h, f w)`` of ``(B, D, h, w)``."""
        raise NotImplementedError


class NearestUpsampling(Upsampling):
    """Every value fills its block."""

    def enlarge(self, maps: Tensor, switches: Tensor | None) -> Tensor:
        """Return ``(B, D, f h, f w)``."""
        return F.interpolate(maps, scale_factor=float(self.factor), mode="nearest")


class BilinearUpsampling(Upsampling):
    """Values between the centres of cells are interpolated."""

    def enlarge(self, maps: Tensor, switches: Tensor | None) -> Tensor:
        """Return ``(B, D, f h, f w)``."""
        return F.interpolate(maps, scale_factor=float(self.factor), mode="bilinear", align_corners=False)


class BedOfNails(Upsampling):
    """Every value stands in the top left corner of a block of zeros."""

    def enlarge(self, maps: Tensor, switches: Tensor | None) -> Tensor:
        """Return ``(B, D, f h, f w)``."""
        return bed_of_nails(maps, self.factor)


class MaxUnpooling(Upsampling):
    """Every value goes back to where the pooling's maximum was; zeros elsewhere."""

    needs_switches = True

    def enlarge(self, maps: Tensor, switches: Tensor | None) -> Tensor:
        """Return ``(B, D, f h, f w)``."""
        if switches is None:
            raise ValueError("max-unpooling needs switches: this decoder undoes no max pooling; use another upsample")
        return unpool(maps, switches, self.factor)


class TransposedConvolution(nn.ConvTranspose2d):
    """Every value paints the kernel, times its weight, onto the larger map.

    Args:
        channels: of the maps before.
        width: channels after.
        factor: by which both sides grow; the stride.
        kernel: its side, at least ``factor``; ``None`` means ``factor``, or with ``bilinear`` what interpolates.
        bilinear: start from interpolation, channel by channel.
        learn: ``False`` keeps the initial weights, as FCN does in its last layer.
        depthwise: no weights between channels.
        bias: a constant per channel.

    Raises:
        ValueError: the kernel is smaller than the factor, or channels and width differ where they must not.
    """

    needs_switches = False

    def __init__(
        self,
        *,
        channels: int,
        width: int,
        factor: int = 2,
        kernel: int | None = None,
        bilinear: bool = False,
        learn: bool = True,
        depthwise: bool = False,
        bias: bool = True,
    ) -> None:
        kernel = (2 * factor - factor % 2 if bilinear else factor) if kernel is None else kernel
        if kernel < factor:
            raise ValueError(
                f"TransposedConvolution: kernel {kernel} leaves gaps at factor {factor}; use {factor} or more"
            )
        if (bilinear or depthwise) and channels != width:
            raise ValueError(
                f"TransposedConvolution: {channels} channels become {width}, but bilinear weights and depthwise=true "
                "keep their number; change it by a 1x1 convolution before"
            )
        padding = (kernel - factor + 1) // 2
        super().__init__(
            channels,
            width,
            kernel,
            stride=factor,
            padding=padding,
            output_padding=2 * padding - (kernel - factor),  # so that the result is exactly f h by f w
            groups=channels if depthwise else 1,
            bias=bias,
        )
        self.factor, self.bilinear = factor, bilinear
        if bilinear:
            self.interpolate()
        self.requires_grad_(learn)

    @torch.no_grad()
    def interpolate(self) -> None:
        """Set the weights so that every channel is interpolated bilinearly."""
        self.weight.zero_()
        own = torch.arange(self.in_channels)
        other = own if self.groups == 1 else torch.zeros_like(own)
        self.weight[own, other] = bilinear_kernel(self.kernel_size[0], self.factor)
        if self.bias is not None:
            self.bias.zero_()

    def forward(  # type: ignore[override]  # the second argument of torch's is a size, which is fixed here
        self, maps: Tensor, switches: Tensor | None = None
    ) -> Tensor:
        """Return ``(B, D, f h, f w)`` of ``(B, C, h, w)``; ``switches`` are not read."""
        return super().forward(maps)


class ResizeConvolution(nn.Module):
    """Interpolate, then convolve: every output cell sees as many input cells as the next.

    Args:
        channels: of the maps before.
        width: channels after.
        factor: by which both sides grow.
        kernel: side of the convolution, odd.
        mode: ``nearest`` or ``bilinear``.

    Raises:
        ValueError: the kernel is even, or the mode another.
    """

    needs_switches = False

    def __init__(self, *, channels: int, width: int, factor: int = 2, kernel: int = 3, mode: str = "nearest") -> None:
        super().__init__()
        if kernel % 2 == 0 or mode not in ("nearest", "bilinear"):
            raise ValueError(f"ResizeConvolution: kernel {kernel} must be odd, mode {mode!r} nearest or bilinear")
        self.factor, self.mode = factor, mode
        self.convolution = nn.Conv2d(channels, width, kernel, padding=kernel // 2)

    def forward(self, maps: Tensor, switches: Tensor | None = None) -> Tensor:
        """Return ``(B, D, f h, f w)`` of ``(B, C, h, w)``; ``switches`` are not read."""
        align = None if self.mode == "nearest" else False
        maps = F.interpolate(maps, scale_factor=float(self.factor), mode=self.mode, align_corners=align)
        result: Tensor = self.convolution(maps)  # (B, D, f h, f w)
        return result
