"""The gradient of several processes is that of one with all their images, whatever each of them holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch import Tensor, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from detseg.config import instantiate, load_config
from detseg.data.loader import one_opencv_thread
from detseg.models.region_features import RegionFeatures
from detseg.structures import SemanticMap, Target
from shared import REPO

CONF = REPO / "conf" / "model"
SMALL = sorted(path.stem for path in CONF.glob("*_small.yaml"))
SIDE = 64
BOXES = [[2, 3, 20, 22], [24, 4, 46, 20], [10, 30, 40, 60], [44, 40, 60, 62], [4, 44, 14, 56]]
COUNTS = {"unequal": [5, 4, 1, 0], "none on a rank": [5, 2, 0, 0], "none at all": [0, 0, 0, 0]}  # objects per image


def model(name: str) -> tuple[Any, str]:
    """Return the model in float64, which draws no samples: two processes would draw others than one."""
    cfg = load_config(f"model={name}")
    cfg.data.num_classes = 5 if cfg.truth == "semantic" else 3
    if "proposer" in cfg.model:
        cfg.model.proposer.limit = 20  # R-CNN looks at a crop for each
    torch.manual_seed(0)
    built = instantiate(OmegaConf.to_container(cfg.model, resolve=True), path="model").double().eval()
    for part in built.modules():
        sampler = getattr(part, "sampler", None)
        if sampler is not None:
            sampler.size, sampler.positive_fraction = 10**6, 1.0
        if isinstance(part, RegionFeatures):  # reads features in float32 always
            part.register_forward_hook(lambda _, __, regions: regions.double())
    return built, str(cfg.truth)


def target(count: int, kind: str) -> Target:
    """Return the truth of an image with so many objects; without any its map is nearly all unlabelled."""
    boxes = torch.tensor(BOXES[:count], dtype=torch.float32).reshape(-1, 4)
    masks = torch.zeros(count, SIDE, SIDE, dtype=torch.bool)
    semantic = torch.full((SIDE, SIDE), 0 if count else 255)
    semantic[0, :3] = 1
    for index, (left, top, right, bottom) in enumerate(BOXES[:count]):
        masks[index, top:bottom, left:right] = True
        semantic[top:bottom, left:right] = index % 3 + 2
    return Target(
        boxes=boxes,
        labels=torch.arange(count) % 3,
        masks=masks if kind == "instances" else None,
        semantic=SemanticMap(semantic) if kind == "semantic" else None,
        size=(SIDE, SIDE),
    )


class Loss(nn.Module):
    """The sum of the loss terms as a forward pass, which is what DDP wraps."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, targets: list[Target]) -> Tensor:
        sizes = torch.tensor([[SIDE, SIDE]] * len(images))
        terms = self.model.loss(self.model(images, sizes, targets), targets)
        return torch.stack(list(terms.values())).sum()


def gradient(loss: nn.Module, counts: list[int], rows: slice, kind: str) -> Tensor:
    """Return the gradient of all parameters for some of four images, flat."""
    images = torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    loss.zero_grad()
    loss(images[rows], [target(count, kind) for count in counts[rows]]).backward()
    return torch.cat([value.grad.flatten() for value in loss.parameters() if value.requires_grad])


def rank(number: int, folder: str) -> None:
    """Compute every gradient for this rank's two images, and keep them."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2)
    found = {}
    for name in SMALL:
        built, kind = model(name)
        loss = DistributedDataParallel(Loss(built))
        rows = slice(2 * number, 2 * number + 2)
        found[name] = {case: gradient(loss, counts, rows, kind) for case, counts in COUNTS.items()}
    torch.save(found, f"{folder}/{number}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """What each of two ranks has after DDP's averaging: model -> case -> gradient."""
    folder = tmp_path_factory.mktemp("ranks")
    with one_opencv_thread():  # some models search for proposals
        multiprocessing.start_processes(rank, (str(folder),), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{number}.pt") for number in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_two_processes_have_the_gradient_of_one(name: str, together: list[dict[str, dict[str, Tensor]]]):
    built, kind = model(name)
    loss = Loss(built)
    for case, counts in COUNTS.items():
        alone = gradient(loss, counts, slice(0, 4), kind)
        assert alone.norm() > 0
        error = (together[0][name][case] - alone).norm() / alone.norm()
        assert error < 1e-6, f"{case}: {error}"
        assert torch.equal(together[0][name][case], together[1][name][case])
    # What the test would see if each rank divided by its own: the images weigh differently then.
    parts = [gradient(loss, COUNTS["unequal"], slice(start, start + 2), kind) for start in (0, 2)]
    alone = gradient(loss, COUNTS["unequal"], slice(0, 4), kind)
    assert (sum(parts) / 2 - alone).norm() / alone.norm() > 1e-4
