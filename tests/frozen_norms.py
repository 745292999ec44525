"""A body whose batch norms count nothing, so that two processes compute what one does."""

from __future__ import annotations

from typing import Any

from detseg.nn.norm import freeze_batch_norm
from detseg.nn.tiny import TinyBackbone


class FrozenTiny(TinyBackbone):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        freeze_batch_norm(self)
