"""What ``detseg predict`` does, for notebooks too: find things in photos and write them down."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from detseg.experiment import Outcome, write_json

if TYPE_CHECKING:
    from detseg.predictor import Predictor
    from detseg.structures import Detections, SemanticMap

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
"""What counts as a photo in a folder, in small letters; a file or glob may name any other."""


def predict(cfg: DictConfig) -> Outcome:
    """Run a checkpoint over photos; write pictures and ``predictions.json`` into a new directory.

    Boxes and masks are in the photos' own pixels.

    Args:
        cfg: from ``load_config(..., name="predict")``.

    Raises:
        FileNotFoundError: ``source`` or ``ckpt`` names no file.
    """
    import torch

    from detseg.checkpoint import load
    from detseg.evaluation import ask_as_told
    from detseg.results import result_rows, write_map
    from detseg.structures import SemanticMap

    paths = find_images(cfg.source)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    predictor = load(cfg.ckpt, device=device, allow=list(cfg.allow))
    ask_as_told(predictor.model, cfg)
    directory = Path(cfg.paths.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for path, name, found in _predictions(predictor, paths, cfg.batch_size):
        if isinstance(found, SemanticMap):
            rows.append({"file": str(path), "map": write_map(found, directory / "maps" / f"{name}.png")})
        else:
            found = found[found.scores >= cfg.threshold]
            ids, names = predictor.category_ids, predictor.class_names
            rows += [{"file": str(path), **row} for row in result_rows(found, category_ids=ids, class_names=names)]
        if cfg.pictures:
            _draw(path, found, predictor.class_names, directory / "pictures" / f"{name}.png")
    write_json(directory / "predictions.json", rows)
    pictures = [directory / "pictures"] if cfg.pictures else []
    return Outcome(
        directory=directory,
        class_names=predictor.class_names,
        checkpoint=Path(cfg.ckpt),
        files=[directory / "predictions.json", *pictures],
    )


def find_images(source: str) -> list[Path]:
    """Return the photos that ``source`` names, sorted: one file, those of a folder, or those of a glob.

    Raises:
        FileNotFoundError: there are none.
    """
    path = Path(source)
    if path.is_dir():
        found = [entry for entry in path.iterdir() if entry.suffix.lower() in IMAGE_ENDINGS]
    elif path.is_file():
        found = [path]
    else:
        found = [Path(entry) for entry in glob.glob(source, recursive=True) if Path(entry).is_file()]
    if not found:
        kind = (
            f"no image ({', '.join(IMAGE_ENDINGS)}) in that folder" if path.is_dir() else "no such file, folder or glob"
        )
        raise FileNotFoundError(f"source={source}: {kind} (looked from {Path.cwd()})")
    return sorted(found)


def _predictions(
    predictor: Predictor, paths: Sequence[Path], batch_size: int
) -> Iterator[tuple[Path, str, Detections | SemanticMap]]:
    """Yield each photo, a name for its files that no other photo has, and what was found."""
    taken: set[str] = set()
    for start in range(0, len(paths), batch_size):
        group = list(paths[start : start + batch_size])
        for path, found in zip(group, predictor(group, batch_size=batch_size), strict=True):
            names = (path.stem if number == 0 else f"{path.stem}_{number}" for number in count())
            name = next(name for name in names if name not in taken)
            taken.add(name)
            yield path, name, found


def _draw(path: Path, found: Detections | SemanticMap, class_names: Sequence[str], target: Path) -> None:
    from detseg.data.image import read_image
    from detseg.visualize import draw

    draw(read_image(path), found, class_names, target, min_score=0.0)
