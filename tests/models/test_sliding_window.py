from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from detseg.models import SlidingWindow
from detseg.models.sliding_window import patch_side

SMALL = {"num_classes": 3, "patch": 21, "widths": (4, 6), "kernels": (4, 3), "hidden": 8}


def twins(**options) -> tuple[SlidingWindow, SlidingWindow]:
    slow, fast = SlidingWindow(**SMALL, **options).eval(), SlidingWindow(**SMALL, **options, dense=True).eval()
    fast.load_state_dict(slow.state_dict())
    return slow, fast


def test_the_papers_network():
    model = SlidingWindow(num_classes=2, step=16)
    assert patch_side(95, (4, 5, 4, 4)) == 3  # table 1: 92, 46, 42, 21, 18, 9, 6, 3
    assert model.classifier[1].weight.shape == (200, 48 * 3 * 3)


@pytest.mark.parametrize("step", [1, 2, 4, 8, 12])
@pytest.mark.parametrize("size", [(24, 32), (19, 30), (1, 5)])
def test_dense_logits_are_the_sliding_windows(step, size):
    slow, fast = twins(step=step)
    images = torch.rand(2, 3, *size)
    with torch.no_grad():
        grids = [model.grid(model.normalize(images)) for model in (slow, fast)]
        assert grids[0].shape == (2, 3, -(-size[0] // step), -(-size[1] // step))
        assert_close(*grids)
        assert_close(slow(images), fast(images))


def test_a_logit_is_that_of_the_patch_around_its_pixel():
    slow, _ = twins(step=4)
    images = torch.rand(1, 3, 40, 44)
    with torch.no_grad():
        normal = slow.normalize(images)
        grid = slow.grid(normal)
        row, column = 4 * 4 + 2, 5 * 4 + 2  # the pixel of grid place (4, 5)
        patch = normal[:, :, row - 10 : row + 11, column - 10 : column + 11]
        assert_close(grid[:, :, 4, 5], slow.classifier(slow.features(patch)))
        assert_close(slow(images)[:, :, row, column], grid[:, :, 4, 5])
        assert_close(slow(images)[:, :, 16:20, 20:24], grid[:, :, 4, 5, None, None].expand(1, 3, 4, 4))


@pytest.mark.parametrize("step", [1, 4, 12])
def test_logits_do_not_depend_on_the_padding_of_a_batch(step):
    """Patches at the edge see the image's mirror picture, not the zeros around it."""
    batch, sizes = torch.rand(3, 3, 32, 32), torch.tensor([[32, 32], [19, 26], [1, 5]])
    for model in twins(step=step):
        with torch.no_grad():
            found = model(batch, sizes)  # (3, 3, 32, 32)
            for own, image, (height, width) in zip(found, batch, sizes.tolist(), strict=True):
                assert_close(own[:, :height, :width], model(image[None, :, :height, :width])[0])


def test_both_ways_have_the_same_gradients():
    slow, fast = twins(step=2)
    images = torch.rand(1, 3, 9, 11)
    for model in (slow, fast):
        model(images).square().mean().backward()
    for left, right in zip(slow.parameters(), fast.parameters(), strict=True):
        assert_close(left.grad, right.grad, rtol=1e-4, atol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match="step 3 must be a multiple or a divisor of the network's stride 4"):
        SlidingWindow(**SMALL, step=3)
    with pytest.raises(ValueError, match="at most the patch of 21"):
        SlidingWindow(**SMALL, step=24)
    with pytest.raises(ValueError, match="a patch of 7 pixels is too small"):
        SlidingWindow(**{**SMALL, "patch": 7})
