"""Where a guard looks into a training step, and the norm of the gradients, which is taken once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from detseg.structures import Batch


class StepGuard(Protocol):
    """Watches every step of a task from within; see ``detseg.callbacks.Guard``."""

    def take(self, batch: Batch) -> None:
        """See a training batch, on the device, before any random number is drawn for its step."""

    def follow(self, loss: Tensor, terms: Mapping[str, Tensor]) -> Tensor:
        """See a loss and its terms; return the loss that goes backward."""

    def judge(self, norm: Tensor, optimizer: Optimizer) -> None:
        """See the gradients' norm right before the optimiser's step; raise, or drop the gradients, to prevent it."""


def clip_gradients(parameters: Iterable[nn.Parameter], *, value: float | None, algorithm: Any = None) -> Tensor:
    """Clip the gradients in place and return their norm before that, a scalar on their device.

    Args:
        parameters: those of the optimiser; what has no gradient is left out.
        value: the largest norm, or with ``algorithm="value"`` the largest entry; ``None`` or 0 clips nothing.
        algorithm: ``"norm"`` or ``"value"``; ``None`` means norm.
    """
    owned = [parameter for parameter in parameters if parameter.grad is not None]
    if value and str(getattr(algorithm, "value", algorithm)) != "value":
        return nn.utils.clip_grad_norm_(owned, value)
    norm = nn.utils.get_total_norm([parameter.grad for parameter in owned if parameter.grad is not None])
    if value:
        nn.utils.clip_grad_value_(owned, value)
    return norm
