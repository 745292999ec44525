from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from pycocotools.coco import COCO

from detseg.metrics import CocoAP
from detseg.structures import Detections, Target
from metric_oracles import TWELVE, Case, pycocotools_figures, random_case, xywh
from shared import SHARED, needs_shared


def figures(case: Case, iou_type: str = "bbox", batch: int = 3) -> dict[str, torch.Tensor]:
    metric = CocoAP(iou_type=iou_type, num_classes=case.num_classes)
    for at in range(0, len(case.targets), batch):
        metric.update(case.detections[at : at + batch], case.targets[at : at + batch])
    return metric.compute()


def compare(case: Case, iou_type: str, seed: int) -> int:
    """Check the twelve figures of one case; return how many of them are numbers."""
    expected, ours = pycocotools_figures(case, masks=iou_type == "segm"), figures(case, iou_type)
    for key in TWELVE:
        assert math.isnan(ours[key]) == math.isnan(expected[key]), f"seed {seed}: {key} {ours[key]}, {expected[key]}"
        assert math.isnan(expected[key]) or abs(float(ours[key]) - expected[key]) <= 1e-9, f"seed {seed}: {key}"
    return sum(not math.isnan(value) for value in expected.values())


@pytest.mark.parametrize("block", range(10))
def test_boxes_equal_pycocotools(block: int) -> None:
    numbers = sum(compare(random_case(seed), "bbox", seed) for seed in range(30 * block, 30 * block + 30))
    assert numbers > 200  # of 360: the cases are not empty


@pytest.mark.parametrize("block", range(3))
def test_masks_equal_pycocotools(block: int) -> None:
    seeds = range(1000 + 30 * block, 1030 + 30 * block)
    numbers = sum(compare(random_case(seed, masks=True), "segm", seed) for seed in seeds)
    assert numbers > 150


def test_random_cases_are_hard() -> None:
    cases = [random_case(seed) for seed in range(300)]
    images = [(found, target) for case in cases for found, target in zip(case.detections, case.targets, strict=True)]
    assert sum(bool(target.iscrowd.any()) for _, target in images) > 200
    assert sum(len(target) == 0 for _, target in images) > 100
    assert sum(len(found) == 0 for found, _ in images) > 100
    assert sum(len(found) > 100 and int(found.labels.bincount().max()) > 100 for found, _ in images) > 50
    assert sum(len(found) > len(found.scores.unique()) for found, _ in images) > 300


@needs_shared
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_real_photos_equal_pycocotools(iou_type: str, capsys: pytest.CaptureFixture[str]) -> None:
    case = photos(COCO(str(SHARED / "data/coco_ccby/instances_train.json")))
    assert sum(len(target) for target in case.targets) == 246
    assert compare(case, iou_type, seed=0) == 12


def photos(coco: COCO) -> Case:
    """Real truth, and detections made of it: moved by up to four pixels, some dropped, some with a wrong class."""
    generator = torch.Generator().manual_seed(0)
    categories = {category: label for label, category in enumerate(sorted(coco.cats))}
    found, targets = [], []
    for image_id, image in coco.imgs.items():
        entries = coco.loadAnns(coco.getAnnIds(image_id))
        boxes = torch.tensor([entry["bbox"] for entry in entries], dtype=torch.float64).reshape(-1, 4)
        boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
        labels = torch.tensor([categories[entry["category_id"]] for entry in entries], dtype=torch.int64)
        size = (image["height"], image["width"])
        masks = torch.zeros((len(entries), *size), dtype=torch.bool)
        for n, entry in enumerate(entries):
            masks[n] = torch.from_numpy(coco.annToMask(entry)).bool()
        targets.append(
            Target(
                boxes=boxes,
                labels=labels,
                masks=masks,
                iscrowd=torch.tensor([bool(entry["iscrowd"]) for entry in entries], dtype=torch.bool),
                area=torch.tensor([entry["area"] for entry in entries], dtype=torch.float64),
                image_id=image_id,
            )
        )
        keep = torch.rand(len(entries), generator=generator) < 0.8
        shift = torch.randint(-4, 5, (2,), generator=generator).tolist()
        wrong = torch.rand(len(entries), generator=generator) < 0.1
        found.append(
            Detections(
                boxes=(boxes + torch.tensor(shift * 2))[keep],
                scores=torch.rand(int(keep.sum()), generator=generator),
                labels=torch.where(wrong, (labels + 1) % len(categories), labels)[keep],
                masks=masks.roll((shift[1], shift[0]), dims=(1, 2))[keep],
            )
        )
    return Case(found, targets, len(categories))


def detections(boxes: list[list[float]], scores: list[float], labels: list[int]) -> Detections:
    return Detections(
        boxes=torch.tensor(boxes).reshape(-1, 4), scores=torch.tensor(scores), labels=torch.tensor(labels).long()
    )


