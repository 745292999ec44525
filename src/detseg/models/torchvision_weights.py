"""Torchvision's published detectors loaded into ours, whose parts bear the same names but for few.

torchvision counts COCO's 91 ids (10 of them unused, 0 is background) as classes; a model of ours with the 80 real
classes takes their rows alone, in the order of the ids.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from detseg.nn import CheckpointMismatch, load_weights, read_state, set_norm_eps

log = logging.getLogger(__name__)

Renames = Mapping[str, str | Callable[[re.Match[str]], str]]
"""Pattern of a key in the file -> replacement, as ``re.sub`` takes them."""

LEGACY_RENAMES: Renames = {
    r"^rpn\.head\.conv\.(weight|bias)$": r"rpn.head.conv.0.0.\1",
    r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$": r"\1.0.\2",
    r"^(head\.\w+_head\.conv)\.(\d)\.(weight|bias)$": lambda found: f"{found[1]}.{int(found[2]) // 2}.0.{found[3]}",
}
"""Names in files that were published before torchvision 0.13, tried where the model has no such key."""

ZERO_EPS = ("fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn")
"""Builders whose ``COCO_V1`` was trained with a batch norm that added no epsilon (pytorch/vision#2933)."""


@dataclass(frozen=True)
class ClassLayer:
    """A layer with one group of outputs per class.

    Attributes:
        name: of the layer in our model.
        background: whether its first class is background.
        width: outputs per class, 4 for class-wise boxes.
        anchors: groups of classes, one per anchor of a dense head.
    """

    name: str
    background: bool = False
    width: int = 1
    anchors: int = 1


def load_torchvision(
    model: nn.Module,
    weights: str | Path,
    *,
    builder: str,
    layers: Sequence[ClassLayer] = (),
    renames: Renames | None = None,
    only: tuple[str, ...] = (),
) -> None:
    """Fill ``model`` with published weights.

    Args:
        model: of ours.
        weights: a name such as ``COCO_V1`` or ``DEFAULT`` (downloads through torchvision), or the path of a state dict.
        builder: torchvision's function whose weights carry that name, such as ``fcos_resnet50_fpn``.
        layers: the layers that have outputs per class.
        renames: names that differ between torchvision and the model.
        only: beginnings of the names that are loaded, such as ``("backbone.",)``; the rest of the model stays as it is.

    Raises:
        CheckpointMismatch: keys, shapes or the number of classes differ.
        ValueError: torchvision publishes no weights of that name.
        FileNotFoundError: there is no such file.
    """
    enum: Any = torchvision.models.get_model_weights(builder)
    if str(weights) in enum.__members__:
        state, source = enum[str(weights)].get_state_dict(progress=False, check_hash=True), f"{builder} {weights}"
    elif Path(weights).is_file() or "/" in str(weights) or Path(weights).suffix:
        state, source = read_state(weights), str(weights)
    else:
        raise ValueError(
            f"torchvision's {builder} has weights {', '.join(enum.__members__)}, and no file is {weights!r}"
        )
    zero_eps = builder in ZERO_EPS
    load_torchvision_state(model, state, layers=layers, renames=renames, source=source, zero_eps=zero_eps, only=only)
    if str(weights) == "COCO_V1" and zero_eps:
        set_norm_eps(model, 0.0)


def load_torchvision_state(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    layers: Sequence[ClassLayer] = (),
    renames: Renames | None = None,
    source: str = "state dict",
    zero_eps: bool = False,
    only: tuple[str, ...] = (),
) -> None:
    """Fill ``model`` with a state dict of torchvision's; see ``load_torchvision``.

    Args:
        model: of ours.
        state: name to tensor.
        layers: the layers that have outputs per class.
        renames: names that differ between torchvision and the model.
        source: where the state came from, for messages.
        zero_eps: whether the epsilon of batch norms becomes 0 where the file has names from before torchvision 0.13.
        only: beginnings of the names that are loaded, none for all; see ``load_torchvision``.
    """
    own = model.state_dict()
    renamed = {_rename(key, renames or {}): value for key, value in state.items()}
    modern = {key if key in own else _rename(key, LEGACY_RENAMES): value for key, value in renamed.items()}
    for layer in layers:
        for name in (f"{layer.name}.weight", f"{layer.name}.bias"):
            if name in modern and name in own:
                modern[name] = _select_classes(modern[name], own[name], layer, source)
    kept = {key: value for key, value in own.items() if key.startswith("normalize.")}  # not in their files
    if only:
        modern = {key: value for key, value in modern.items() if key.startswith(only)}
        kept = {key: value for key, value in own.items() if not key.startswith(only)}
    load_weights(model, kept | modern, source=source)
    if zero_eps and not renamed.keys() >= modern.keys():
        set_norm_eps(model, 0.0)
    log.info("%s: loaded %d tensors", source, len(modern))


def coco_ids() -> list[int]:
    """Return the 80 of COCO's ids 1..90 that have a category, from torchvision's own list."""
    names = torchvision.models.detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return [index for index, name in enumerate(names) if name not in ("__background__", "N/A")]


def _rename(key: str, renames: Renames) -> str:
    for pattern, replacement in renames.items():
        key = re.sub(pattern, replacement, key)
    return key


def _select_classes(given: Tensor, own: Tensor, layer: ClassLayer, source: str) -> Tensor:
    """Return the rows of ``given`` that the model's classes need; what fits already is returned as it is."""
    if given.shape == own.shape:
        return given
    group = layer.anchors * layer.width
    have, want = given.shape[0] // group, own.shape[0] // group - layer.background
    if layer.background and (want == 0 or have == 1):  # one box for all classes, and no background
        sides = ("a box for each class", "one for all") if want == 0 else ("one box for all classes", "one for each")
        raise CheckpointMismatch(
            source=source,
            shapes=[(layer.name, tuple(given.shape), tuple(own.shape))],
            remedy=f"The file has {sides[0]}, the model {sides[1]}; set class_agnostic to "
            f"{'false' if want == 0 else 'true'}, or weights to null",
        )
    rows = coco_ids() if (have, want) == (91, 80) else list(range(1, want + 1))
    if (have, want) != (91, 80) and have != want + 1:
        raise CheckpointMismatch(
            source=source,
            shapes=[(layer.name, tuple(given.shape), tuple(own.shape))],
            remedy=f"The file has {have} classes (background included), the model {want}; set num_classes to {have - 1}"
            f"{' or 80' if have == 91 else ''}, or build it with weights=null and start from the body with init_from "
            "and drop_head=true",
        )
    index = torch.tensor([0] * layer.background + rows)  # (want,) or (want + 1,)
    parts = given.reshape(layer.anchors, have, layer.width, *given.shape[1:])  # (anchors, have, width, ...)
    return parts.index_select(1, index).reshape(own.shape)
