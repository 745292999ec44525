"""Semantic segmenters beside peers, as Markdown tables: training, counting, windows, dense CRF, skips, learning.

    python benchmarks/semantic.py                                   # what needs no trained run, some 6 minutes
    python benchmarks/semantic.py --parts step confusion
    python benchmarks/semantic.py --parts skips learn --runs runs/learning/X

``step``: a training step beside torchvision's FCN and DeepLabV3 over ResNet-50 with the same weights on the same batch,
and beside U-Net of segmentation_models_pytorch in a bare loop; ours with its own loss, the images and maps as a loader
gives them. ``confusion``: the confusion matrix of a map of 1024 x 2048 beside torchmetrics'. ``window``: one image of
256 pixels, classified patch by patch and by convolution, with the same logits. ``crf``: DeepLab's refinement of one
image, beside the authors' code where pydensecrf2 is installed. ``skips``: boundary IoU of FCN-32s, 16s and 8s, in runs
of several seeds. ``learn``: figures and minutes of runs. Contenders take turns; ratios are medians of each round's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import segmentation_models_pytorch as smp
import torch
import torchvision
from side_by_side.turns import markdown, paired_ratio, seconds_in_turns
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassConfusionMatrix

from detseg.metrics.mean_iou import confusion_matrix
from detseg.models import FCN, SMP, DeepLabV3, SlidingWindow
from detseg.models.fcn import FCNHead
from detseg.nn import DilatedResNet
from detseg.ops.dense_crf import dense_crf
from detseg.ops.permutohedral import PermutohedralLattice
from detseg.structures import SemanticMap, Target

CLASSES = 21
IGNORED = 255
SKIPS = ("fcn32s", "fcn16s", "fcn8s")


class Learner:
    """A model that learns one batch again and again; ``first`` is the first step's loss."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> None:
        self.model, self.loss = model.train(), loss
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9)
        self.first: float | None = None

    def __call__(self) -> None:
        """Go one step."""
        torch.manual_seed(0)  # dropout
        value = self.loss(self.model)
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.first = float(value.detach()) if self.first is None else self.first


def torchvision_pair(name: str, images: Tensor, labels: Tensor) -> tuple[Learner, Learner]:
    """Return torchvision's network and ours with its weights; both count the auxiliary head's loss by half."""
    make = getattr(torchvision.models.segmentation, name)
    theirs = make(weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save(theirs.state_dict(), path)
        common: dict[str, Any] = {
            "num_classes": CLASSES,
            "backbone": DilatedResNet(),
            "auxiliary": FCNHead,
            "weights": path,
        }
        ours = DeepLabV3(**common) if "deeplab" in name else FCN(head=FCNHead, upsample=None, **common)
    normalise: Any = ours.normalize

    def their_loss(model: nn.Module) -> Tensor:
        found = model(normalise(images))
        parts = [F.cross_entropy(found[part], labels, ignore_index=IGNORED) for part in ("out", "aux")]
        return parts[0] + 0.5 * parts[1]

    return Learner(theirs, their_loss), Learner(ours, our_loss(images, labels))


def smp_pair(images: Tensor, labels: Tensor) -> tuple[Learner, Learner]:
    """Return smp's U-Net over ResNet-18 in a bare loop, and the same through ``detseg.models.SMP``."""
    theirs = smp.Unet("resnet18", encoder_weights=None, classes=CLASSES)
    ours = SMP(num_classes=CLASSES, arch="Unet", encoder="resnet18")
    inner = next(module for module in ours.modules() if isinstance(module, smp.Unet))
    inner.load_state_dict(theirs.state_dict())
    normalise: Any = ours.normalize

    def their_loss(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(normalise(images)), labels, ignore_index=IGNORED)

    return Learner(theirs, their_loss), Learner(ours, our_loss(images, labels))


def our_loss(images: Tensor, labels: Tensor) -> Callable[[Any], Tensor]:
    """Return a whole step's loss of ours, as the task adds it up."""
    none = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    targets = [Target(*none, semantic=SemanticMap(own)) for own in labels]
    sizes = torch.tensor([images.shape[-2:]] * len(images))
    return lambda model: torch.stack(list(model.loss(model(images, sizes), targets).values())).sum()


def step(options: argparse.Namespace) -> Iterator[str]:
    """Yield the table of training steps."""
    yield "## Training step (wanted: 1.0x)\n"
    rows = []
    for name, batch, side in (("fcn_resnet50", 2, 224), ("deeplabv3_resnet50", 2, 224), ("smp Unet, resnet18", 4, 224)):
        torch.manual_seed(1)
        images = torch.rand(batch, 3, side, side)
        labels = torch.randint(0, CLASSES, (batch, side, side))
        labels[:, :8] = IGNORED
        pair = smp_pair(images, labels) if name.startswith("smp") else torchvision_pair(name, images, labels)
        seconds = seconds_in_turns(pair, options.rounds)
        theirs, ours = (batch / statistics.median(times) for times in seconds)
        assert pair[0].first is not None and pair[1].first is not None
        apart = abs(pair[1].first / pair[0].first - 1)
        ratio = f"{paired_ratio(*seconds):.2f}x"
        rows.append([name, f"{batch} of {side} x {side}", f"{theirs:.2f}", f"{ours:.2f}", ratio, f"{apart:.0e}"])
    yield markdown(["model", "batch", "peer images/s", "detseg images/s", "ratio", "loss apart"], rows)


def confusion(options: argparse.Namespace) -> Iterator[str]:
    """Yield how long one map's counting takes beside torchmetrics."""
    yield "## Confusion matrix of a map of 1024 x 2048, 19 classes (wanted: 5x)\n"
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 19, (1024, 2048), generator=generator)
    guess = torch.where(torch.rand(truth.shape, generator=generator) < 0.8, truth, truth.flip(0))
    truth[torch.rand(truth.shape, generator=generator) < 0.1] = IGNORED
    theirs = MulticlassConfusionMatrix(num_classes=19, ignore_index=IGNORED)
    theirs.update(guess, truth)
    equal = torch.equal(theirs.compute(), confusion_matrix(guess, truth, 19))
    calls = [lambda: theirs.update(guess, truth), lambda: confusion_matrix(guess, truth, 19)]
    seconds = seconds_in_turns(calls, options.rounds)
    own, their = statistics.median(seconds[1]), statistics.median(seconds[0])
    row = [
        "update",
        f"{own * 1e3:.1f}",
        f"{their * 1e3:.1f}",
        f"{paired_ratio(*seconds):.1f}x",
        "yes" if equal else "NO",
    ]
    yield markdown(["", "detseg ms", "torchmetrics ms", "ratio", "equal"], [row])


