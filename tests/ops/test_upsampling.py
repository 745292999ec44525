from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from detseg.ops.upsampling import (
    bed_of_nails,
    bilinear_kernel,
    checkerboard_energy,
    convolved_length,
    pool_with_switches,
    transposed_length,
    unpool,
)

SETTINGS = [
    {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    for kernel in (2, 3, 4)
    for stride in (1, 2, 3)
    for padding in (0, 1)
    for dilation in (1, 2)
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_lengths_are_torchs(setting):
    for length in (8, 11):
        weight = torch.ones(1, 1, setting["kernel"])
        options = {key: value for key, value in setting.items() if key != "kernel"}
        for more in range(max(setting["stride"], setting["dilation"])):
            given = F.conv_transpose1d(torch.ones(1, 1, length), weight, output_padding=more, **options)
            assert transposed_length(length, output_padding=more, **setting) == given.shape[2]
        assert convolved_length(length, **setting) == F.conv1d(torch.ones(1, 1, length), weight, **options).shape[2]


def test_a_convolution_undoes_the_length():
    for length in (1, 4, 7):
        grown = {transposed_length(length, kernel=3, stride=2, padding=1, output_padding=more) for more in (0, 1)}
        assert len(grown) == 2
        assert {convolved_length(value, kernel=3, stride=2, padding=1) for value in grown} == {length}


def test_impossible_lengths_are_errors():
    with pytest.raises(ValueError, match="makes -2 cells of 1; use less padding"):
        transposed_length(1, kernel=2, stride=2, padding=2)
    with pytest.raises(ValueError, match=r"output_padding 2 must be 0\.\.1"):
        transposed_length(1, kernel=2, stride=2, output_padding=2)
    with pytest.raises(ValueError, match="reaches 5 cells does not fit into 3"):
        convolved_length(3, kernel=3, dilation=2)


def test_unpooling_by_hand():
    maps = torch.tensor([[1.0, 2, 6, 3], [3, 5, 2, 1], [1, 2, 2, 1], [7, 3, 4, 8]])[None, None]
    pooled, switches = pool_with_switches(maps)
    assert pooled[0, 0].tolist() == [[5, 6], [7, 8]]
    assert switches[0, 0].tolist() == [[5, 2], [12, 15]]
    later = torch.tensor([[1.0, 2], [3, 4]])[None, None]
    expected = [[0, 0, 2, 0], [0, 1, 0, 0], [0, 0, 0, 0], [3, 0, 0, 4]]
    assert unpool(later, switches, 2)[0, 0].tolist() == expected


@pytest.mark.parametrize("factor", [2, 3])
def test_unpooling_equals_torch(factor):
    maps = torch.randn(2, 3, 6, 12)
    pooled, switches = pool_with_switches(maps, factor)
    later = torch.randn_like(pooled).requires_grad_()
    ours = unpool(later, switches, factor)
    assert_close(ours, F.max_unpool2d(later, switches, factor))
    assert_close(torch.autograd.grad(ours.square().sum(), later)[0], 2 * later.detach())
    assert_close(unpool(pooled, switches, factor), torch.where(unpool(pooled, switches, factor) != 0, maps, 0.0))


def test_unpooling_errors_give_both_shapes():
    with pytest.raises(ValueError, match=r"maps are \(1, 2, 2, 2\), the switches \(1, 1, 2, 2\)"):
        unpool(torch.zeros(1, 2, 2, 2), torch.zeros(1, 1, 2, 2, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match="needs sides that are its multiples"):
        pool_with_switches(torch.zeros(1, 1, 3, 4))


def test_bed_of_nails_by_hand():
    maps = torch.tensor([[1.0, 2], [3, 4]])[None, None]
    assert bed_of_nails(maps, 2)[0, 0].tolist() == [[1, 0, 2, 0], [0, 0, 0, 0], [3, 0, 4, 0], [0, 0, 0, 0]]
    assert bed_of_nails(maps[..., :1, :], 3)[0, 0, 0].tolist() == [1, 0, 0, 2, 0, 0]


def test_transposed_convolution_is_the_transpose_of_its_matrix():
    size, options = 6, {"stride": 2, "padding": 1}
    kernel = torch.randn(1, 1, 3, 3, dtype=torch.float64)
    units = torch.eye(size * size, dtype=torch.float64).view(-1, 1, size, size)
    matrix = F.conv2d(units, kernel, **options).flatten(1).T  # (cells after, cells before): convolution is x -> M x
    small = torch.randn(1, 1, 3, 3, dtype=torch.float64)
    assert matrix.shape == (9, 36)
    grown = F.conv_transpose2d(small, kernel, output_padding=1, **options)
    assert_close(grown.flatten(), matrix.T @ small.flatten())


def test_bilinear_kernel_by_hand():
    quarter = torch.tensor([0.25, 0.75, 0.75, 0.25])
    assert_close(bilinear_kernel(4, 2), quarter[:, None] * quarter)
    assert_close(bilinear_kernel(5, 3)[2], torch.tensor([1 / 3, 2 / 3, 1, 2 / 3, 1 / 3]))


def test_checkerboard_energy_by_hand():
    board = torch.tensor([[1.0, -1], [-1, 1]]).repeat(3, 4)[None, None]
    assert checkerboard_energy(board, 2).tolist() == [[1.0]]  # all of it
    assert checkerboard_energy(torch.ones(1, 2, 6, 6), 2).tolist() == [[0.0, 0.0]]
    assert_close(checkerboard_energy(board + 1, 2), torch.tensor([[0.5]]))  # mean 1, variance 1
    assert checkerboard_energy(torch.zeros(1, 1, 4, 4), 2).tolist() == [[0.0]]
    with pytest.raises(ValueError, match="no block of 4 by 4"):
        checkerboard_energy(torch.zeros(1, 1, 3, 8), 4)
