"""What all metrics share: states of rows that any number of ranks can gather, and results that keep their shape.

Why not plain torchmetrics list states: gathering them fails when a rank holds nothing, because the empty stand-in has
neither the columns nor the type of the other ranks' rows, and ``compute`` squeezes a per-class figure of one class.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

Array = npt.NDArray[Any]
Figures = dict[str, Tensor]


class DictMetric(Metric):
    """A metric whose ``compute`` returns named figures; names ending in ``_per_class`` are always ``(K,)``."""

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        wrapped = super()._wrap_compute(compute)

        @functools.wraps(compute)
        def keep_shapes(*args: Any, **kwargs: Any) -> Any:
            """Compute, and make the figures of one class ``(1,)`` again."""
            figures = wrapped(*args, **kwargs)
            return {key: value.reshape(-1) if key.endswith("_per_class") else value for key, value in figures.items()}

        return keep_shapes

    def figures(self, values: dict[str, Any]) -> Figures:
        """Turn numbers and arrays into tensors on the metric's device: float64 (float32 on MPS) and int64."""
        real = torch.float32 if self.device.type == "mps" else torch.float64
        tensors = {  # a bare float would become float32 on its way
            key: torch.as_tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
            for key, value in values.items()
        }
        return {
            key: value.to(self.device, real if value.is_floating_point() else torch.int64)
            for key, value in tensors.items()
        }


class RowMetric(DictMetric):
    """A metric that collects rows of numbers, such as one per detection, in host memory.

    Host memory, because the counting is done there and an epoch's rows should not take room on the device. For the
    gathering alone they go to the metric's device, where NCCL can see them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._empty: dict[str, Tensor] = {}

    def add_rows(self, name: str, columns: int, dtype: torch.dtype = torch.float64) -> None:
        """Declare a state of rows.

        Args:
            name: attribute under which blocks of rows are kept; ``keep`` appends one.
            columns: the width of a row.
            dtype: the type of the numbers.
        """
        self._empty[name] = torch.empty((0, columns), dtype=dtype)
        self.add_state(name, default=[], dist_reduce_fx="cat")

    def keep(self, name: str, block: Tensor) -> None:
        """Append a block of rows ``(n, columns)`` to a state."""
        getattr(self, name).append(block.detach().to("cpu", self._empty[name].dtype))

    def rows(self, name: str) -> Array:
        """Return all rows of a state, gathered ones too, as ``(n, columns)``."""
        state = getattr(self, name)
        blocks = [state] if isinstance(state, Tensor) else [self._empty[name], *state]
        return torch.cat([block.cpu() for block in blocks]).numpy()

    def _sync_dist(self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any = None) -> None:
        for name, empty in self._empty.items():  # `unsync` brings the untouched lists back
            blocks = [empty, *getattr(self, name)]
            setattr(self, name, [torch.cat([block.cpu() for block in blocks]).to(self.device)])
        super()._sync_dist(dist_sync_fn, process_group=process_group)


def mean_or_nan(values: Array) -> float:
    """Return the mean of the entries that are not NaN; NaN where there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