@torch.no_grad()
def window(options: argparse.Namespace) -> Iterator[str]:
    """Yield the time of one image, patch by patch and by convolution."""
    yield "## Sliding window, one image of 256 x 256 (wanted: 50x)\n"
    rows = []
    image = torch.rand(1, 3, 256, 256)
    kinds: dict[str, dict[str, Any]] = {
        "patches of 95, every 16th pixel": {"step": 16},
        "patches of 95, every 4th pixel": {"step": 4},
        "patches of 36, every 4th pixel (small)": {
            "patch": 36,
            "widths": [16, 32],
            "kernels": [5, 5],
            "hidden": 64,
            "step": 4,
        },
    }
    for name, settings in kinds.items():
        torch.manual_seed(0)
        model = SlidingWindow(num_classes=CLASSES, **settings).eval()
        models = {False: model, True: SlidingWindow(num_classes=CLASSES, dense=True, **settings).eval()}
        models[True].load_state_dict(model.state_dict())
        apart = float((models[False](image) - models[True](image)).abs().max())
        seconds = seconds_in_turns([lambda m=models[dense]: m(image) for dense in (False, True)], 2)
        slow, fast = (statistics.median(times) for times in seconds)
        rows.append([name, f"{slow:.3f}", f"{fast:.4f}", f"{paired_ratio(*seconds):.0f}x", f"{apart:.0e}"])
    yield markdown(["", "patch by patch s", "convolutional s", "ratio", "logits apart"], rows)


def crf(options: argparse.Namespace) -> Iterator[str]:
    """Yield the time of refining one image of VOC's size, beside the released code where pydensecrf2 is installed."""
    yield "## Dense CRF, one image of 375 x 500, 21 classes, 10 iterations (wanted: 1x)\n"
    generator = torch.Generator().manual_seed(0)
    size = (375, 500)
    smooth = [torch.rand(1, count, 12, 16, generator=generator) for count in (3, CLASSES)]
    image, logits = (F.interpolate(coarse, size, mode="bilinear")[0] for coarse in smooth)
    image = (image + torch.randn(3, *size, generator=generator) * 0.03).clamp(0, 1).mul(255).round() / 255
    logits = 10 * logits
    rows, column = torch.meshgrid(*map(torch.arange, size), indexing="ij")
    places = torch.stack([column / 80, rows / 80, *(image * 255 / 13)]).flatten(1).T  # (N, 5)
    lattice, values = PermutohedralLattice(places), logits.softmax(0).flatten(1).T.contiguous()  # (N, K)
    calls: list[Callable[[], object]] = [lambda: dense_crf(logits, image), lambda: lattice.filter(values)]
    peer = released_crf(logits, image)
    if peer:
        calls.append(peer)
    whole, single, *theirs = seconds_in_turns(calls, options.rounds)
    row = ["refinement", f"{statistics.median(whole):.2f}", "n/a", "n/a", "n/a"]
    if peer:
        apart = float((dense_crf(logits, image) - peer()).abs().mean())
        row[2:] = [f"{statistics.median(theirs[0]):.2f}", f"{paired_ratio(theirs[0], whole):.2f}x", f"{apart:.0e}"]
    one = ["one filter of place and colour", f"{statistics.median(single):.3f}", "n/a", "n/a", "n/a"]
    yield markdown(["", "detseg s", "pydensecrf2 s", "ratio", "probabilities apart on average"], [row, one])


