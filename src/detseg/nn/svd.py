"""Fully connected layers made faster by truncated singular value decomposition.

Girshick 2015, `"Fast R-CNN" <https://arxiv.org/abs/1504.08083>`_, section 3.1: a layer of weights W (u x v) becomes
two, of t * (u + v) numbers together, with W about U_t S_t V_t^T. Among all pairs of that size none comes nearer to W.

Letters: u outputs, v inputs, t singular values kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return ``(t, v)`` and ``(u, t)``, whose product ``second @ first`` is the best rank-t form of ``weight``.

    The eigenvectors of the smaller Gram matrix, in double precision, give the same as a whole decomposition in a
    fraction of its time: VGG-16's fc6 is 4096 x 25088.

    Args:
        weight: ``(u, v)``.
        rank: t, at least 1; more than ``min(u, v)`` counts as that.
    """
    matrix = weight.detach().double()  # (u, v)
    rank = min(rank, *matrix.shape)
    if matrix.shape[0] <= matrix.shape[1]:
        left = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -rank:]  # (u, t), U_t
        return (left.T @ matrix).to(weight), left.to(weight)  # S_t V_t^T and U_t
    right = torch.linalg.eigh(matrix.T @ matrix).eigenvectors[:, -rank:]  # (v, t), V_t
    return right.T.to(weight), (matrix @ right).to(weight)


class TruncatedSVD:
    """Make a copy of a module in which the named fully connected layers are two thinner ones.

    The copy is made again only after the weights have changed.

    Args:
        ranks: layer -> t, such as ``{"fc6": 1024, "fc7": 256}`` (section 4.4).

    Raises:
        ValueError: a rank is below 1.
    """

    def __init__(self, *, ranks: Mapping[str, int]) -> None:
        if wrong := {name: rank for name, rank in ranks.items() if rank < 1}:
            raise ValueError(f"TruncatedSVD: ranks {wrong} must be at least 1")
        self.ranks = dict(ranks)
        self._made: tuple[tuple[object, ...], nn.Module] | None = None

    def __call__(self, module: nn.Module) -> nn.Module:
        """Return the copy, which gives about what ``module`` gives.

        Raises:
            ValueError: the module has no fully connected layer of one of the names.
        """
        layers = dict(module.named_children())
        for name in self.ranks:
            if not isinstance(layers.get(name), nn.Linear):
                known = [key for key, layer in layers.items() if isinstance(layer, nn.Linear)]
                raise ValueError(f"TruncatedSVD: {type(module).__name__} has no linear layer {name!r}; it has {known}")
        state = tuple((value.data_ptr(), value._version, value.device) for value in module.parameters())
        if self._made is None or self._made[0] != state:
            copy = deepcopy(module).eval().requires_grad_(False)
            for name, rank in self.ranks.items():
                setattr(copy, name, _two_layers(getattr(copy, name), rank))
            self._made = state, copy
        return self._made[1]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_made": None}  # quickly made again, and a checkpoint or a worker needs none


def _two_layers(layer: nn.Linear, rank: int) -> nn.Sequential:
    first, second = truncated_svd(layer.weight, rank)
    thin = nn.Linear(layer.in_features, len(first), bias=False, device=layer.weight.device, dtype=layer.weight.dtype)
    wide = nn.Linear(len(first), layer.out_features, bias=layer.bias is not None).to(layer.weight)
    thin.weight.data, wide.weight.data = first, second
    if layer.bias is not None:
        wide.bias.data = layer.bias.detach().clone()
    return nn.Sequential(thin, wide).requires_grad_(False)