def target(boxes: list[list[float]], labels: list[int], image_id: int = 1) -> Target:
    return Target(
        boxes=torch.tensor(boxes).reshape(-1, 4), labels=torch.tensor(labels).long(), image_id=image_id, file="a.jpg"
    )


BOX, FAR = [0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]


def test_hand_worked() -> None:
    # Two objects of class 0, both small. Found: one exactly (0.9), then a false one (0.8). So precision is 1 down to
    # recall 0.5 and 0 beyond: 51 of the 101 levels (0, 0.01, ..., 0.5) have precision 1. Class 1 is not there.
    metric = CocoAP(class_names=["apple", "pear"])
    metric.update([detections([BOX, [30.0, 0.0, 40.0, 10.0]], [0.9, 0.8], [0, 0])], [target([BOX, FAR], [0, 0])])
    result = metric.compute()
    for key in ("map", "map_50", "map_75", "map_small"):
        assert float(result[key]) == pytest.approx(51 / 101, abs=1e-12)
    for key in ("mar_1", "mar_10", "mar_100", "mar_small"):
        assert float(result[key]) == 0.5
    assert all(math.isnan(result[key]) for key in ("map_medium", "map_large", "mar_medium", "mar_large"))
    counts = {key: int(result[key]) for key in ("count", "count_small", "count_medium", "count_large")}
    assert counts == {"count": 2, "count_small": 2, "count_medium": 0, "count_large": 0}
    assert result["count_per_class"].tolist() == [2, 0]
    expected = torch.tensor([51 / 101, math.nan], dtype=torch.float64)
    torch.testing.assert_close(result["map_per_class"], expected, equal_nan=True)
    torch.testing.assert_close(result["map_50_per_class"], expected, equal_nan=True)
    assert result["mar_100_per_class"][0] == 0.5


def test_one_class_keeps_its_dimension() -> None:
    metric = CocoAP(num_classes=1)
    metric.update([detections([BOX], [0.9], [0])], [target([BOX], [0])])
    result = metric.compute()
    assert result["map_per_class"].shape == (1,)
    assert result["count_per_class"].tolist() == [1]
    assert result["map"].shape == () and float(result["map"]) == pytest.approx(1)


def test_nothing_found_is_zero_and_no_truth_is_not_a_number() -> None:
    metric = CocoAP(num_classes=2)
    metric.update([detections([], [], [])], [target([BOX], [0])])
    assert float(metric.compute()["map"]) == 0 and float(metric.compute()["mar_100"]) == 0
    metric.reset()
    metric.update([detections([BOX], [0.5], [1])], [target([], [])])
    result = metric.compute()
    assert all(math.isnan(result[key]) for key in TWELVE)
    assert int(result["count"]) == 0 and result["count_per_class"].tolist() == [0, 0]


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_no_image_at_all() -> None:
    metric = CocoAP()
    metric.update([], [])
    assert math.isnan(metric.compute()["map"]) and metric.compute()["map_per_class"].shape == (0,)


def test_classes_follow_the_labels_without_names() -> None:
    metric = CocoAP()
    metric.update([detections([BOX], [0.5], [3])], [target([BOX], [1])])
    assert metric.compute()["count_per_class"].tolist() == [0, 1, 0, 0]


def test_detection_limits_name_the_keys() -> None:
    metric = CocoAP(max_detections=(2, 5))
    metric.update([detections([FAR, FAR, BOX], [0.9, 0.8, 0.7], [0, 0, 0])], [target([BOX], [0])])
    result = metric.compute()
    assert float(result["mar_2"]) == 0 and float(result["mar_5"]) == 1
    assert "mar_100" not in result and "mar_5_per_class" in result


def test_order_of_images_does_not_matter() -> None:
    case = random_case(5, tied=True)
    turned = Case(case.detections[::-1], case.targets[::-1], case.num_classes)
    torch.testing.assert_close(figures(case), figures(turned, batch=1), rtol=0, atol=0, equal_nan=True)
    masked = random_case(1003, masks=True, tied=True)
    turned = Case(masked.detections[::-1], masked.targets[::-1], masked.num_classes)
    torch.testing.assert_close(figures(masked, "segm"), figures(turned, "segm"), rtol=0, atol=0, equal_nan=True)


def test_no_mask_is_kept() -> None:
    case = random_case(1001, masks=True)
    metric = CocoAP(iou_type="segm")
    metric.update(case.detections, case.targets)
    kept = sum(
        block.numel()
        for name in ("images", "found", "truth", "overlaps", "overlap_images")
        for block in getattr(metric, name)
    )
    found, objects = sum(map(len, case.detections)), sum(map(len, case.targets))
    assert kept <= 7 * found + 8 * objects + 3 * len(case.targets) + 4 * found * objects
    assert kept < case.targets[0].masks[0].numel() * found / 10


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_image_ids_may_be_large(iou_type: str) -> None:
    case = random_case(1002, masks=True)
    expected = figures(case, iou_type)
    for target in case.targets:
        target.image_id += 2**62  # a hash, say; float64 would round it
    torch.testing.assert_close(figures(case, iou_type), expected, rtol=0, atol=0, equal_nan=True)


