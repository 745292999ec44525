"""Ways to make maps larger that learn nothing, their sizes, and a measure of the pattern that some of them leave.

Bed of nails and unpooling with switches: Zeiler & Fergus 2014, "Visualizing and Understanding Convolutional Networks"
(arXiv:1311.2901, section 2.1). Bilinear filters for transposed convolutions: Long et al. 2015, "Fully Convolutional
Networks for Semantic Segmentation" (arXiv:1411.4038, section 3.3). Checkerboards: Odena et al. 2016, "Deconvolution
and Checkerboard Artifacts" (Distill); the measure of them is ours.

B = images, C = channels, h, w = cells before, f = factor.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # torch's own convention
from torch import Tensor


def transposed_length(
    length: int, *, kernel: int, stride: int = 1, padding: int = 0, output_padding: int = 0, dilation: int = 1
) -> int:
    """Return how many cells a transposed convolution makes of ``length``, along one side.

    A convolution of the same kernel, stride and padding brings them back to ``length``; ``output_padding`` chooses
    among the lengths of which it does.

    Raises:
        ValueError: nothing would be left, or ``output_padding`` is not below the stride (or the dilation).
    """
    if not 0 <= output_padding < max(stride, dilation):
        raise ValueError(
            f"output_padding {output_padding} must be 0..{max(stride, dilation) - 1}, below stride {stride} or "
            f"dilation {dilation}"
        )
    result = (length - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding + 1
    if length < 1 or result < 1:
        raise ValueError(
            f"a transposed convolution of kernel {kernel}, stride {stride} and padding {padding} makes {result} cells "
            f"of {length}; use less padding"
        )
    return result


def convolved_length(length: int, *, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> int:
    """Return how many cells a convolution or a pooling makes of ``length``, along one side.

    Raises:
        ValueError: the kernel does not fit.
    """
    reach = dilation * (kernel - 1) + 1
    if length + 2 * padding < reach:
        raise ValueError(f"a kernel that reaches {reach} cells does not fit into {length} with padding {padding}")
    return (length + 2 * padding - reach) // stride + 1


def bed_of_nails(maps: Tensor, factor: int) -> Tensor:
    """Put every value into the top left corner of a block of zeros.

    Args:
        maps: ``(B, C, h, w)``.
        factor: side of the blocks.

    Returns:
        ``(B, C, f h, f w)``.
    """
    batch, channels, height, width = maps.shape
    result = maps.new_zeros(batch, channels, height, factor, width, factor)  # (B, C, h, f, w, f)
    result[:, :, :, 0, :, 0] = maps
    return result.reshape(batch, channels, height * factor, width * factor)  # (B, C, f h, f w)


def unpool(maps: Tensor, switches: Tensor, factor: int) -> Tensor:
    """Put every value where the maximum came from, zeros elsewhere.

    Args:
        maps: ``(B, C, h, w)``.
        switches: ``(B, C, h, w)`` int64, positions in the flattened map of ``f h`` by ``f w`` cells, as max pooling
            with ``return_indices`` gives them.
        factor: of the pooling.

    Returns:
        ``(B, C, f h, f w)``.

    Raises:
        ValueError: maps and switches differ in shape.
    """
    if maps.shape != switches.shape:
        raise ValueError(
            f"unpooling: maps are {tuple(maps.shape)}, the switches {tuple(switches.shape)}; every channel needs the "
            "switches of the pooling that it undoes"
        )
    batch, channels, height, width = maps.shape
    flat = maps.new_zeros(batch, channels, factor**2 * height * width)  # (B, C, f h * f w)
    flat = flat.scatter(2, switches.flatten(2), maps.flatten(2))  # (B, C, f h * f w)
    return flat.reshape(batch, channels, factor * height, factor * width)  # (B, C, f h, f w)


def pool_with_switches(maps: Tensor, factor: int = 2) -> tuple[Tensor, Tensor]:
    """Return the maxima of blocks and where they were: ``(B, C, h / f, w / f)`` and the same in int64, for ``unpool``.

    Raises:
        ValueError: a side is no multiple of the factor, so that unpooling would lose cells.
    """
    if maps.shape[-2] % factor or maps.shape[-1] % factor:
        raise ValueError(f"pooling by {factor} with switches needs sides that are its multiples, not {maps.shape[-2:]}")
    pooled, switches = F.max_pool2d(maps, factor, return_indices=True)
    return pooled, switches


def bilinear_kernel(kernel: int, factor: int) -> Tensor:
    """Return the filter with which a transposed convolution of stride ``factor`` interpolates between cells.

    Args:
        kernel: its side; ``2 f`` for even factors and ``2 f - 1`` for odd ones interpolate without a shift.
        factor: of the enlargement.

    Returns:
        ``(kernel, kernel)`` float32; values in (0, 1] wherever a cell is less than ``f`` away, else 0.
    """
    centre = (kernel - 1) / 2
    row = (1 - (torch.arange(kernel) - centre).abs() / factor).clamp(min=0)  # (kernel,)
    return row[:, None] * row  # (kernel, kernel)


def checkerboard_energy(maps: Tensor, factor: int) -> Tensor:
    """Return which share of the maps' energy is a pattern that repeats every ``factor`` cells.

    Cells are averaged by their place within a block of ``f`` by ``f``. Whatever the picture shows is averaged out over
    many blocks; what stays and differs between the places is the enlargement's own. A transposed convolution whose
    weights differ from place to place leaves such a pattern even on a flat input; a convolution after resizing leaves
    none.

    Args:
        maps: ``(B, C, H, W)``, inner parts of enlarged maps: borders have a pattern of their own. Cells beyond the
            last whole block are left out.
        factor: of the enlargement.

    Returns:
        ``(B, C)`` in [0, 1]: the variance of the places' averages over the mean square; 0 where a map is 0.

    Raises:
        ValueError: the maps are smaller than a block.
    """
    rows, columns = maps.shape[-2] // factor, maps.shape[-1] // factor
    if rows == 0 or columns == 0:
        raise ValueError(f"maps of {tuple(maps.shape[-2:])} have no block of {factor} by {factor} cells")
    whole = maps[:, :, : rows * factor, : columns * factor]
    blocks = whole.reshape(*maps.shape[:2], rows, factor, columns, factor)  # (B, C, h, f, w, f)
    places = blocks.mean(dim=(2, 4)).flatten(2)  # (B, C, f * f)
    energy = blocks.square().mean(dim=(2, 3, 4, 5))  # (B, C)
    pattern = places.var(dim=2, correction=0)  # (B, C)
    share: Tensor = pattern / energy.clamp(min=torch.finfo(maps.dtype).tiny)
    return share
