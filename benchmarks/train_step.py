"""A training step of ours beside torchvision's own model, on the same weights and the same batch, in one run.

    python benchmarks/train_step.py                                # four models, 2 images of 480 x 640
    python benchmarks/train_step.py fcos --batch 4 --rounds 9
    python benchmarks/train_step.py --device cuda --batch 8 --height 800 --width 1216

The models are torchvision's: ResNet-50 from random weights with frozen batch norm, of which the last three stages
train, 256-channel pyramid, 91 classes; ``ssd300`` and ``ssdlite``, which take square images of 300 and 320 pixels
whatever is asked for, train all of their layers. A step is forward, losses, backward and SGD. torchvision gets a list
of images and does not resize; ours gets them padded, as a loader gives them. Steps alternate (theirs, ours, theirs,
ours, ...), the first of each does not count, the medians are shown. "loss" is the largest relative difference between
the first step's loss terms: 0 but for rounding in the dense models, and the two-stage models sample from one seed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from side_by_side.turns import seconds_in_turns
from side_by_side.twins import DENSE, KNOWN, SIDES, twins
from torch import Tensor, nn

from detseg.structures import Target

NAMES = {"loss_rpn_box_reg": "loss_rpn_box", "loss_box_reg": "loss_box"}  # theirs -> ours, two-stage
DENSE_NAMES = {
    "bbox_regression": "loss_box",
    "classification": "loss_classification",
    "bbox_ctrness": "loss_centerness",
}
Step = Callable[[], None]
Terms = dict[str, Tensor]


class Data(NamedTuple):
    """One batch, as ours takes it."""

    images: Tensor
    sizes: Tensor
    targets: list[Target]


class Timing(NamedTuple):
    """What one model's steps took.

    Attributes:
        seconds: of each contender in every round.
        apart: largest relative difference of ours and theirs among the first step's loss terms.
    """

    seconds: list[list[float]]
    apart: float

    def rates(self, images: int) -> list[float]:
        """Return the images per second of each contender."""
        return [images / statistics.median(times) for times in self.seconds]


def draw(*, batch: int, objects: int, height: int, width: int, device: str = "cpu") -> Data:
    """Return noise with boxes and masks of 16 pixels to half the image, from a seed."""
    torch.manual_seed(0)
    size = torch.tensor([width, height])
    targets = []
    for _ in range(batch):
        side = 16 + torch.rand(objects, 2) ** 2 * (size / 2 - 16)
        corner = torch.rand(objects, 2) * (size - side)
        masks = torch.rand(objects, height, width) > 0.5
        boxes = torch.cat([corner, corner + side], dim=1)
        targets.append(Target(boxes=boxes, labels=torch.randint(0, 90, (objects,)), masks=masks).to(device))
    images = torch.rand(batch, 3, height, width, device=device)
    sizes = torch.tensor([[height, width]], device=device).repeat(batch, 1)
    return Data(images, sizes, targets)


class Learner:
    """A model in training mode with its optimiser, which learns one batch again and again.

    Attributes:
        first: the loss terms of the first step, under our names.
    """

    def __init__(self, model: nn.Module, losses: Callable[[nn.Module], Terms], names: dict[str, str]) -> None:
        self.model, self.losses, self.names = model.train(), losses, names
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=1e-5, momentum=0.9)
        self.first: Terms = {}

    def __call__(self) -> None:
        """Go one step."""
        torch.manual_seed(0)  # two-stage models sample
        losses = self.losses(self.model)
        sum(losses.values()).backward()  # type: ignore[union-attr]  # there are terms
        self.optimizer.step()
        self.optimizer.zero_grad()
        if not self.first:
            self.first = {self.names.get(name, name): value.detach() for name, value in losses.items()}


def contenders(
    name: str, data: Data, device: str, layout: torch.memory_format, *, half: bool = False
) -> tuple[Learner, Learner]:
    """Return torchvision's model and ours, ready to learn the batch.

    Args:
        name: of the model.
        data: the batch.
        device: where they learn.
        layout: of the weights of both; images are brought into it where a model asks for a batch.
        half: ours multiplies in bfloat16 (``features=bf16``), its losses are of float32.
    """
    torch.manual_seed(1)
    theirs, ours = (model.to(device).to(memory_format=layout) for model in twins(name))
    # torchvision's labels begin at 1, and its dense models have an unused class 0.
    truth: list[dict[str, Any]] = [{"boxes": target.boxes, "labels": target.labels + 1} for target in data.targets]
    if name == "mask_rcnn":
        for wanted, target in zip(truth, data.targets, strict=True):
            assert target.masks is not None
            wanted["masks"] = target.masks.byte()
    pictures = list(data.images)

    def our_losses(model: Any) -> Terms:
        images = data.images.contiguous(memory_format=layout)  # (B, 3, H, W)
        with torch.autocast(device, torch.bfloat16, enabled=half):
            return model.loss(model(images, data.sizes, data.targets), data.targets)

    names = DENSE_NAMES if name in DENSE else NAMES
    return Learner(theirs, lambda model: model(pictures, truth), names), Learner(ours, our_losses, {})


def measure(
    name: str,
    data: Data,
    rounds: int,
    device: str,
    layouts: Sequence[torch.memory_format] = (torch.contiguous_format,),
    *,
    half: bool = False,
) -> Timing:
    """Time torchvision's and our steps in turns, for every layout; with ``half`` also ours in bfloat16 in the last."""
    learners = [learner for layout in layouts for learner in contenders(name, data, device, layout)]
    learners += [contenders(name, data, device, layouts[-1], half=True)[1]] if half else []
    seconds = seconds_in_turns(learners, rounds, device=device)
    theirs, ours = learners[0].first, learners[1].first
    return Timing(seconds, max(float((ours[key] / value - 1).abs()) for key, value in theirs.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ["faster_rcnn", "mask_rcnn", "retinanet", "fcos"]
    parser.add_argument("models", nargs="*", default=known, help=f"of {' '.join(KNOWN)}; default: {' '.join(known)}")
    parser.add_argument("--batch", type=int, default=2, help="images")
    parser.add_argument("--height", type=int, default=480, help="pixels, a multiple of 32")
    parser.add_argument("--width", type=int, default=640, help="pixels, a multiple of 32")
    parser.add_argument("--objects", type=int, default=10, help="per image")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    print(
        f"{options.batch} images of {options.height} x {options.width}, {options.objects} objects each, "
        f"{options.device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(f"{'':<12} {'detseg images/s':>15} {'torchvision images/s':>20} {'ratio':>8} {'loss':>10}", flush=True)
    for name in options.models:
        height, width = SIDES.get(name, options.height), SIDES.get(name, options.width)
        data = draw(batch=options.batch, objects=options.objects, height=height, width=width, device=options.device)
        timing = measure(name, data, options.rounds, options.device)
        theirs, ours = timing.rates(options.batch)
        print(f"{name:<12} {ours:>15.3f} {theirs:>20.3f} {ours / theirs:>7.2f}x {timing.apart:>10.1e}", flush=True)


if __name__ == "__main__":
    main()
