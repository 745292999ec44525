import pytest
import torch
from torch.testing import assert_close
from torchvision.models.detection.anchor_utils import AnchorGenerator as TorchvisionAnchors
from torchvision.models.detection.image_list import ImageList

from detseg.targets.anchors import AnchorGenerator, base_anchors, grid_strides

SIZES = ((32,), (64,), (128, 181))
RATIOS = ((0.5, 1.0, 2.0),) * 3


@pytest.mark.parametrize("image_size", [(128, 128), (96, 160), (200, 312)])
def test_equals_torchvision(image_size: tuple[int, int]) -> None:
    features = [torch.zeros(1, 1, -(-image_size[0] // s), -(-image_size[1] // s)) for s in (8, 16, 64)]
    images = ImageList(torch.zeros(1, 3, *image_size), [image_size])
    theirs = TorchvisionAnchors(SIZES, RATIOS)(images, features)[0]

    sizes = [(f.shape[2], f.shape[3]) for f in features]
    generator = AnchorGenerator(sizes=SIZES, ratios=RATIOS)
    ours = generator(sizes, grid_strides(image_size, sizes))

    assert [len(level) for level in ours] == [
        h * w * a for (h, w), a in zip(sizes, generator.num_anchors(), strict=True)
    ]
    assert_close(torch.cat(ours), theirs, rtol=0, atol=0)


def test_base_anchors_by_hand() -> None:
    # 32 px at height / width = 0.25: width 64, height 16.
    assert_close(base_anchors([32], [0.25, 1.0]), torch.tensor([[-32.0, -8, 32, 8], [-16, -16, 16, 16]]))


def test_cells_run_in_reading_order() -> None:
    (anchors,) = AnchorGenerator(sizes=[[4]], ratios=[[1.0]])([(2, 3)], [8])
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    assert centres.tolist() == [[0, 0], [8, 0], [16, 0], [0, 8], [8, 8], [16, 8]]


def test_one_ratio_list_serves_all_levels() -> None:
    assert AnchorGenerator(sizes=[[8], [16, 20]], ratios=[[1.0, 2.0]]).num_anchors() == [2, 4]


def test_anchors_built_in_inference_mode_may_train_later() -> None:
    generator = AnchorGenerator(sizes=[[7]], ratios=[[1.0]])
    with torch.inference_mode():
        generator([(3, 5)], [4])
    (anchors,) = generator([(3, 5)], [4])
    weight = torch.ones(4, requires_grad=True)
    (anchors * weight).sum().backward()
    assert not anchors.is_inference()
    assert_close(weight.grad, anchors.sum(dim=0))


def test_errors_give_numbers() -> None:
    with pytest.raises(ValueError, match="2 levels but ratios has 3"):
        AnchorGenerator(sizes=[[8], [16]], ratios=[[1.0]] * 3)
    with pytest.raises(ValueError, match=r"level 1.*positive"):
        AnchorGenerator(sizes=[[8], [0]], ratios=[[1.0]])
    with pytest.raises(ValueError, match="for 2 levels, but the features have 1"):
        AnchorGenerator(sizes=[[8], [16]], ratios=[[1.0]])([(4, 4)], [8])
