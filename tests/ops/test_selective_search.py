from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from detseg.data.orchard import OrchardDataset
from detseg.ops.proposer import Proposer
from detseg.ops.selective_search import MODES, SelectiveSearch, in_space
from shared import REPO


def two_squares(height: int = 64, width: int = 96) -> Tensor:
    """A red and a green square on grey: boxes (8, 8, 32, 32) and (56, 24, 88, 48)."""
    image = torch.full((3, height, width), 128, dtype=torch.uint8)
    image[:, 8:32, 8:32] = torch.tensor([220, 20, 20], dtype=torch.uint8)[:, None, None]
    image[:, 24:48, 56:88] = torch.tensor([20, 220, 20], dtype=torch.uint8)[:, None, None]
    return image


@pytest.fixture
def opencv_threads() -> Iterator[None]:
    before = cv2.getNumThreads()
    yield
    cv2.setNumThreads(before)


@pytest.mark.parametrize("mode", MODES)
def test_finds_what_stands_out_and_the_whole_image(mode: str) -> None:
    found = SelectiveSearch(mode=mode)(two_squares())
    for box in ([8, 8, 32, 32], [56, 24, 88, 48], [0, 0, 96, 64]):
        overlap = box_iou(torch.tensor([box]).float(), found)
        assert float(overlap.max()) > 0.8, box  # the blur before the segmentation moves edges by a pixel
    assert found.dtype == torch.float32 and len(found.unique(dim=0)) == len(found)
    assert (found[:, :2] >= 0).all() and (found[:, 2:] <= torch.tensor([96, 64])).all()
    assert (found[:, 2:] - found[:, :2] >= 8).all() and torch.equal(found, found.round())


@pytest.mark.parametrize("mode", MODES)
def test_the_set_is_that_of_opencv(mode: str) -> None:
    """Each hierarchy by itself, with objects of its own: sharing histograms between them must change nothing."""
    image = OrchardDataset(split="val", images=1)[0].image
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    module = cv2.ximgproc.segmentation
    make = {
        "C": module.createSelectiveSearchSegmentationStrategyColor,
        "T": module.createSelectiveSearchSegmentationStrategyTexture,
        "S": module.createSelectiveSearchSegmentationStrategySize,
        "F": module.createSelectiveSearchSegmentationStrategyFill,
    }
    expected = {(0, 0, 128, 128)}
    spaces, likenesses, thresholds = MODES[mode]
    for space in spaces:
        for threshold in thresholds:
            for letters in likenesses:
                search = module.createSelectiveSearchSegmentation()
                search.addImage(in_space(pixels, space))
                search.addGraphSegmentation(module.createGraphSegmentation(0.8, threshold, 20))
                parts = [make[letter]() for letter in letters]
                joined = module.createSelectiveSearchSegmentationStrategyMultiple
                search.addStrategy(parts[0] if len(parts) == 1 else joined(*parts))
                expected |= {(x, y, x + w, y + h) for x, y, w, h in search.process().tolist()}
    found = SelectiveSearch(mode=mode, limit=None, min_side=1)(image)
    assert {tuple(box) for box in found.tolist()} == expected and len(found) == len(expected)


def test_the_limit_cuts_the_sorted_list() -> None:
    image = OrchardDataset(split="val", images=1)[0].image
    every = SelectiveSearch(limit=None)(image)
    assert len(every) > 60
    assert torch.equal(SelectiveSearch(limit=50)(image), every[:50])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_same_boxes_with_any_number_of_threads(threads: int, opencv_threads: None) -> None:
    image = OrchardDataset(split="val", images=2)[1].image
    search = SelectiveSearch(mode="single", side=200)
    cv2.setNumThreads(1)
    expected = search(image)
    cv2.setNumThreads(threads)
    assert torch.equal(search(image), expected) and torch.equal(search(image), expected)


@pytest.mark.slow
def test_the_same_boxes_in_another_process(tmp_path: Path) -> None:
    """An interpreter of its own, with another seed for hashes; it is given the image, as drawing it needs Lightning."""
    image = OrchardDataset(split="val", images=1)[0].image
    np.save(tmp_path / "image.npy", image.numpy())
    script = (
        "import hashlib, sys, numpy, torch; from detseg.ops.selective_search import SelectiveSearch as S; "
        "image = torch.from_numpy(numpy.load(sys.argv[1])); "
        "print(hashlib.sha1(S()(image).numpy().tobytes()).hexdigest())"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "image.npy")]
    told = subprocess.run(command, capture_output=True, text=True, cwd=REPO, timeout=300, check=True)
    own = pickle.loads(pickle.dumps(SelectiveSearch()))(image).numpy().tobytes()
    assert told.stdout.strip() == hashlib.sha1(own).hexdigest()


def test_side_changes_the_search_not_the_pixels_of_the_boxes() -> None:
    image = two_squares()
    for side in (48, 192, 251):
        found = SelectiveSearch(side=side, min_segment=10)(image)
        overlap = box_iou(torch.tensor([[8.0, 8, 32, 32], [56, 24, 88, 48]]), found).max(dim=1).values
        assert (overlap > 0.75).all(), side
        assert [0.0, 0.0, 96.0, 64.0] in found.tolist() and (found[:, 2:] <= torch.tensor([96, 64])).all()


@pytest.mark.parametrize("height, width", [(1, 1), (1, 50), (2, 3), (7, 90)])
def test_an_image_below_eight_pixels_is_one_region(height: int, width: int) -> None:
    noise = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    assert SelectiveSearch()(noise).tolist() == [[0, 0, width, height]]


@pytest.mark.parametrize("mode", MODES)
def test_small_grey_and_constant_images(mode: str) -> None:
    search = SelectiveSearch(mode=mode)
    assert search(torch.full((3, 40, 60), 9, dtype=torch.uint8)).tolist() == [[0, 0, 60, 40]]
    grey = two_squares().float().mean(dim=0).byte().expand(3, -1, -1)
    assert [0.0, 0.0, 96.0, 64.0] in search(grey).tolist()
    for size in (8, 9, 13):
        found = search(torch.randint(0, 256, (3, size, size), dtype=torch.uint8))
        assert [0.0, 0.0, float(size), float(size)] in found.tolist()


def test_key_names_every_parameter() -> None:
    assert isinstance(SelectiveSearch(), Proposer)
    assert SelectiveSearch(mode="single", side=320).key == (
        "SelectiveSearch(mode='single', limit=2000, side=320, min_side=8.0, min_segment=20, thresholds=[100.0]) "
        f"version 1 OpenCV {cv2.__version__}"
    )
    changed = {"mode": "quality", "limit": 9, "side": 9, "min_side": 9, "min_segment": 9, "thresholds": [9]}
    keys = {SelectiveSearch(**{name: value}).key for name, value in changed.items()}
    assert len(keys | {SelectiveSearch().key}) == 7


@pytest.mark.parametrize(
    "wrong, said",
    [({"mode": "slow"}, "choose one of single, fast, quality"), ({"limit": 0}, "limit=0"), ({"side": 0}, "side=0"),
     ({"min_segment": 0}, "min_segment=0"), ({"thresholds": []}, "thresholds")],
)  # fmt: skip
def test_numbers_outside_their_range(wrong: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SelectiveSearch(**wrong)


@pytest.mark.parametrize(
    "image", [torch.zeros((3, 4, 4)), torch.zeros((1, 4, 4)).byte(), torch.zeros((3, 0, 4)).byte()]
)
def test_what_is_no_image_is_refused(image: Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be \(3, H, W\) uint8"):
        SelectiveSearch()(image)
