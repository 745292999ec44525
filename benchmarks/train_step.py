"""A training step of ours beside torchvision's own model, on the same weights and the same batch, in one run.

    python benchmarks/train_step.py                                # all four models, 2 images of 480 x 640
    python benchmarks/train_step.py fcos --batch 4 --rounds 9
    python benchmarks/train_step.py --device cuda --batch 8 --height 800 --width 1216

The four are torchvision's: ResNet-50 from random weights with frozen batch norm, of which the last three stages train,
256-channel pyramid, 91 classes. A step is forward, losses, backward and SGD. torchvision gets a list of images and
does not resize; ours gets them padded, as a loader gives them. Steps alternate (theirs, ours, theirs, ours, ...), the
first of each does not count, the medians are shown. "loss" is the largest relative difference between the first step's
loss terms: 0 but for rounding in RetinaNet and FCOS, and the two-stage models sample from one seed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import detection, resnet50
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.retinanet import _default_anchorgen
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from detseg.models import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from detseg.models.faster_rcnn import BOX_LAYERS, BOX_RENAMES
from detseg.models.mask_rcnn import MASK_LAYERS, MASK_RENAMES
from detseg.models.torchvision_weights import ClassLayer, load_torchvision_state
from detseg.nn import BackboneWithFPN, TorchvisionBackbone
from detseg.structures import Target

IDS = 91  # of COCO as torchvision counts them
NAMES = {"loss_rpn_box_reg": "loss_rpn_box", "loss_box_reg": "loss_box"}  # theirs -> ours, two-stage
DENSE_NAMES = {
    "bbox_regression": "loss_box",
    "classification": "loss_classification",
    "bbox_ctrness": "loss_centerness",
}
Step = Callable[[], dict[str, Tensor]]


class Data(NamedTuple):
    """One batch, as ours takes it."""

    images: Tensor
    sizes: Tensor
    targets: list[Target]


def draw(options: argparse.Namespace) -> Data:
    """Return noise with boxes and masks of 16 pixels to half the image, from a seed."""
    torch.manual_seed(0)
    count, size = options.objects, torch.tensor([options.width, options.height])
    targets = []
    for _ in range(options.batch):
        side = 16 + torch.rand(count, 2) ** 2 * (size / 2 - 16)
        corner = torch.rand(count, 2) * (size - side)
        masks = torch.rand(count, options.height, options.width) > 0.5
        boxes = torch.cat([corner, corner + side], dim=1)
        targets.append(Target(boxes=boxes, labels=torch.randint(0, 90, (count,)), masks=masks).to(options.device))
    images = torch.rand(options.batch, 3, options.height, options.width, device=options.device)
    sizes = torch.tensor([[options.height, options.width]], device=options.device).repeat(options.batch, 1)
    return Data(images, sizes, targets)


def their_backbone(dense: bool) -> nn.Module:
    body = resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
    for name, module in body.named_modules():
        if name.endswith("bn3"):
            module.weight.fill_(0.2)  # or the residual sums of random weights grow without bound
    extra: dict[str, Any] = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)} if dense else {}
    return _resnet_fpn_extractor(body, 3, **extra)


def our_backbone(dense: bool) -> BackboneWithFPN:
    strides = (8, 16, 32) if dense else (4, 8, 16, 32)
    body = TorchvisionBackbone(name="resnet50", strides=strides, frozen_norm=True, frozen_stages=2)
    return BackboneWithFPN(backbone=body, extra="p6p7_from_p5" if dense else "pool")


def build(name: str) -> tuple[nn.Module, nn.Module]:
    """Return torchvision's model and ours with its weights."""
    dense = name in ("retinanet", "fcos")
    classes = {"faster_rcnn": detection.FasterRCNN, "mask_rcnn": detection.MaskRCNN}
    makers: dict[str, Callable[..., nn.Module]] = classes | {
        "retinanet": partial(detection.RetinaNet, anchor_generator=_default_anchorgen()),
        "fcos": detection.FCOS,
    }
    torch.manual_seed(1)
    theirs = makers[name](their_backbone(dense), num_classes=IDS, _skip_resize=True)
    ours_makers: dict[str, Callable[..., nn.Module]] = {
        "faster_rcnn": FasterRCNN,
        "mask_rcnn": MaskRCNN,
        "retinanet": RetinaNet,
        "fcos": FCOS,
    }
    ours = ours_makers[name](num_classes=90, backbone=our_backbone(dense))
    layers: dict[str, Sequence[ClassLayer]] = {
        "faster_rcnn": BOX_LAYERS,
        "mask_rcnn": MASK_LAYERS,
        "retinanet": [ClassLayer("head.classification_head.cls_logits", anchors=9)],
        "fcos": [ClassLayer("head.classification_head.cls_logits")],
    }
    renames = {"faster_rcnn": BOX_RENAMES, "mask_rcnn": MASK_RENAMES}.get(name)
    load_torchvision_state(ours, theirs.state_dict(), layers=layers[name], renames=renames)
    return theirs, ours


