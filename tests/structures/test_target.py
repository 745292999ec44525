import pytest
import torch

from detseg.structures import SemanticMap, Target


def two() -> Target:
    masks = torch.zeros(2, 6, 6, dtype=torch.bool)
    masks[0, :2, :3] = True
    masks[1, 4, 4] = True
    return Target(
        boxes=torch.tensor([[0.0, 0.0, 3.0, 2.0], [4.0, 4.0, 6.0, 6.0]]),
        labels=torch.tensor([1, 0]),
        masks=masks,
        image_id=7,
        size=(6, 6),
        semantic=SemanticMap(torch.zeros(6, 6, dtype=torch.int64)),
    )


def test_areas_are_those_of_the_masks_or_else_of_the_boxes() -> None:
    torch.testing.assert_close(two().area, torch.tensor([6.0, 1.0]))
    boxes = Target(boxes=torch.tensor([[0.0, 0.0, 3.0, 2.0]]), labels=torch.tensor([0]))
    torch.testing.assert_close(boxes.area, torch.tensor([6.0]))
    assert not boxes.iscrowd.any() and not boxes.difficult.any()


def test_selection_takes_objects_and_keeps_the_map_whole() -> None:
    second = two()[torch.tensor([False, True])]
    assert len(second) == 1 and second.image_id == 7
    torch.testing.assert_close(second.area, torch.tensor([1.0]))
    assert second.semantic is not None and second.semantic.size == (6, 6)


def test_crowd_regions_do_not_train() -> None:
    target = two()
    assert target.trainable() is target
    target.iscrowd[0] = True
    torch.testing.assert_close(target.trainable().labels, torch.tensor([0]))


def test_an_image_without_objects_is_a_target() -> None:
    empty = Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    assert len(empty) == 0 and len(empty.trainable()) == 0 and empty.area.shape == (0,)


def test_errors_name_the_image_and_its_file() -> None:
    boxes = torch.tensor([[0.0, float("inf"), 1.0, 1.0]])
    with pytest.raises(ValueError, match=r"image 12 \(cells/a\.png\): box 0 is .*inf"):
        Target(boxes=boxes, labels=torch.tensor([0]), image_id=12, file="cells/a.png")
    with pytest.raises(ValueError, match=r"labels has shape \(3,\), but there are 1 boxes"):
        Target(boxes=torch.zeros(1, 4), labels=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="label 0 is -1"):
        Target(boxes=torch.zeros(1, 4), labels=torch.tensor([-1]))


def test_proposals_are_no_objects_and_are_checked_as_boxes() -> None:
    target = two()
    target.proposals = torch.arange(12.0).reshape(3, 4)
    second = target[torch.tensor([False, True])]
    assert len(second) == 1 and second.proposals is target.proposals
    moved = target.to("meta").proposals
    assert moved is not None and moved.is_meta
    none = Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), proposals=torch.zeros(0, 4))
    assert none.proposals is not None and two().proposals is None
    with pytest.raises(ValueError, match=r"image 3, proposals: box 1 is .*nan"):
        Target(torch.zeros(1, 4), torch.tensor([0]), image_id=3, proposals=torch.tensor([[0.0] * 4, [torch.nan] * 4]))
