"""COCO AP beside pycocotools and faster-coco-eval: time, peak memory and agreement, in one run.

    python benchmarks/coco_ap.py                      # 5,000 images x 112 detections x 80 classes
    python benchmarks/coco_ap.py --images 500         # a tenth of it
    python benchmarks/coco_ap.py --near 0.5           # half of the detections lie on objects, as a model's do

Each contender runs in its own process on the same numbers, drawn from a seed. Timed is everything from detections in
memory (ours: tensors per image; theirs: COCO results as an array, which they load faster than a list of dicts) to the
twelve figures. Memory is the process's peak above what it held when the clock started. All use one thread unless
OMP_NUM_THREADS says otherwise; faster-coco-eval takes threads of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

CLASSES = 80
DETECTIONS = 112  # per image
BATCH = 16  # images per update
AREAS = ("small", "medium", "large")
KEYS = ["map", "map_50", "map_75", *(f"map_{area}" for area in AREAS)]
KEYS += ["mar_1", "mar_10", "mar_100", *(f"mar_{area}" for area in AREAS)]
CONTENDERS = ("detseg", "faster-coco-eval", "pycocotools")


def draw(images: int, near: float, seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return detections (x1 y1 x2 y2 score label) and objects (x1 y1 x2 y2 label) per image, float32."""
    random = np.random.default_rng(seed)
    found, truth = [], []
    for _ in range(images):
        number = random.poisson(7)  # COCO's average
        boxes, labels = boxes_of(random, number), random.integers(0, CLASSES, number)
        guesses, guessed = boxes_of(random, DETECTIONS), random.integers(0, CLASSES, DETECTIONS)
        if number:
            which, hit = random.integers(0, number, DETECTIONS), random.random(DETECTIONS) < near
            guesses[hit] = boxes[which[hit]] + random.normal(0, 4, (hit.sum(), 4))
            guesses[:, 2:] = np.maximum(guesses[:, 2:], guesses[:, :2] + 1)
            guessed[hit] = labels[which[hit]]
        scores = random.random(DETECTIONS)
        found.append(np.column_stack([guesses, scores, guessed]).astype(np.float32))
        truth.append(np.column_stack([boxes, labels]).astype(np.float32))
    return found, truth


def boxes_of(random: np.random.Generator, number: int) -> np.ndarray:
    """Return ``(number, 4)`` xyxy in a picture of 640 x 480."""
    size = random.uniform(8, 240, (number, 2))
    corner = random.uniform(0, 1, (number, 2)) * (np.array([640, 480]) - size)
    return np.concatenate([corner, corner + size], axis=1)


def ours(found: list[np.ndarray], truth: list[np.ndarray]) -> Callable[[], dict[str, float]]:
    """Prepare tensors; the returned call updates in batches and computes."""
    import torch

    from detseg.metrics import CocoAP
    from detseg.structures import Detections, Target

    detections = [
        Detections(
            boxes=torch.from_numpy(rows[:, :4]),
            scores=torch.from_numpy(rows[:, 4]),
            labels=torch.from_numpy(rows[:, 5]).long(),
        )
        for rows in found
    ]
    targets = [
        Target(boxes=torch.from_numpy(rows[:, :4]), labels=torch.from_numpy(rows[:, 4]).long(), image_id=i + 1)
        for i, rows in enumerate(truth)
    ]

    def run() -> dict[str, float]:
        metric = CocoAP(num_classes=CLASSES)
        for at in range(0, len(targets), BATCH):
            metric.update(detections[at : at + BATCH], targets[at : at + BATCH])
        return {key: float(value) for key, value in metric.compute().items() if key in KEYS}

    return run


def theirs(name: str, found: list[np.ndarray], truth: list[np.ndarray]) -> Callable[[], dict[str, float]]:
    """Prepare COCO's dictionaries of truth and an array of results; the returned call loads and evaluates."""
    if name == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval as Evaluation
    else:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as Evaluation

    rows = []
    annotations = []
    for i, (guesses, objects) in enumerate(zip(found, truth, strict=True), start=1):
        wide = guesses.astype(np.float64)
        wide[:, 2:4] -= wide[:, :2]
        rows.append(np.column_stack([np.full(len(wide), i), wide[:, :5], wide[:, 5] + 1]))
        for x1, y1, x2, y2, label in objects.astype(np.float64).tolist():
            area = float(np.float32(x2 - x1) * np.float32(y2 - y1))  # as a Target fills it in
            box = [x1, y1, x2 - x1, y2 - y1]
            entry = {"id": len(annotations) + 1, "image_id": i, "category_id": int(label) + 1, "iscrowd": 0}
            annotations.append(entry | {"bbox": box, "area": area})
    results = np.concatenate(rows)  # (N, 7): image, x, y, w, h, score, category
    dataset = {
        "info": {},
        "images": [{"id": i, "width": 640, "height": 480} for i in range(1, len(found) + 1)],
        "categories": [{"id": k + 1, "name": str(k)} for k in range(CLASSES)],
        "annotations": annotations,
    }

    def run() -> dict[str, float]:
        truths = COCO()
        truths.dataset = dataset
        truths.createIndex()
        evaluation = Evaluation(truths, truths.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return dict(zip(KEYS, map(float, evaluation.stats[:12]), strict=True))

    return run


def resident() -> float:
    """Return the memory the process holds now, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def contend(name: str, images: int, near: float) -> None:
    """Run one contender and print its time, memory and figures as JSON."""
    found, truth = draw(images, near)
    run = ours(found, truth) if name == "detseg" else theirs(name, found, truth)
    before = resident()
    with contextlib.redirect_stdout(io.StringIO()):
        start = time.perf_counter()
        figures = run()
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "above": peak - before, "peak": peak, "figures": figures}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--near", type=float, default=0.0, help="share of detections that lie on an object")
    parser.add_argument("--skip", nargs="*", default=[], choices=CONTENDERS, help="contenders to leave out")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        contend(options.contender, options.images, options.near)
        return
    results = {}
    for name in CONTENDERS:
        if name in options.skip:
            continue
        command = [sys.executable, __file__, "--contender", name, "--images", str(options.images)]
        answer = subprocess.run([*command, "--near", str(options.near)], check=True, capture_output=True, text=True)
        results[name] = json.loads(answer.stdout.splitlines()[-1])
    mine = results["detseg"]
    print(f"{options.images} images x {DETECTIONS} detections x {CLASSES} classes, {options.near:.0%} near an object")
    print(f"{'':18}{'seconds':>9}{'x ours':>8}{'MiB above':>11}{'MiB peak':>10}{'largest difference':>20}")
    for name, result in results.items():
        apart = max(abs(result["figures"][key] - mine["figures"][key]) for key in KEYS)
        ratio = result["seconds"] / mine["seconds"]
        numbers = f"{result['seconds']:9.2f}{ratio:8.1f}{result['above']:11.0f}{result['peak']:10.0f}{apart:20.1e}"
        print(f"{name:18}{numbers}")


if __name__ == "__main__":
    main()