def steps(name: str, data: Data, device: str) -> tuple[Step, Step]:
    theirs, ours = (model.to(device).train() for model in build(name))
    # torchvision's labels begin at 1, and its dense models have an unused class 0.
    truth = [{"boxes": t.boxes, "labels": t.labels + 1, "masks": t.masks.byte()} for t in data.targets]
    if name != "mask_rcnn":
        truth = [{key: value for key, value in target.items() if key != "masks"} for target in truth]
    pictures = list(data.images)

    def run(model: nn.Module, optimizer: torch.optim.Optimizer, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        return {key: value.detach() for key, value in losses.items()}

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.optim.SGD(trained, lr=1e-5, momentum=0.9)  # both keep the weights that they share

    their_optimizer, our_optimizer = optimizer(theirs), optimizer(ours)
    names = NAMES if "rcnn" in name else DENSE_NAMES

    def their_step() -> dict[str, Tensor]:
        losses = run(theirs, their_optimizer, theirs(pictures, truth))
        return {names.get(key, key): value for key, value in losses.items()}

    def our_step() -> dict[str, Tensor]:
        outputs = ours(data.images, data.sizes, data.targets)
        return run(ours, our_optimizer, ours.loss(outputs, data.targets))

    return their_step, our_step


def measure(name: str, data: Data, rounds: int, device: str) -> str:
    """Return one row of the table."""
    pair = steps(name, data, device)
    taken: list[list[float]] = [[], []]
    first: list[dict[str, Tensor]] = []
    for turn in range(rounds + 1):
        for step, times in zip(pair, taken, strict=True):
            torch.manual_seed(turn)
            start = time.perf_counter()
            losses = step()
            if device != "cpu":
                torch.cuda.synchronize()
            if turn == 0:
                first.append(losses)
            else:
                times.append(time.perf_counter() - start)
    theirs, ours = (statistics.median(times) for times in taken)
    apart = max(float((first[1][key] / value - 1).abs()) for key, value in first[0].items())
    count = len(data.images)
    return f"{name:<12} {count / ours:>15.3f} {count / theirs:>20.3f} {theirs / ours:>7.2f}x {apart:>10.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ["faster_rcnn", "mask_rcnn", "retinanet", "fcos"]
    parser.add_argument("models", nargs="*", default=known, help=f"default: {' '.join(known)}")
    parser.add_argument("--batch", type=int, default=2, help="images")
    parser.add_argument("--height", type=int, default=480, help="pixels, a multiple of 32")
    parser.add_argument("--width", type=int, default=640, help="pixels, a multiple of 32")
    parser.add_argument("--objects", type=int, default=10, help="per image")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    data = draw(options)
    print(
        f"{options.batch} images of {options.height} x {options.width}, {options.objects} objects each, "
        f"{options.device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(f"{'':<12} {'detseg images/s':>15} {'torchvision images/s':>20} {'ratio':>8} {'loss':>10}", flush=True)
    for name in options.models:
        print(measure(name, data, options.rounds, options.device), flush=True)


if __name__ == "__main__":
    main()
