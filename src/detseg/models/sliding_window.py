"""A classifier of patches, slid over the image: a patch in, the class of its centre pixel out.

Ciresan, Giusti, Gambardella & Schmidhuber 2012, "Deep Neural Networks Segment Neuronal Membranes in Electron Microscopy
Images" (NIPS).

Built (table 1, network N4): four times a convolution and a 2x2 max pooling, a fully connected layer of 200, one per
class, on patches of 95 pixels; each image is continued by its mirror picture. Two ways to the same logits: patch by
patch, as published, or ``dense``, the fully connected layers turned into convolutions that share all that neighbouring
patches have in common (Long et al. 2015, arXiv:1411.4038, section 3.1). Where more pixels are wanted than the poolings
leave, late poolings keep the size and what follows is dilated, which equals shifting and stitching (section 3.2).

Different: ReLU in place of a scaled tanh; no foveation, no averaging of several networks.

B = images, C = channels, K = classes, n, m = grid rows and columns, p = side of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # torch's own convention
from torch import Tensor, nn

from detseg.models.segmenter import AnyMapLoss, SemanticSegmenter
from detseg.models.unet import mirror
from detseg.nn import IMAGENET_MEAN, IMAGENET_STD, Normalize, convolutionalise
from detseg.ops.upsampling import convolved_length
from detseg.structures import Target


class SlidingWindow(SemanticSegmenter):
    """Classify a grid of pixels by the patches around them; see the head of this file.

    Args:
        num_classes: classes of the semantic map, background included.
        patch: side in pixels.
        widths: channels of the convolutions, each followed by a 2x2 max pooling.
        kernels: sides of the convolutions.
        hidden: numbers in the fully connected layer.
        step: between classified pixels, in pixels: the network's stride (two to the number of poolings), a multiple or
            a divisor of it. The pixels between take the class of the nearest one. The paper's is 1.
        dense: compute all patches at once, by convolutions; the logits are the same.
        dropout: probability after the fully connected layer.
        mean: subtracted from RGB in [0, 1].
        std: divided by.
        loss: gives the named terms; ``None`` means plain cross entropy.
        separation: w0 of U-Net's weight map, 0 for none; needs instance masks.

    Raises:
        ValueError: the patch is too small for the network, or the step does not fit the stride or the patch.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        patch: int = 95,
        widths: Sequence[int] = (48, 48, 48, 48),
        kernels: Sequence[int] = (4, 5, 4, 4),
        hidden: int = 200,
        step: int = 1,
        dense: bool = False,
        dropout: float = 0.0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        loss: AnyMapLoss | None = None,
        separation: float = 0.0,
    ) -> None:
        super().__init__(num_classes=num_classes, loss=loss, separation=separation)
        self.patch, self.step, self.stride, self.dense = patch, step, 2 ** len(kernels), dense
        if step < 1 or step > patch or (step % self.stride and self.stride % step):
            raise ValueError(
                f"SlidingWindow: step {step} must be a multiple or a divisor of the network's stride {self.stride}, "
                f"and at most the patch of {patch} pixels"
            )
        self.normalize = Normalize(mean, std)
        layers: list[nn.Module] = []
        for channels, width, kernel in zip([3, *widths], widths, kernels, strict=False):
            layers += [nn.Conv2d(channels, width, kernel), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        side = patch_side(patch, kernels)
        self.shape = (widths[-1], side, side)
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(widths[-1] * side * side, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )
        _initialise(self)

    def forward(self, images: Tensor, sizes: Tensor | None = None, targets: list[Target] | None = None) -> Tensor:
        """Return logits ``(B, K, H, W)`` for every pixel of images of any size; ``targets`` are not read."""
        height, width = images.shape[-2:]
        grid = self.grid(self.normalize(images, sizes), sizes)  # (B, K, n, m)
        larger = grid.repeat_interleave(self.step, dim=2).repeat_interleave(self.step, dim=3)
        return larger[:, :, :height, :width]  # (B, K, H, W)

    def grid(self, images: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Return logits ``(B, K, n, m)`` of every ``step``-th pixel, the first one ``step // 2`` from the border.

        Args:
            images: normalised, ``(B, 3, H, W)``.
            sizes: ``(B, 2)``, the valid height and width of each image; ``None`` means all are whole.
        """
        rows, columns = (-(-length // self.step) for length in images.shape[-2:])
        below, beside = self._margins(images.shape[-2], rows), self._margins(images.shape[-1], columns)
        canvas = mirror(images, below, beside, sizes)  # (B, 3, H + margins, W + margins)
        return self._dense(canvas, rows, columns) if self.dense else self._patches(canvas)

    def _margins(self, length: int, count: int) -> tuple[int, int]:
        """Return how far the patches of ``count`` grid pixels reach beyond an image side, before and after."""
        before = self.patch // 2 - self.step // 2
        return before, (count - 1) * self.step + self.patch - before - length

    def _patches(self, canvas: Tensor) -> Tensor:
        """Classify patch by patch, a row of the grid at a time."""
        rows = []
        for strip in canvas.unfold(2, self.patch, self.step).unbind(2):  # (B, 3, W', p)
            patches = strip.unfold(2, self.patch, self.step)  # (B, 3, m, p, p)
            patches = patches.permute(0, 2, 1, 3, 4)  # (B, m, 3, p, p)
            scores = self.classifier(self.features(patches.flatten(0, 1)))  # (B * m, K)
            rows.append(scores.unflatten(0, patches.shape[:2]))  # (B, m, K)
        return torch.stack(rows, dim=1).permute(0, 3, 1, 2)  # (B, K, n, m)

    def _dense(self, canvas: Tensor, rows: int, columns: int) -> Tensor:
        """Classify all patches at once; where the grid is finer than the stride, late layers are dilated instead."""
        maps, stride, dilation = canvas, 1, 1
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                maps = F.conv2d(maps, layer.weight, layer.bias, dilation=dilation)  # (B, C, h, w)
            elif not isinstance(layer, nn.MaxPool2d):
                maps = layer(maps)
            elif stride < self.step:
                maps, stride = layer(maps), 2 * stride  # (B, C, h / 2, w / 2)
            else:  # the pairs that a patch's own pooling would see, at every place
                maps = F.max_pool2d(maps, 2, stride=1, dilation=dilation)  # (B, C, h - dilation, w - dilation)
                dilation *= 2
        scores = convolutionalise(self.classifier, self.shape, share=True, dilation=dilation)(maps)  # (B, K, n', m')
        skip = self.step // stride
        result: Tensor = scores[:, :, ::skip, ::skip][:, :, :rows, :columns]  # (B, K, n, m)
        return result


def patch_side(patch: int, kernels: Sequence[int]) -> int:
    """Return how many cells a patch has a side after all convolutions and 2x2 poolings.

    Raises:
        ValueError: nothing is left.
    """
    side = patch
    try:
        for kernel in kernels:
            side = convolved_length(convolved_length(side, kernel=kernel), kernel=2, stride=2)
    except ValueError as error:
        raise ValueError(
            f"SlidingWindow: a patch of {patch} pixels is too small for kernels {list(kernels)}"
        ) from error
    return side


def _initialise(network: nn.Module) -> None:
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # it has a bias