def released_crf(logits: Tensor, image: Tensor) -> Callable[[], Tensor] | None:
    """Return the authors' code with the defaults of ``dense_crf``, or ``None`` where it is not installed."""
    try:
        from pydensecrf.densecrf import DenseCRF2D
    except ImportError:
        return None
    classes, height, width = logits.shape
    energy = np.ascontiguousarray(-logits.log_softmax(0).flatten(1).numpy())  # (K, N)
    colours = np.ascontiguousarray((image * 255).round().byte().permute(1, 2, 0).numpy())  # (H, W, 3)

    def refine() -> Tensor:
        field = DenseCRF2D(width, height, classes)
        field.setUnaryEnergy(energy)
        field.addPairwiseGaussian(sxy=3, compat=3)
        field.addPairwiseBilateral(sxy=80, srgb=13, rgbim=colours, compat=10)
        return torch.from_numpy(np.asarray(field.inference(10))).view_as(logits)

    return refine


def skips(options: argparse.Namespace) -> Iterator[str]:
    """Yield boundary IoU of FCN's three forms, seed by seed, from runs below ``<runs>/orchard_<form>*``."""
    yield "## Skips: boundary IoU (wanted: 32s < 16s < 8s for every seed)\n"
    found: dict[str, dict[str, float]] = {}
    for form in SKIPS:
        for run in sorted(options.runs.glob(f"orchard_{form}*/*/*/metrics.json")) if options.runs else ():
            value = json.loads(run.read_text()).get("boundary_iou")
            if value is not None:
                found.setdefault(_seed(run), {})[form] = value
    rows = []
    for seed, values in sorted(found.items()):
        known = [values[form] for form in SKIPS if form in values]
        holds = len(known) == len(SKIPS) and known == sorted(known) and len(set(known)) == len(known)
        cells = [f"{values[form]:.3f}" if form in values else "n/a" for form in SKIPS]
        rows.append([seed, *cells, "holds" if holds else "does NOT hold"])
    yield (
        markdown(["seed", *SKIPS, "order"], rows) if rows else "No run with task.boundary=true was found below --runs."
    )


def _seed(run: Path) -> str:
    from omegaconf import OmegaConf

    return str(OmegaConf.load(run.with_name("resolved.yaml")).seed)


def learn(options: argparse.Namespace) -> Iterator[str]:
    """Yield figures of the finished runs below ``<runs>/<experiment>``."""
    yield "## Learning (wanted on Orchard: mIoU 0.85; the naive ideas are reported)\n"
    rows = []
    for run in sorted(options.runs.glob("*/*/*/metrics.json")) if options.runs else ():
        figures = json.loads(run.read_text())
        if figures.get("miou") is None:
            continue
        minutes = run.parents[2] / "minutes.json"
        spent = f"{json.loads(minutes.read_text()):.1f}" if minutes.exists() else "n/a"
        cells = [
            "n/a" if figures.get(key) is None else f"{figures[key]:.3f}" for key in ("miou", "dice", "boundary_iou")
        ]
        rows.append([run.parents[2].name, _seed(run), *cells, spent])
    head = ["experiment", "seed", "mIoU", "Dice", "boundary IoU", "minutes"]
    yield markdown(head, rows) if rows else "No finished run of a segmenter was found below --runs."


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[str]]] = {
    "step": step,
    "confusion": confusion,
    "window": window,
    "crf": crf,
    "skips": skips,
    "learn": learn,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), help="default: all that have what they need")
    parser.add_argument("--runs", type=Path, help="folder of trained runs, as benchmarks/learning.py leaves them")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    parts = options.parts or [name for name in PARTS if options.runs or name not in ("skips", "learn")]
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, medians of {options.rounds} rounds\n")
    for name in parts:
        for text in PARTS[name](options):
            print(text, flush=True)
        print(flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
