"""Losses that teach which corners belong together: Law and Deng, CornerNet, 2018, arXiv:1808.01244, equations 4 and 5.

Associative embedding (Newell et al. 2016, arXiv:1611.05424): every corner predicts one number; the two of an object are
pulled to their mean, and the means of the objects of an image are pushed apart. Both are the paper's for one image,
averaged over the batch; an image without objects costs nothing, and one with a single object has nothing to push.

Letters: B images, G objects of all images, P pairs of objects of one image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detseg.targets.lattice import expand_ranges


def pull_loss(first: Tensor, second: Tensor, image: Tensor, batch: int) -> Tensor:
    """Return the mean over images of ``1/N sum_k (e_tk - e_k)^2 + (e_bk - e_k)^2``, a scalar (equation 4).

    Args:
        first: ``(G,)`` embeddings of top-left corners, e_t.
        second: ``(G,)`` of bottom-right corners, e_b; e_k is the mean of both.
        image: ``(G,)`` int64, the image of each object.
        batch: the number B of images.
    """
    # With the mean in between both squares are equal, a quarter of the squared difference each.
    squared = (first - second).square() / 2  # (G,)
    return (squared / torch.bincount(image, minlength=batch)[image]).sum() / batch


def push_loss(means: Tensor, image: Tensor, batch: int, *, margin: float = 1.0) -> Tensor:
    """Return the mean over images of ``1/(N(N-1)) sum_k sum_j max(0, margin - |e_k - e_j|)``, a scalar (equation 5).

    Args:
        means: ``(G,)`` of the embeddings of each object, e_k.
        image: ``(G,)`` int64, the image of each object, ascending.
        batch: the number B of images.
        margin: distance from which two objects leave each other alone; the paper's Delta.
    """
    count = torch.bincount(image, minlength=batch)  # (B,)
    end = count.cumsum(0)[image]  # (G,)
    own = torch.arange(len(means), device=means.device)  # (G,)
    left, right = expand_ranges(own + 1, end - 1)  # (P,) each: every pair once
    near = (margin - (means[left] - means[right]).abs()).clamp(min=0)  # (P,)
    number = count[image[left]]  # (P,)
    return (2 * near / (number * (number - 1))).sum() / batch


class GroupingLoss(nn.Module):
    """Both terms; see ``pull_loss`` and ``push_loss``.

    Args:
        margin: distance of embeddings from which two objects leave each other alone, above 0; 1 in the paper.

    Raises:
        ValueError: ``margin`` is not positive.
    """

    def __init__(self, *, margin: float = 1.0) -> None:
        super().__init__()
        if margin <= 0:
            raise ValueError(f"GroupingLoss: margin is {margin}; it must be above 0, the paper's is 1")
        self.margin = margin

    def forward(self, first: Tensor, second: Tensor, image: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Return pull and push, scalars, of embeddings ``(G,)`` of both corners; ``image`` (G,) is ascending."""
        pushed = push_loss((first + second) / 2, image, batch, margin=self.margin)
        return pull_loss(first, second, image, batch), pushed
