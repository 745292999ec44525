"""U-Net.

Ronneberger, Fischer & Brox 2015, "U-Net: Convolutional Networks for Biomedical Image Segmentation" (arXiv:1505.04597).

Built (figure 1): four times two 3x3 convolutions without padding and a 2x2 max pooling, widths 64 to 1024; back up by
2x2 up-convolutions that halve the width, with the cropped map of the way down put beside; a 1x1 convolution at the
end. Dropout at the end of the contracting path (section 3.1), Gaussian initial weights of deviation sqrt(2 / N)
(section 3). The overlap-tile strategy (section 2, figure 2): each image of a batch is continued by its own mirror
picture, so that logits come for every input pixel; 572 pixels give 388 when it is not.

Different: an image is one tile, however large, unless ``tile`` cuts it; the loss is a weighted mean, not equation 1's
sum, and its weights are without w_c of equation 2. Options that the paper has not: padded convolutions, batch norm, any
width, depth, block and way to enlarge maps, and ``BackboneUNet``, whose contracting path is a classification network
(as in segmentation_models and TernausNet, Iglovikov & Shvets 2018, arXiv:1801.05746).

B = images, C = channels, K = classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F  # torch's own convention
from torch import Tensor, nn

from detseg.models.segmenter import AnyMapLoss, SemanticSegmenter
from detseg.nn import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Backbone,
    DoubleConvolution,
    NearestUpsampling,
    Normalize,
    TransposedConvolution,
)
from detseg.nn.unet_blocks import crop
from detseg.ops.upsampling import pool_with_switches
from detseg.structures import Target


class UNet(SemanticSegmenter):
    """The paper's network; see the head of this file.

    Args:
        num_classes: classes of the semantic map, background included.
        width: channels of the first level, doubled at each further one.
        depth: poolings.
        padding: pad each 3x3 convolution by one pixel, so maps keep their size (not in the paper, but usual).
        norm: batch norm after each 3x3 convolution (not in the paper).
        dropout: probability at the end of the contracting path: after the last two levels.
        mean: subtracted from RGB in [0, 1].
        std: divided by.
        block: makes what stands at each level from channels, width, padding and norm; the paper's is two convolutions.
        upsample: makes the layer that doubles a map from its channels, width and factor.
        tile: side of the tiles of logits that are computed one after the other, 388 in the paper; ``None`` computes
            the whole image at once. The logits are the same, but for dropout and batch norm in training, which see
            one tile. In prediction the maps of one tile are in memory; in training gradients need those of all.
        loss: gives the named terms; ``None`` means plain cross entropy.
        separation: w0 of the weight map (10 in the paper), 0 for none; needs instance masks.
        regions: without instance masks, the connected regions of each class but 0 are the objects.

    Raises:
        ValueError: the network cannot give a tile of that side.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        width: int = 64,
        depth: int = 4,
        padding: bool = False,
        norm: bool = False,
        dropout: float = 0.5,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        block: Callable[..., nn.Module] = DoubleConvolution,
        upsample: Callable[..., nn.Module] = TransposedConvolution,
        tile: int | None = None,
        loss: AnyMapLoss | None = None,
        separation: float = 0.0,
        regions: bool = False,
    ) -> None:
        super().__init__(num_classes=num_classes, loss=loss, separation=separation, regions=regions)
        self.depth, self.padding, self.tile = depth, padding, tile
        self._check_tile()
        self.normalize = Normalize(mean, std)
        widths = [width * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList(
            block(before, after, padding=padding, norm=norm)
            for before, after in zip([3, *widths], widths, strict=False)
        )
        self.dropout = nn.Dropout(dropout)
        self.up = nn.ModuleList(
            UpStep(
                2 * after, after, convolutions=block(2 * after, after, padding=padding, norm=norm), upsample=upsample
            )
            for after in reversed(widths[:-1])
        )
        self.head = nn.Conv2d(width, num_classes, kernel_size=1)
        initialise(self)

    def forward(self, images: Tensor, sizes: Tensor | None = None, targets: list[Target] | None = None) -> Tensor:
        """Return logits ``(B, K, H, W)`` for every pixel of images of any size; ``targets`` are not read."""
        height, width = images.shape[-2:]
        images = self.normalize(images, sizes)  # (B, 3, H, W)
        rows, columns = self.context(height), self.context(width)
        # With padded convolutions the batch's padding stays zero, as in every other model
        continued = mirror(images, rows, columns, None if self.padding else sizes)  # (B, 3, H + margins, W + margins)
        logits = self.network(continued) if self.tile is None else self.tiled(continued)  # (B, K, H + more, W + more)
        return logits[:, :, :height, :width]

    @property
    def margin(self) -> int:
        """By how many pixels the logits are fewer than the input's: 184 in the paper, 0 with padding."""
        step = 2**self.depth
        # Two 3x3 convolutions per level cost 4 pixels of that level, on the way down and again on the way up
        return 0 if self.padding else 4 * (step + 2 * (step - 1))  # 4 (16 + 2 * 15) = 184

    def context(self, length: int) -> tuple[int, int]:
        """Return by how many pixels ``length`` must grow before and after, to get at least ``length`` logits back."""
        step = 2**self.depth
        if self.padding:
            return 0, -length % step
        lost = self.margin
        coarse = -(-(length + lost - 4 * (step - 1)) // step)
        return lost // 2, step * coarse + 4 * (step - 1) - length - lost // 2

    def _check_tile(self) -> None:
        step = 2**self.depth
        rest = 4 % step  # the sizes that even levels leave: 16 n + 4
        if self.tile is None or (not self.padding and self.tile >= step and self.tile % step == rest):
            return
        fits = max(self.tile // step, 1) * step + rest
        raise ValueError(
            f"UNet: tile {self.tile} with depth {self.depth} and padding {self.padding}; tiles need padding=false and "
            f"sides {step} n + {rest}, such as {fits}"
        )

    def tiled(self, images: Tensor) -> Tensor:
        """Return what ``network`` does, tile after tile (figure 2), each from its own part of the images.

        Tiles begin at multiples of ``2 ** depth``, where the whole image's poolings begin too; they overlap a little.

        Args:
            images: normalised and continued, ``(B, 3, H, W)``.
        """
        assert self.tile is not None
        step = self.tile - self.tile % 2**self.depth
        height, width = (length - self.margin for length in images.shape[-2:])
        logits = images.new_zeros(len(images), self.num_classes, height, width)  # (B, K, H - margin, W - margin)
        reach = self.tile + self.margin
        overlap = self.tile - step  # the tile before has these pixels too
        for top in range(0, max(height - overlap, 1), step):
            for left in range(0, max(width - overlap, 1), step):
                part = self.network(images[:, :, top : top + reach, left : left + reach])  # (B, K, tile, tile)
                logits[:, :, top : top + part.shape[2], left : left + part.shape[3]] = part
        return logits

    def network(self, images: Tensor) -> Tensor:
        """Return the network's own logits: smaller than the images unless ``padding`` (572 gives 388).

        Args:
            images: normalised, ``(B, 3, H, W)``; every level must have an even size before it is pooled.

        Raises:
            ValueError: a level has an odd size.
        """
        skips: list[Tensor] = []
        switches: list[Tensor | None] = []
        maps = images
        for level, block in enumerate(self.down):
            maps = block(maps)  # (B, width * 2 ** level, h, w)
            if level >= self.depth - 1:
                maps = self.dropout(maps)
            if level < self.depth:
                if maps.shape[-2] % 2 or maps.shape[-1] % 2:
                    raise ValueError(f"U-Net level {level} is {tuple(maps.shape[-2:])}, which 2x2 pooling cannot halve")
                skips.append(maps)
                maps, places = self.pool(maps)  # (B, C, h / 2, w / 2)
                switches.append(places)
        for step, skip, places in zip(self.up, reversed(skips), reversed(switches), strict=True):
            maps = step(maps, skip, places)  # (B, C / 2, 2 h, 2 w)
        logits: Tensor = self.head(maps)  # (B, K, h, w)
        return logits

    def pool(self, maps: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return maps ``(B, C, h / 2, w / 2)``, and where the maxima were if the way back up reads that."""
        wanted = any(step.upsample.needs_switches for step in self.up)  # type: ignore[union-attr]  # UpSteps
        return pool_with_switches(maps) if wanted else (F.max_pool2d(maps, 2), None)


class BackboneUNet(SemanticSegmenter):
    """U-Net whose contracting path is a backbone: up-sample, put the finer map beside, two 3x3 convolutions.

    Args:
        num_classes: classes of the semantic map, background included.
        backbone: gives maps whose strides double from 2 or 4 on, such as (2, 4, 8, 16, 32).
        widths: channels of the steps of the expanding path, coarsest first: one per pair of neighbouring strides.
        norm: batch norm after each convolution of the expanding path.
        upsample: makes the layer that doubles a map from its channels, width and factor.
        loss: gives the named terms; ``None`` means plain cross entropy.
        separation: w0 of the weight map (10 in the paper), 0 for none; needs instance masks.

    Raises:
        ValueError: the number of widths is not one less than that of the maps, or the strides do not double.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        backbone: Backbone,
        widths: Sequence[int] = (256, 128, 64, 32),
        norm: bool = True,
        upsample: Callable[..., nn.Module] = NearestUpsampling,
        loss: AnyMapLoss | None = None,
        separation: float = 0.0,
    ) -> None:
        super().__init__(num_classes=num_classes, loss=loss, separation=separation)
        strides = backbone.strides
        if len(widths) != len(strides) - 1 or strides != [strides[0] * 2**level for level in range(len(strides))]:
            raise ValueError(
                f"BackboneUNet needs strides that double and one width per step: got strides {strides} and "
                f"{len(widths)} widths; use strides=(2,4,8,16,32) with 4 widths"
            )
        self.normalize = Normalize(backbone.mean, backbone.std)
        self.backbone = backbone
        skips = backbone.channels[-2::-1]  # finest last
        before = [backbone.channels[-1], *widths[:-1]]
        self.up = nn.ModuleList(
            DoubleConvolution(coarse + skip, width, padding=True, norm=norm)
            for coarse, skip, width in zip(before, skips, widths, strict=True)
        )
        self.enlarge = nn.ModuleList(upsample(channels=coarse, width=coarse, factor=2) for coarse in before)
        self.head = nn.Conv2d(widths[-1], num_classes, kernel_size=1)
        initialise(self.up)
        initialise(self.head)

    def forward(self, images: Tensor, sizes: Tensor | None = None, targets: list[Target] | None = None) -> Tensor:
        """Return logits ``(B, K, H, W)`` for every pixel of images of any size; ``targets`` are not read."""
        height, width = images.shape[-2:]
        step = self.backbone.strides[-1]
        padding = (0, -width % step, 0, -height % step)
        images = F.pad(self.normalize(images, sizes), padding)  # (B, 3, H', W'), zero as all padding is
        *skips, maps = self.backbone(images)
        for enlarge, block, skip in zip(self.enlarge, self.up, reversed(skips), strict=True):
            maps = enlarge(maps)  # (B, C, 2 h, 2 w)
            maps = block(torch.cat([maps, skip], dim=1))  # (B, width, 2 h, 2 w)
        logits = F.interpolate(self.head(maps), size=images.shape[-2:], mode="bilinear", align_corners=False)
        return logits[:, :, :height, :width]  # (B, K, H, W)


class UpStep(nn.Module):
    """A 2x2 up-convolution that halves the channels, the cropped skip beside it, and the level's convolutions."""

    def __init__(
        self, channels: int, width: int, *, convolutions: nn.Module, upsample: Callable[..., nn.Module]
    ) -> None:
        super().__init__()
        self.upsample = upsample(channels=channels, width=width, factor=2)
        self.convolutions = convolutions

    def forward(self, maps: Tensor, skip: Tensor, switches: Tensor | None = None) -> Tensor:
        """Return ``(B, width, 2 h, 2 w)``, 4 less in height and width without padding.

        Args:
            maps: ``(B, channels, h, w)`` from below.
            skip: ``(B, width, H, W)`` from the contracting path, at least twice as large.
            switches: ``(B, width, h, w)`` of the pooling, for max-unpooling.
        """
        maps = self.upsample(maps, switches)  # (B, width, 2 h, 2 w)
        result: Tensor = self.convolutions(torch.cat([crop(skip, maps), maps], dim=1))
        return result


def mirror(images: Tensor, rows: tuple[int, int], columns: tuple[int, int], sizes: Tensor | None = None) -> Tensor:
    """Continue images by their mirror picture, as often as is needed (figure 2); the edge is not repeated.

    Args:
        images: ``(B, C, H, W)``.
        rows: pixels to add above and below.
        columns: pixels to add at the left and the right.
        sizes: ``(B, 2)`` int64, the valid height and width of each image, whose mirror picture takes the place of the
            batch's padding too; ``None`` means all are whole.
    """
    height, width = images.shape[-2:]
    if sizes is not None:
        # Not compared with (H, W) first: that would wait for a GPU, and gathering costs next to nothing
        down = _mirrored(sizes[:, :1], height, *rows)  # (B, H + rows)
        across = _mirrored(sizes[:, 1:], width, *columns)  # (B, W + columns)
        image, channel = (torch.arange(count, device=images.device) for count in images.shape[:2])
        return images[image[:, None, None, None], channel[:, None, None], down[:, None, :, None], across[:, None, None]]
    if rows == (0, 0) and columns == (0, 0):
        return images
    own = torch.tensor([[height, width]], device=images.device)  # (1, 2)
    down, across = _mirrored(own[:, :1], height, *rows)[0], _mirrored(own[:, 1:], width, *columns)[0]
    return images[:, :, down[:, None], across]  # (B, C, H + rows, W + columns)


def _mirrored(lengths: Tensor, canvas: int, before: int, after: int) -> Tensor:
    """Return which pixel of a side stands at each place of the continued side, ``(B, before + canvas + after)``.

    Args:
        lengths: ``(B, 1)`` int64, of the images themselves.
        canvas: of the batch.
        before: places to add.
        after: likewise.
    """
    periods = (2 * (lengths - 1)).clamp(min=1)
    positions = torch.arange(-before, canvas + after, device=lengths.device) % periods
    return torch.minimum(positions, periods - positions)


def initialise(module: nn.Module) -> None:
    """Draw every convolution's weights with deviation sqrt(2 / N), N the incoming connections (section 3)."""
    for child in module.modules():
        if isinstance(child, TransposedConvolution) and child.bilinear:
            continue  # it starts from interpolation
        if isinstance(child, nn.Conv2d | nn.ConvTranspose2d):
            # In a 2x2 up-convolution of stride 2 each output sees one input pixel: N is its channels
            incoming = child.in_channels * (9 if child.kernel_size == (3, 3) else 1)
            nn.init.normal_(child.weight, std=(2 / incoming) ** 0.5)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
