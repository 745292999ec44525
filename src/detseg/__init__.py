"""Experiments with detection and segmentation systems, each a choice in a config.

The names below are loaded when they are first used, so that ``import detseg`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import detseg.config as config
    import detseg.data as data
    import detseg.metrics as metrics
    import detseg.models as models
    import detseg.structures as structures
    import detseg.visualize as visualize
    from detseg.checkpoint import load
    from detseg.config import build, instantiate, load_config
    from detseg.experiment import train
    from detseg.structures import Batch, Detections, PanopticMap, SemanticMap, Target
    from detseg.visualize import draw

_HOMES = {
    "Batch": "detseg.structures",
    "Detections": "detseg.structures",
    "PanopticMap": "detseg.structures",
    "SemanticMap": "detseg.structures",
    "Target": "detseg.structures",
    "build": "detseg.config",
    "draw": "detseg.visualize",
    "instantiate": "detseg.config",
    "load": "detseg.checkpoint",
    "load_config": "detseg.config",
    "train": "detseg.experiment",
}
"""Public name -> module that defines it."""

_ROOMS = ("config", "data", "metrics", "models", "structures", "visualize")
"""Submodules reachable as ``detseg.<room>`` without an import of their own."""

__all__ = [
    "Batch",
    "Detections",
    "PanopticMap",
    "SemanticMap",
    "Target",
    "__version__",
    "build",
    "config",
    "data",
    "draw",
    "instantiate",
    "load",
    "load_config",
    "metrics",
    "models",
    "structures",
    "train",
    "visualize",
]


def __getattr__(name: str) -> Any:
    """Import what ``name`` stands for; later uses find it in the module itself."""
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    elif name in _ROOMS:
        value = import_module(f"detseg.{name}")
    elif name == "__version__":
        from importlib.metadata import version

        value = version("detseg")
    else:
        raise AttributeError(f"module 'detseg' has no attribute {name!r}; public names: {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
