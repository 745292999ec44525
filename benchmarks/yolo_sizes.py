"""Parameters and operations of the five sizes of YOLO beside those that YOLO11 is published with.

    python benchmarks/yolo_sizes.py

Each size is composed from ``conf`` for 80 classes and run on the meta device, where no number is computed: one image
of 640 x 640 pixels. A multiplication and an addition count as two operations, as in the published figures; convolutions
and products of matrices are counted (``torch.utils.flop_counter``), norms and activations are not.
"""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from detseg.config import instantiate, load_config

PUBLISHED = {"n": (2.6, 6.5), "s": (9.4, 21.5), "m": (20.1, 68.0), "l": (25.3, 86.9), "x": (56.9, 194.9)}
"""Millions of parameters and 1e9 operations at 640 pixels, of YOLO11's documentation."""


def measure(size: str) -> tuple[float, float]:
    """Return millions of parameters and 1e9 operations of a size."""
    cfg = load_config("model=yolo", f"backbone@model.backbone=yolo_{size}")
    cfg.data.num_classes = 80
    with torch.device("meta"):
        model: Any = instantiate(OmegaConf.to_container(cfg.model, resolve=True), path="model").eval()
        image = torch.zeros(1, 3, 640, 640)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(image)
    return sum(value.numel() for value in model.parameters()) / 1e6, counter.get_total_flops() / 1e9


def main() -> None:
    print("size  parameters (millions)          operations (1e9)")
    print("        here  published    off         here  published    off")
    for size, published in PUBLISHED.items():
        cells = [
            f"{here:8.2f} {there:10.1f} {100 * (here / there - 1):5.1f} %"
            for here, there in zip(measure(size), published, strict=True)
        ]
        print(f"{size:>4} {'    '.join(cells)}")


if __name__ == "__main__":
    main()
