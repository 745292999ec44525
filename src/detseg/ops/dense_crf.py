"""Dense conditional random fields, by which DeepLab refines its maps (Chen et al., arXiv:1412.7062, section 3.2).

Krähenbühl & Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials" (NeurIPS 2011,
arXiv:1210.5644).

Every pair of pixels is connected by two Gaussian kernels (equation 3): one of place and colour (appearance), one of
place alone (smoothness). Mean field (equation 6, algorithm 1) with the Potts model of labels (section 2). Messages are
Gaussian filters in the permutohedral lattice; equal to the authors' released code to rounding. As released, and unlike
equation 6, which sums over j != i, a pixel's message counts for the pixel itself as well; and each kernel is normalised
symmetrically, by the roots of both pixels' sums.

Letters: K classes, H x W pixels, N = H * W.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from detseg.ops.permutohedral import PermutohedralLattice

Filter = Callable[[Tensor], Tensor]
"""Sums values ``(N, K)`` over all pixels with the weights of a kernel."""


def dense_crf(
    logits: Tensor,
    image: Tensor,
    *,
    iterations: int = 10,
    appearance_weight: float = 10.0,
    appearance_place: float = 80.0,
    appearance_colour: float = 13.0,
    smoothness_weight: float = 3.0,
    smoothness_place: float = 3.0,
    exact: bool = False,
) -> Tensor:
    """Return the refined probabilities of one image, ``(K, H, W)`` float32.

    The defaults are those of DeepLab's release for VOC.

    Args:
        logits: ``(K, H, W)``; their softmax is the unary term.
        image: ``(3, H, W)`` RGB in [0, 1].
        iterations: of mean field; 0 gives the softmax itself.
        appearance_weight: of the kernel of place and colour; 0 leaves it out.
        appearance_place: its standard deviation in pixels.
        appearance_colour: likewise in steps of 1/255 of a colour.
        smoothness_weight: of the kernel of place alone; 0 leaves it out.
        smoothness_place: its standard deviation in pixels.
        exact: compute every pair instead, N * N numbers a kernel: for small images and tests.

    Raises:
        ValueError: shapes disagree, a logit is not finite, or a number is out of its range.
    """
    _check(logits, image, iterations, (appearance_place, appearance_colour, smoothness_place))
    classes, height, width = logits.shape
    kind = torch.float64 if exact else torch.float32  # the released code is in single precision
    unary = logits.detach().double().cpu().log_softmax(0).flatten(1).T.to(kind).contiguous()  # (N, K)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack([columns, rows]).double().flatten(1).T  # (N, 2)
    colour = image.detach().double().cpu().flatten(1).T * 255  # (N, 3)
    filters = []
    if appearance_weight:
        points = torch.cat([place / appearance_place, colour / appearance_colour], 1)  # (N, 5)
        filters.append((appearance_weight, _normalised(points, kind, exact)))
    if smoothness_weight:
        filters.append((smoothness_weight, _normalised(place / smoothness_place, kind, exact)))
    marginals = unary.softmax(1)  # (N, K)
    for _ in range(iterations):
        energy = unary  # (N, K); the Potts model favours the label that similar pixels have
        for weight, smooth in filters:
            energy = energy + weight * smooth(marginals)
        marginals = energy.softmax(1)
    return marginals.T.reshape(classes, height, width).to(logits.device, torch.float32)


def _normalised(points: Tensor, kind: torch.dtype, exact: bool) -> Filter:
    """Return the filter of a unit Gaussian at points ``(N, D)``, normalised symmetrically, for values of a type."""
    summed: Filter
    if exact:
        kernel = (-torch.cdist(points, points).square() / 2).exp()  # (N, N)
        summed = kernel.matmul
    else:
        summed = PermutohedralLattice(points).filter
    ones = points.new_ones(len(points), 1, dtype=kind)
    root = summed(ones).rsqrt()  # (N, 1); at least the pixel itself is in every sum
    return lambda values: summed(values * root) * root


def _check(logits: Tensor, image: Tensor, iterations: int, widths: tuple[float, ...]) -> None:
    if logits.ndim != 3 or image.shape != (3, *logits.shape[1:]):
        raise ValueError(
            f"dense_crf: logits are {tuple(logits.shape)} and the image {tuple(image.shape)}; they must be (K, H, W) "
            "and (3, H, W)"
        )
    if not bool(logits.isfinite().all()):
        raise ValueError(f"dense_crf: {int((~logits.isfinite()).sum())} of the logits are NaN or infinite")
    if iterations < 0 or min(widths) <= 0:
        raise ValueError(
            f"dense_crf: iterations={iterations} must be at least 0, and the standard deviations {widths} above 0"
        )
