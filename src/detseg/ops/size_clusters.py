"""K-means of box sizes under the distance 1 - IoU: Redmon & Farhadi 2017, YOLO9000, arXiv:1612.08242, section 2.

"Dimension clusters": Euclidean distance would let large boxes weigh more than small ones, and what matters of a prior
is the IoU that it can have with a box. Built: Lloyd's iterations with mean sides as centres, several starts drawn by
k-means++ (Arthur & Vassilvitskii 2007, https://doi.org/10.1145/1283383.1283494), of which the best is kept; the paper
says nothing about starts. Equal sizes are counted, not repeated.

Letters: N boxes, U different sizes among them, K clusters.
"""

from __future__ import annotations

import torch
from torch import Tensor


def size_iou(first: Tensor, second: Tensor) -> Tensor:
    """Return the IoU ``(N, K)`` of sizes ``(N, 2)`` and ``(K, 2)`` laid on one corner."""
    inter = torch.minimum(first[:, None], second[None]).prod(dim=2)  # (N, K)
    return inter / (first.prod(dim=1)[:, None] + second.prod(dim=1) - inter)


def mean_best_iou(sizes: Tensor, clusters: Tensor) -> float:
    """Return the IoU of a size with its best cluster, averaged over sizes (the paper's table 1), in [0, 1].

    Args:
        sizes: ``(N, 2)``, positive; N >= 1.
        clusters: ``(K, 2)``, positive.
    """
    return float(size_iou(sizes.double(), clusters.double()).amax(dim=1).mean())


def cluster_sizes(sizes: Tensor, count: int, *, seed: int = 0, starts: int = 10, iterations: int = 300) -> Tensor:
    """Return ``count`` sizes that cover those given well, by area ascending.

    The same input and seed give the same result.

    Args:
        sizes: ``(N, 2)`` width and height, finite and positive.
        count: K, at least 1.
        seed: of the starts.
        starts: how many starts are tried.
        iterations: the most per start; they end where no size changes its cluster.

    Returns:
        ``(K, 2)`` float64.

    Raises:
        ValueError: a size is not positive and finite, or there are fewer different sizes than clusters.
    """
    sizes = sizes.detach().cpu().double().reshape(-1, 2)
    if not bool((sizes.isfinite() & (sizes > 0)).all()):
        row = int((~(sizes.isfinite() & (sizes > 0)).all(dim=1)).nonzero()[0, 0])
        raise ValueError(f"cluster_sizes: size {row} is {sizes[row].tolist()}; width and height must be positive")
    different, weights = torch.unique(sizes, dim=0, return_counts=True)  # (U, 2), (U,)
    if not 1 <= count <= len(different) or starts < 1:
        raise ValueError(
            f"cluster_sizes: {count} clusters of {len(sizes)} boxes with {len(different)} different sizes and {starts} "
            "starts; there can be no more clusters than different sizes, and at least one of each: ask for fewer"
        )
    generator = torch.Generator().manual_seed(seed)
    weights = weights.double()
    found = [
        _lloyd(different, weights, _start(different, weights, count, generator), iterations) for _ in range(starts)
    ]
    covered = [(size_iou(different, one).amax(dim=1) * weights).sum() for one in found]
    best = found[int(torch.stack(covered).argmax())]  # (K, 2)
    return best[best.prod(dim=1).argsort(stable=True)]


def _start(sizes: Tensor, weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw ``(K, 2)`` of the sizes ``(U, 2)``, each likelier the farther it lies from those drawn before."""
    chosen = [int(torch.multinomial(weights, 1, generator=generator))]
    for _ in range(count - 1):
        far = 1 - size_iou(sizes, sizes[chosen]).amax(dim=1)  # (U,)
        far[chosen] = 0.0
        chosen.append(int(torch.multinomial(weights * far.clamp(min=0).square(), 1, generator=generator)))
    return sizes[chosen]


def _lloyd(sizes: Tensor, weights: Tensor, centres: Tensor, iterations: int) -> Tensor:
    """Assign sizes to centres and move centres to their means, until nothing changes; see ``cluster_sizes``."""
    owner = torch.full((len(sizes),), -1)
    for _ in range(iterations):
        iou = size_iou(sizes, centres)  # (U, K)
        best, found = iou.max(dim=1)  # (U,) each
        for empty in (torch.bincount(found, minlength=len(centres)) == 0).nonzero()[:, 0].tolist():
            lonely = int(best.argmin())  # a centre without sizes moves to the size that is covered worst
            found[lonely], best[lonely] = empty, 1.0
        if torch.equal(found, owner):
            break
        owner = found
        total = torch.zeros(len(centres), dtype=torch.float64).index_add_(0, owner, weights)  # (K,)
        moved = torch.zeros_like(centres).index_add_(0, owner, sizes * weights[:, None])  # (K, 2)
        centres = torch.where(total[:, None] > 0, moved / total[:, None].clamp(min=1), centres)  # (K, 2)
    return centres
