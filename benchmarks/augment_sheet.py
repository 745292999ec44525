"""What a model is fed: training samples as the config augments them, with boxes and masks, on one PNG.

    python benchmarks/augment_sheet.py orchard_yolo.png data=orchard augment=yolo
    python benchmarks/augment_sheet.py cells_ssd.png data=bccd augment=ssd --images 12 --epoch 3
    python benchmarks/augment_sheet.py pasted.png model=mask_rcnn_small augment=copy_paste --epoch 99 --of 100

Samples come from the data module's own loader, in its order. ``--of`` is the length of the training in epochs, from
whose end ``close_epochs`` counts; without it nothing is closed.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import detseg
from detseg import visualize
from detseg.config import instantiate
from detseg.data import DetectionData, Sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="of the PNG")
    parser.add_argument("overrides", nargs="*", help="as after detseg train")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--epoch", type=int, default=0, help="counted from 0")
    parser.add_argument("--of", type=int, default=None, help="epochs of the whole training")
    parser.add_argument("--columns", type=int, default=None)
    options = parser.parse_intermixed_args()
    cfg = detseg.load_config("data.num_workers=0", *options.overrides)
    data: DetectionData = instantiate(cfg.data, path="data")
    pictures = draw(data, samples(data, options.images, options.epoch, options.of))
    print(visualize.save(visualize.contact_sheet(pictures, columns=options.columns), options.path))


def samples(data: DetectionData, images: int, epoch: int, of: int | None) -> list[Sample]:
    """Return the first training samples of an epoch, as the loader would give them."""
    loader = data.train_dataloader()
    split, sampler = loader.dataset, loader.sampler
    split.epochs = of  # type: ignore[attr-defined]  # our loader's
    sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return [split[key] for key in islice(sampler, images)]


def draw(data: DetectionData, shown: list[Sample]) -> list[visualize.Picture]:
    """Draw the truth over samples, all enlarged by one factor at which captions can be read."""
    side = max(min(sample.image.shape[-2:]) for sample in shown)
    scale = visualize.legible_scale(side, side)
    return [visualize.draw_target(sample.image, sample.target, data.class_names, scale=scale) for sample in shown]


if __name__ == "__main__":
    main()
