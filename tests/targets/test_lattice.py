from __future__ import annotations

import torch
from torch.testing import assert_close

from assignment_oracle import ANCHORS, POINTS, lattice_of
from detseg.targets.lattice import build_lattice, expand_ranges, expand_windows, pick_best, within


def test_ranges_are_listed_in_order_and_empty_ones_vanish() -> None:
    owner, value = expand_ranges(torch.tensor([2, 5, 0]), torch.tensor([4, 4, 1]))
    assert owner.tolist() == [0, 0, 0, 2, 2]
    assert value.tolist() == [2, 3, 4, 0, 1]


def test_windows_hold_every_pair_of_row_and_column_once() -> None:
    rows = torch.tensor([1, 0, 3]), torch.tensor([2, -1, 3])  # the second window is empty
    cols = torch.tensor([4, 0, 7]), torch.tensor([5, 9, 9])
    windows = expand_windows(rows, cols)
    owner = windows.row_owner[windows.row_entry]
    assert torch.equal(owner, windows.col_owner[windows.col_entry])
    found = [
        (int(o), int(r), int(c))
        for o, r, c in zip(owner, windows.row[windows.row_entry], windows.col[windows.col_entry], strict=True)
    ]
    assert found == [(0, 1, 4), (0, 1, 5), (0, 2, 4), (0, 2, 5), (2, 3, 7), (2, 3, 8), (2, 3, 9)]


def test_windows_are_cut_to_the_grid_also_where_no_integer_reaches() -> None:
    ends = [(-3.0, 2.0), (3.0, 1e30), (-3e38, -1e30), (1e30, 3e38), (5.0, -torch.inf), (-torch.inf, torch.inf)]
    low, high = torch.tensor(ends).unbind(1)
    first, last = within(low[:, None], high[:, None], torch.tensor([[4]]))
    assert first.flatten().tolist() == [0, 3, 0, 4, 4, 0]
    assert last.flatten().tolist() == [2, 3, -1, 3, -1, 3]
    assert expand_ranges(first.flatten(), last.flatten())[1].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_the_best_score_wins_and_among_equals_the_first_owner() -> None:
    cells = torch.tensor([0, 0, 1, 1, 3])
    scores = torch.tensor([0.5, 0.7, 0.2, 0.2, 0.0])
    owners = torch.tensor([4, 9, 8, 3, 5])
    assert pick_best(cells, scores, owners, 4).tolist() == [False, True, False, True, True]


def test_the_table_of_shapes_gives_back_every_reference() -> None:
    for references, shapes in ((POINTS, 5), (ANCHORS, 45)):
        lattice = lattice_of(references, 96, 160)
        table = lattice.shapes
        assert len(table.base) == shapes and lattice.total == sum(lattice.counts)
        for shape in range(shapes):
            row, col = int(table.rows[shape]) - 1, int(table.cols[shape]) - 1
            index = table.first[shape] + (row * table.cols[shape] + col) * table.step[shape]
            shift = torch.stack((col * table.stride_x[shape], row * table.stride_y[shape])).repeat(2)
            assert_close(lattice.boxes[index], table.base[shape] + shift, rtol=0, atol=0)


def test_a_size_is_laid_once_and_not_in_inference_mode() -> None:
    with torch.inference_mode():
        lattice = lattice_of(POINTS, 64, 32)
    assert lattice is lattice_of(POINTS, 64, 32)
    assert not lattice.boxes.is_inference() and not lattice.shapes.base.is_inference()


def test_cells_may_lie_between_pixels() -> None:
    whole = build_lattice(POINTS, ((4, 4),) * 5, ((8, 8),) * 5, "cpu")
    assert whole.shapes.stride_x.dtype == torch.int64
    between = build_lattice(POINTS, ((4, 4),) * 5, ((8, 10.5),) * 5, "cpu")
    assert between.shapes.stride_x.tolist() == [10.5] * 5 and between.shapes.stride_y.tolist() == [8] * 5
    assert between.boxes[3].tolist() == [31.5 - 4, -4, 31.5 + 4, 4]
