from __future__ import annotations

import contextlib
import io
import math

import pytest
import torch
from pycocotools.cocoeval import COCOeval

from detseg.metrics import ProposalRecall, table_rows
from detseg.structures import Detections, Target
from metric_oracles import Case, random_case, to_coco


def class_agnostic(case: Case, limits: list[int]) -> list[float]:
    """pycocotools' average recall with ``useCats = 0``."""
    truth, results = to_coco(case)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, results, "bbox")
        evaluation.params.useCats = 0
        evaluation.params.maxDets = limits
        evaluation.evaluate()
        evaluation.accumulate()
    recall = evaluation.eval["recall"][:, 0, 0]  # (T, L)
    return [math.nan if (recall[:, m] == -1).all() else float(recall[:, m].mean()) for m in range(len(limits))]


@pytest.mark.parametrize("seed", range(25))
def test_equal_to_pycocotools_without_classes(seed: int) -> None:
    case = random_case(seed)
    limits = [3, 10, 150]
    metric = ProposalRecall(limits=limits)
    metric.update(case.detections, case.targets)
    result = metric.compute()
    for found, target in zip(case.detections, case.targets, strict=True):  # its order follows the classes: make it one
        found.labels.zero_()
        target.labels.zero_()
    expected = class_agnostic(Case(case.detections, case.targets, 1), limits)
    ours = torch.stack([result[f"ar_{limit}"] for limit in limits])
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12, equal_nan=True)
    assert int(result["ar_count"]) == sum(int((~target.iscrowd).sum()) for target in case.targets)


def test_by_hand() -> None:
    # Object 1 found exactly by the second proposal; object 2 at IoU 0.8 by the third: found at 7 of the 10 thresholds.
    # With two proposals 1/2, with three (1 + 0.7) / 2. The crowd is not counted.
    target = Target(
        boxes=torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60], [0, 0, 90, 90]]),
        labels=torch.tensor([0, 4, 1]),
        iscrowd=torch.tensor([False, False, True]),
    )
    proposals = Detections(
        boxes=torch.tensor([[50.0, 50, 60, 58], [0, 0, 10, 10], [70, 0, 80, 10]]),
        scores=torch.tensor([0.1, 0.5, 0.9]),
        labels=torch.zeros(3).long(),
    )
    metric = ProposalRecall(limits=(1, 2, 3))
    metric.update([proposals], [target])
    result = metric.compute()
    assert [float(result[f"ar_{limit}"]) for limit in (1, 2, 3)] == pytest.approx([0, 0.5, 0.85])
    assert int(result["ar_count"]) == 2
    assert [float(result[f"recall_50_{limit}"]) for limit in (1, 2, 3)] == [0, 0.5, 1]
    assert result["recall_points"].tolist() == [[1], [2], [3]]
    expected = torch.tensor([[0.0] * 10, [0.5] * 10, [1.0] * 7 + [0.5] * 3])  # IoU 0.8 is at the seventh
    torch.testing.assert_close(result["recall"], expected.double())


def test_the_curve_goes_as_far_as_the_limits() -> None:
    points = ProposalRecall(limits=(7, 40, 300)).compute()["recall_points"][:, 0].tolist()
    assert points == [1, 2, 3, 5, 7, 10, 20, 30, 40, 50, 100, 200, 300]


def test_defaults_and_no_objects() -> None:
    metric = ProposalRecall()
    none = torch.zeros((0, 4))
    metric.update([Detections.empty()], [Target(boxes=none, labels=torch.zeros(0).long())])
    result = metric.compute()
    numbers = (100, 300, 1000, 2000)
    names = {f"{figure}_{number}" for figure in ("ar", "recall_50") for number in numbers}
    assert set(result) == names | {"ar_count", "recall", "recall_points"} and result["recall"].shape == (14, 10)
    rows = dict(table_rows({f"proposal_{name}": value for name, value in result.items()}))
    assert rows == {f"proposal_{name}": "n/a (0 objects)" for name in names}
    assert math.isnan(result["ar_1000"]) and int(result["ar_count"]) == 0


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match="ascending"):
        ProposalRecall(limits=(300, 100))
    proposals = Detections.empty()
    proposals.boxes, proposals.scores = torch.full((1, 4), math.nan), torch.ones(1)
    proposals.labels = torch.zeros(1).long()
    with pytest.raises(ValueError, match="image 12: detection 0 has boxes nan"):
        ProposalRecall().update(
            [proposals], [Target(boxes=torch.zeros((0, 4)), labels=torch.zeros(0).long(), image_id=12)]
        )