def test_survives_pickling_and_copying() -> None:
    case = random_case(4)
    metric = CocoAP(num_classes=case.num_classes)
    metric.update(case.detections, case.targets)
    for copied in (pickle.loads(pickle.dumps(metric)), copy.deepcopy(metric)):
        torch.testing.assert_close(copied.compute(), figures(case), rtol=0, atol=0, equal_nan=True)


def test_forward_gives_the_batch_and_keeps_the_epoch() -> None:
    metric = CocoAP(num_classes=1)
    batch = metric([detections([BOX], [0.9], [0])], [target([BOX], [0], 1)])
    assert float(batch["map"]) == pytest.approx(1)
    assert float(metric([detections([], [], [])], [target([BOX], [0], 2)])["map"]) == 0
    assert float(metric.compute()["mar_100"]) == 0.5


@pytest.mark.parametrize("field", ["scores", "boxes"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_names_the_image(field: str, value: float) -> None:
    good, bad = detections([BOX, FAR], [0.5, 0.4], [0, 1]), detections([BOX, FAR], [0.5, 0.4], [0, 1])
    getattr(bad, field)[1] = value  # as from a GPU, where structures do not look
    with pytest.raises(ValueError, match=rf"image 17 \(a.jpg\): detection 1 has {field} (nan|inf)"):
        CocoAP().update([good, bad], [target([BOX], [0], 3), target([BOX], [0], 17)])


def test_label_out_of_range_names_the_image() -> None:
    wrong = detections([BOX], [0.5], [2])
    with pytest.raises(ValueError, match=r"image 4 .*detection 0 has label 2, which must be 0\.\.1"):
        CocoAP(class_names=["a", "b"]).update([wrong], [target([BOX], [0], 4)])
    with pytest.raises(ValueError, match=r"image 9 .*object 0 has label 5, which must be 0\.\.1"):
        CocoAP(num_classes=2).update([detections([], [], [])], [target([BOX], [5], 9)])
    negative = detections([BOX], [0.5], [0])
    negative.labels[0] = -1
    with pytest.raises(ValueError, match=r"image 4 .*label -1, which must be 0 or more"):
        CocoAP().update([negative], [target([BOX], [0], 4)])


def test_same_image_twice_is_an_error() -> None:
    metric = CocoAP()
    metric.update([detections([BOX], [0.5], [0])], [target([BOX], [0], 6)])
    metric.update([detections([BOX], [0.5], [0])], [target([BOX], [0], 6)])
    with pytest.raises(ValueError, match=r"first 6 .*reset"):
        metric.compute()


def test_masks_must_be_there_and_of_one_size() -> None:
    metric = CocoAP(iou_type="segm")
    found, truth = detections([BOX], [0.5], [0]), target([BOX], [0], 8)
    with pytest.raises(ValueError, match=r"image 8 .*1 detections have no masks"):
        metric.update([found], [truth])
    found.masks = torch.ones((1, 20, 20), dtype=torch.bool)
    with pytest.raises(ValueError, match=r"image 8 .*1 objects have no masks"):
        metric.update([found], [truth])
    truth.masks = torch.ones((1, 20, 30), dtype=torch.bool)
    with pytest.raises(ValueError, match=r"image 8 .*\(20, 20\) and \(20, 30\)"):
        metric.update([found], [truth])


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="'bbox' or 'segm'"):
        CocoAP(iou_type="keypoints")
    with pytest.raises(ValueError, match="ascending"):
        CocoAP(max_detections=(100, 10))
    with pytest.raises(ValueError, match=r"num_classes is 3, but there are 1 class names: \['a'\]"):
        CocoAP(num_classes=3, class_names=["a"])
    with pytest.raises(ValueError, match="detections of 1 images, but targets of 0"):
        CocoAP().update([detections([], [], [])], [])


def test_xywh_is_the_conversion_of_the_oracle() -> None:
    assert xywh(torch.tensor([0.5, 1.0, 2.0, 4.0])) == [0.5, 1.0, 1.5, 3.0]


@pytest.mark.gpu
def test_the_same_on_the_device() -> None:
    case = random_case(1004, masks=True)
    for iou_type in ("bbox", "segm"):
        metric = CocoAP(iou_type=iou_type, num_classes=case.num_classes).to("cuda")
        metric.update([d.to("cuda") for d in case.detections], [t.to("cuda") for t in case.targets])
        result = {key: value.cpu() for key, value in metric.compute().items()}
        torch.testing.assert_close(result, figures(case, iou_type), rtol=0, atol=0, equal_nan=True)
