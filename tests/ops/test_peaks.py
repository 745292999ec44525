from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from detseg.ops.peaks import local_maxima, top_peaks


def _loop(heat: torch.Tensor, kernel: int) -> torch.Tensor:
    found, half = torch.full_like(heat, -torch.inf), kernel // 2
    for b, k, y, x in torch.cartesian_prod(*(torch.arange(size) for size in heat.shape)).tolist():
        rows, cols = range(max(0, y - half), y + half + 1), range(max(0, x - half), x + half + 1)
        around = [
            (float(heat[b, k, v, u]), -v, -u) for v in rows for u in cols if v < heat.shape[2] and u < heat.shape[3]
        ]
        if max(around) == (float(heat[b, k, y, x]), -y, -x):
            found[b, k, y, x] = heat[b, k, y, x]
    return found


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_peaks_equal_a_loop_over_cells(kernel: int) -> None:
    heat = torch.randint(-4, 5, (2, 2, 6, 7)).float()  # many equal neighbours
    assert_close(local_maxima(heat, kernel), _loop(heat, kernel), rtol=0, atol=0)


@pytest.mark.parametrize("curvature", [0.3, 0.1, 0.03, 0.01])
def test_a_broad_peak_is_found_once_in_sixteen_bits(curvature: float) -> None:
    y, x = torch.meshgrid(torch.arange(25.0), torch.arange(25.0), indexing="ij")
    for centre in torch.rand(20, 2) * 8 + 8:
        heat = 1.7 - curvature * ((y - centre[0]) ** 2 + (x - centre[1]) ** 2)
        for kind in (torch.float32, torch.bfloat16, torch.float16):
            found = local_maxima(heat[None, None].to(kind)) > 1.7 - curvature * 5
            assert int(found.sum()) == 1


def test_the_best_of_all_classes_by_hand() -> None:
    heat = torch.zeros(2, 2, 3, 4)
    heat[0, 1, 2, 3], heat[0, 0, 0, 1], heat[1, 0, 1, 0] = 0.9, 0.5, 0.7
    found = top_peaks(heat, 2)
    assert_close(found.values, torch.tensor([[0.9, 0.5], [0.7, 0.0]]))
    assert found.labels[0].tolist() == [1, 0] and found.rows[0].tolist() == [2, 0] and found.cols[0].tolist() == [3, 1]
    assert (int(found.labels[1, 0]), int(found.rows[1, 0]), int(found.cols[1, 0])) == (0, 1, 0)


def test_no_more_peaks_than_cells() -> None:
    assert top_peaks(torch.rand(1, 1, 2, 2), 100).values.shape == (1, 4)


def test_a_window_without_a_middle_is_refused() -> None:
    with pytest.raises(ValueError, match="kernel is 2"):
        local_maxima(torch.zeros(1, 1, 2, 2), 2)
