"""What R-CNN fits on top of a trained network: linear SVMs that score regions, ridge regression that moves their boxes.

Girshick et al. 2014, `"R-CNN" <https://arxiv.org/abs/1311.2524>`_, section 2.3 and appendices B and C. Both are buffers
and no parameters, as no gradient gives them; they travel with the checkpoint, as does whether they are fitted.

Letters: R regions, D numbers of a region, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from detseg.ops.ridge import fit_ridge
from detseg.targets.hard_negatives import ClassSVMs

LARGEST = 65504.0  # of half precision, in which examples are kept


@dataclass
class RegionExamples:
    """What one image teaches the SVMs and the regression; features are in half precision and host memory.

    Attributes:
        positives: ``(M, D)`` features of the objects themselves.
        labels: ``(M,)`` int64, their classes 0..K-1.
        regions: ``(N, D)`` features of proposals that are a negative of some class.
        negative: ``(N, K)`` bool, of which.
        maps: ``(P, D5)`` features of proposals near an object, for the regression.
        map_labels: ``(P,)`` int64, classes of those objects.
        deltas: ``(P, 4)`` float, what moves the proposals onto them.
        lengths: ``(3,)`` double: the sum of the lengths of the features of all regions, of their maps, and how many.
    """

    positives: Tensor
    labels: Tensor
    regions: Tensor
    negative: Tensor
    maps: Tensor
    map_labels: Tensor
    deltas: Tensor
    lengths: Tensor

    def boxes_alone(self) -> RegionExamples:
        """Return what the regression learns from, without the memory of the rest."""
        nothing = self.regions.new_zeros(0, 0)
        return replace(self, positives=nothing, regions=nothing, negative=nothing)


class RegionSVMs(nn.Module):
    """One linear SVM per class.

    Args:
        in_features: D.
        num_classes: K.
    """

    weight: Tensor
    bias: Tensor
    known: Tensor
    fitted: Tensor

    def __init__(self, *, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(num_classes, in_features))
        self.register_buffer("bias", torch.zeros(num_classes))
        self.register_buffer("known", torch.zeros(num_classes, dtype=torch.bool))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))

    def forward(self, features: Tensor) -> Tensor:
        """Return margins ``(R, K)`` of ``(R, D)``, in single precision; minus infinity for a class without an SVM."""
        with torch.autocast(features.device.type, enabled=False):
            margins = features.float() @ self.weight.float().T + self.bias.float()  # (R, K)
        return margins.masked_fill(~self.known, -torch.inf)

    def take(self, machines: ClassSVMs, *, scale: float) -> None:
        """Take over machines that were fitted to features times ``scale``."""
        self.weight.copy_(machines.weight * scale)
        self.bias.copy_(machines.bias)
        self.known.copy_(machines.known)
        self.fitted.fill_(True)


class RegionRidge(nn.Module):
    """Class-wise linear regression of box deltas.

    Args:
        in_features: D.
        num_classes: K.
    """

    weight: Tensor
    bias: Tensor
    fitted: Tensor

    def __init__(self, *, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(num_classes, in_features, 4))
        self.register_buffer("bias", torch.zeros(num_classes, 4))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))

    def forward(self, features: Tensor) -> Tensor:
        """Return deltas ``(R, K, 4)`` of ``(R, D)``, in single precision; zero for a class that learnt nothing."""
        with torch.autocast(features.device.type, enabled=False):
            return torch.einsum("rd,kdt->rkt", features.float(), self.weight.float()) + self.bias.float()

    def fit(self, examples: Sequence[RegionExamples], *, strength: float, norm: float) -> list[int]:
        """Fit from ``maps``, ``map_labels``, ``deltas`` and ``lengths``; the rest is not looked at.

        Memory: two matrices of min(pairs of a class, D) squared in double precision, beside the examples.

        Args:
            examples: per image.
            strength: lambda of equation 5.
            norm: mean length of a region's features that gives ``strength`` its meaning.

        Returns:
            The pairs of proposal and object of each class.
        """
        lengths = torch.stack([image.lengths for image in examples]).sum(0)  # (3,)
        scale = norm / max(float(lengths[1] / lengths[2].clamp(min=1)), 1e-12)
        self.weight.zero_()
        self.bias.zero_()
        counts = []
        for label in range(len(self.weight)):
            mine = [image.map_labels == label for image in examples]
            counts.append(sum(int(rows.sum()) for rows in mine))
            if counts[-1] == 0:
                continue
            maps = torch.cat([image.maps[rows] for image, rows in zip(examples, mine, strict=True)])  # (P, D)
            deltas = torch.cat([image.deltas[rows] for image, rows in zip(examples, mine, strict=True)])  # (P, 4)
            # Features times s under lambda are the features as they are under lambda / s^2.
            weight, bias = fit_ridge(maps, deltas, strength=strength / scale**2)
            self.weight[label], self.bias[label] = weight.to(self.weight), bias.to(self.bias)
        self.fitted.fill_(True)
        return counts


def half(features: Tensor) -> Tensor:
    """Return features in half precision and host memory, those beyond its range at its end."""
    return features.float().clamp(-LARGEST, LARGEST).half().cpu()
