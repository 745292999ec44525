import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from detseg.ops.dense_crf import dense_crf

# What pydensecrf2 1.1 gives for `scene()`: setUnaryEnergy of -log softmax, addPairwiseGaussian(sxy=3, compat=3),
# addPairwiseBilateral(sxy=8, srgb=20, compat=4), inference(2); classes 0 and 1.
RELEASED = """
 .03823 .15683 .24386 .14667 .01307 .00395 .01237 .13758
 .55641 .76757 .39578 .16674 .04757 .04036 .17976 .39359
 .43280 .27082 .04200 .03121 .15909 .63042 .89197 .96372
 .24327 .02524 .00800 .00427 .13028 .40607 .26404 .05850
 .00115 .00064 .00382 .00766 .23152 .32670 .19427 .05692
 .00140 .00258 .08063 .43329 .74929 .11473 .01655 .00857
 .56881 .46198 .35917 .11705 .05277 .01252 .01130 .02731
 .01220 .04296 .08901 .31013 .57003 .75540 .79994 .53458
 .55390 .70312 .93873 .93786 .72720 .25728 .04766 .01412
 .01231 .00895 .01137 .01572 .28387 .17395 .48373 .67734
 .02374 .02197 .02342 .00595 .07592 .03295 .02038 .01751
 .00163 .00269 .01196 .03171 .14240 .84701 .96051 .97128
"""


def scene() -> tuple[Tensor, Tensor]:
    number = torch.arange(48).view(6, 8)
    parts = [(number * 7) % 31 < 15, number % 8 > 3, number // 8 > 2]
    image = ((torch.stack(parts).double() * 0.5 + (number % 5) / 50) * 255).round() / 255
    logits = torch.stack([torch.sin(number * 0.9), torch.cos(number * 0.4), torch.sin(number * 0.2 + 1)]).float() * 2
    return logits, image.float()


def test_equals_the_released_code() -> None:
    found = dense_crf(*scene(), iterations=2, appearance_weight=4, appearance_place=8, appearance_colour=20)
    expected = torch.tensor([float(number) for number in RELEASED.split()]).view(2, 6, 8)
    assert_close(found[:2], expected, rtol=0, atol=2e-5)


def slow(logits: Tensor, image: Tensor, iterations: int, kernels: list[tuple[float, float, float | None]]) -> Tensor:
    """Algorithm 1 of the paper, pair by pair, in Python; a pixel's message reaches itself, as in the released code."""
    classes, height, width = logits.shape
    pixels = [(row, column) for row in range(height) for column in range(width)]
    tables = []
    for weight, place, colour in kernels:
        kernel = torch.zeros(len(pixels), len(pixels), dtype=torch.float64)
        for i, (y, x) in enumerate(pixels):
            for j, (v, u) in enumerate(pixels):
                distance = ((y - v) ** 2 + (x - u) ** 2) / place**2
                if colour is not None:
                    distance += float((image[:, y, x] - image[:, v, u]).double().mul(255 / colour).square().sum())
                kernel[i, j] = torch.tensor(-distance / 2, dtype=torch.float64).exp()
        total = kernel.sum(1)
        tables.append((weight, kernel / (total[:, None] * total[None, :]).sqrt()))
    unary = -logits.double().softmax(0).log().flatten(1)  # energies
    marginals = (-unary).softmax(0)
    for _ in range(iterations):
        message = sum(weight * marginals @ kernel for weight, kernel in tables)
        # Potts: a label costs what the other labels weigh; their sum is the same for all but the label's own share.
        energy = unary + (message.sum(0) - message)
        marginals = (-energy).softmax(0)
    return marginals.view(classes, height, width).float()


@pytest.mark.parametrize("appearance", [0.0, 4.0])
def test_exact_mean_field_on_8_by_8(appearance: float) -> None:
    logits, image = torch.randn(3, 8, 8), torch.rand(3, 2, 2).repeat_interleave(4, 1).repeat_interleave(4, 2)
    found = dense_crf(
        logits,
        image,
        iterations=3,
        appearance_weight=appearance,
        appearance_place=6.0,
        appearance_colour=30.0,
        smoothness_weight=2.0,
        smoothness_place=1.5,
        exact=True,
    )
    assert_close(found, slow(logits, image, 3, [(appearance, 6.0, 30.0), (2.0, 1.5, None)]), rtol=1e-5, atol=1e-6)


def test_the_lattice_is_close_to_exact_after_one_step() -> None:
    logits, image = torch.randn(2, 16, 16), F.interpolate(torch.rand(1, 3, 4, 4), (16, 16))[0]
    numbers = {"iterations": 1, "appearance_weight": 3.0, "appearance_place": 8.0, "appearance_colour": 60.0}
    difference = (dense_crf(logits, image, **numbers) - dense_crf(logits, image, exact=True, **numbers)).abs()
    assert float(difference.mean()) < 0.02 and float(difference.max()) < 0.1


def test_no_iteration_is_the_softmax() -> None:
    logits, image = scene()
    assert_close(dense_crf(logits, image, iterations=0), logits.softmax(0))


def test_it_brings_blurred_logits_back_to_the_edges() -> None:
    """A disc on a plain ground, seen through logits that are blurred and noisy: mean IoU rises."""
    row, column = torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij")
    truth = ((row - 24) ** 2 + (column - 30) ** 2 < 15**2).float()  # (48, 64)
    generator = torch.Generator().manual_seed(0)
    image = truth * 0.5 + 0.2 + torch.randn(3, 48, 64, generator=generator) * 0.02
    blurred = F.avg_pool2d(truth[None, None], 17, stride=1, padding=8, count_include_pad=False)[0, 0]
    score = 3 * (blurred - 0.35) + torch.randn(48, 64, generator=generator) * 0.5
    logits = torch.stack([-score, score])

    def mean_iou(labels: Tensor) -> float:
        overlaps = [((labels == k) & (truth == k)).sum() / ((labels == k) | (truth == k)).sum() for k in (0, 1)]
        return float(sum(overlaps) / 2)

    before, after = mean_iou(logits.argmax(0)), mean_iou(dense_crf(logits, image.clamp(0, 1)).argmax(0))
    assert before < 0.8 and after > 0.97


def test_one_pixel_and_one_row() -> None:
    assert_close(dense_crf(torch.tensor([[[0.0]], [[0.0]]]), torch.rand(3, 1, 1)), torch.full((2, 1, 1), 0.5))
    found = dense_crf(torch.randn(4, 1, 9), torch.rand(3, 1, 9))
    assert_close(found.sum(0), torch.ones(1, 9))


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"logits are \(2, 4, 4\) and the image \(3, 4, 5\)"):
        dense_crf(torch.zeros(2, 4, 4), torch.zeros(3, 4, 5))
    with pytest.raises(ValueError, match="1 of the logits are NaN or infinite"):
        dense_crf(torch.tensor([[[float("nan")]], [[0.0]]]), torch.zeros(3, 1, 1))
    with pytest.raises(ValueError, match="iterations=-1"):
        dense_crf(*scene(), iterations=-1)
    with pytest.raises(ValueError, match="above 0"):
        dense_crf(*scene(), appearance_colour=0.0)
