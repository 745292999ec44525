"""Batch norm that does not learn, for detectors trained with few images per step."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def freeze_batch_norm(module: ModuleT, *, untrained_only: bool = False) -> ModuleT:
    """Replace every ``BatchNorm2d`` below ``module``, in place, by ``FrozenBatchNorm``.

    Statistics, scale and shift become buffers: with two images per step their estimates would be too noisy
    (He et al. 2017, Mask R-CNN, section 3.1 freezes them too). Subclasses, such as timm's fused norm and
    activation, keep their activation by being followed by it. A frozen norm keeps the ``eps`` of the old one.

    Args:
        module: a network; a bare ``BatchNorm2d`` has no parent to be replaced in and is refused.
        untrained_only: leave the norms whose scale still requires a gradient.

    Returns:
        The same module.

    Raises:
        TypeError: ``module`` itself is a batch norm.
    """
    if isinstance(module, nn.BatchNorm2d):
        raise TypeError("freeze_batch_norm: give the network that holds the BatchNorm2d, not the norm itself")
    for name, child in list(module.named_children()):
        if not isinstance(child, nn.BatchNorm2d):
            freeze_batch_norm(child, untrained_only=untrained_only)
        elif not (untrained_only and child.weight.requires_grad):
            setattr(module, name, _frozen(child))
    return module


def set_norm_eps(module: nn.Module, eps: float) -> None:
    """Set ``eps`` of every batch norm below ``module``; torchvision's COCO_V1 detectors were trained with 0."""
    for child in module.modules():
        if isinstance(child, FrozenBatchNorm2d | nn.BatchNorm2d):
            child.eps = eps


class FrozenBatchNorm(FrozenBatchNorm2d):  # type: ignore[misc]  # torchvision carries no types
    """torchvision's ``FrozenBatchNorm2d`` in one kernel instead of a product and a sum that each write a map."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised maps ``(B, C, H, W)``."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


def _frozen(norm: nn.BatchNorm2d) -> nn.Module:
    frozen: nn.Module = _FrozenNormAct(norm) if _tail(norm) else FrozenBatchNorm(norm.num_features, eps=norm.eps)
    frozen.load_state_dict({key: value for key, value in norm.state_dict().items() if key in frozen.state_dict()})
    return frozen.to(norm.weight.device)


def _tail(norm: nn.BatchNorm2d) -> list[nn.Module]:
    """Return what timm's ``BatchNormAct2d`` does after the norm itself, and nothing for a plain norm."""
    return [getattr(norm, name) for name in ("drop", "act") if isinstance(getattr(norm, name, None), nn.Module)]


class _FrozenNormAct(FrozenBatchNorm):
    """A frozen norm with the activation that timm fuses into it; the keys stay those of the norm."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm.num_features, eps=norm.eps)
        self.tail = nn.Sequential(*_tail(norm))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised and activated maps ``(B, C, H, W)``."""
        result: Tensor = self.tail(super().forward(x))
        return result
