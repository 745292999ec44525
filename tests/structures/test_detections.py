import pytest
import torch

from detseg.structures import Detections


def three() -> Detections:
    return Detections(
        boxes=torch.tensor([[0.0, 0.0, 4.0, 2.0], [2.0, 2.0, 6.0, 6.0], [1.0, 1.0, 3.0, 5.0]]),
        scores=torch.tensor([0.9, 0.6, 0.2]),
        labels=torch.tensor([2, 0, 1]),
        masks=torch.zeros(3, 8, 8, dtype=torch.bool),
    )


def test_slicing_filters_every_field_together() -> None:
    found = three()[three().scores > 0.5]
    assert len(found) == 2
    torch.testing.assert_close(found.labels, torch.tensor([2, 0]))
    assert found.masks is not None and found.masks.shape == (2, 8, 8)
    torch.testing.assert_close(three()[[2, 0]].scores, torch.tensor([0.2, 0.9]))
    torch.testing.assert_close(three()[1:].labels, torch.tensor([0, 1]))


def test_one_number_gives_detections_of_length_one() -> None:
    last = three()[-1]
    assert len(last) == 1 and int(last.labels) == 1
    with pytest.raises(IndexError, match="detection 3 was asked for, but there are 3"):
        three()[3]


def test_empty_has_masks_where_a_size_is_given() -> None:
    assert Detections.empty().masks is None
    masks = Detections.empty(mask_size=(5, 7)).masks
    assert masks is not None and masks.shape == (0, 5, 7)
    assert len(Detections.empty()[Detections.empty().scores > 0.5]) == 0


def test_resize_scales_each_axis_by_its_own_factor() -> None:
    found = three()
    assert found.masks is not None
    found.masks[0, :, 2:] = True
    grown = found.resize((8, 8), (16, 24))
    torch.testing.assert_close(grown.boxes[0], torch.tensor([0.0, 0.0, 12.0, 4.0]))
    assert grown.masks is not None and grown.masks.shape == (3, 16, 24)
    assert grown.masks[0, :, 6:].all() and not grown.masks[0, :, :6].any()
    assert found.resize((8, 8), (8, 8)) is found


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("boxes", torch.zeros(3, 5), r"\(N, 4\)"),
        ("boxes", torch.tensor([[0.0, 0, 1, 1], [0, 0, float("nan"), 1], [0, 0, 1, 1]]), "box 1"),
        ("scores", torch.tensor([0.9, 0.6]), r"scores has shape \(2,\), but there are 3 boxes"),
        ("scores", torch.tensor([0.9, float("inf"), 0.1]), "score 1 is inf"),
        ("labels", torch.tensor([0, -1, 1]), "label 1 is -1"),
        ("masks", torch.zeros(3, 8, 8), "bool"),
    ],
)
def test_each_fault_is_named(field: str, value: torch.Tensor, message: str) -> None:
    fields = {name: getattr(three(), name) for name in ("boxes", "scores", "labels", "masks")}
    with pytest.raises(ValueError, match=message):
        Detections(**(fields | {field: value}))


def test_boxes_of_integers_are_a_type_error_with_the_remedy() -> None:
    with pytest.raises(TypeError, match=r"boxes\.float\(\)"):
        Detections(boxes=torch.zeros(0, 4, dtype=torch.int64), scores=torch.zeros(0), labels=torch.zeros(0).long())
