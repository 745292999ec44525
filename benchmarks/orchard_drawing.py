"""How fast Orchard is drawn, beside the speed at which training takes images.

Run: python benchmarks/orchard_drawing.py [--seconds 2] [--step 0.15]
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

from detseg.data.orchard import OrchardDataset
from detseg.data.orchard_draw import draw_scene


def rate(draw, seconds: float) -> float:
    """Return images per second of CPU time, so that other work on the machine does not count."""
    draw(0)  # what the first call loads is not measured
    start, count = time.process_time(), 0
    while time.process_time() - start < seconds:
        draw(count)
        count += 1
    return count / (time.process_time() - start)


def main() -> None:
    """Print a table of images per second and core."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="CPU seconds per figure")
    parser.add_argument("--step", type=float, default=0.15, help="seconds of a training step of 16 images at 128 px")
    arguments = parser.parse_args()
    print(f"{'what':44}{'images/s per core':>18}{'ms per image':>14}")
    rows = {
        f"draw at {size} px": lambda index, size=size: draw_scene(seed=0, split=0, index=index, size=(size, size))
        for size in (64, 128, 256, 512)
    }
    for truth in ("boxes", "instances", "semantic"):
        dataset = OrchardDataset(split="train", images=200, truth=truth)
        for index in range(200):
            dataset.scene(index)
        rows[f"kept at 128 px, sample with {truth}"] = lambda index, kept=dataset: kept[index % 200]
    speeds = {name: rate(draw, arguments.seconds) for name, draw in rows.items()}
    for name, speed in speeds.items():
        print(f"{name:44}{speed:18.0f}{1000 / speed:14.2f}")
    needed = 16 / arguments.step
    print(f"{f'training takes (16 images in {arguments.step} s)':44}{needed:18.0f}{1000 / needed:14.2f}")
    print(f"drawing is {speeds['draw at 128 px'] / needed:.1f}x as fast as training, on one core and nothing kept")


if __name__ == "__main__":
    main()
