import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from detseg.models.box_branch import TwoLayerHead
from detseg.nn.svd import TruncatedSVD, truncated_svd


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (8, 8)])
def test_equals_the_whole_decomposition_cut_off(shape: tuple[int, int]) -> None:
    weight = torch.randn(*shape)
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    for rank in (1, 3, 6):
        first, second = truncated_svd(weight, rank)
        assert first.shape == (rank, shape[1]) and second.shape == (shape[0], rank)
        assert_close(second @ first, (left[:, :rank] * values[:rank] @ right[:rank]).float(), rtol=1e-4, atol=1e-5)
        left_out = torch.linalg.norm(weight.double() - (second @ first).double())  # Eckart and Young: what is cut off
        assert_close(left_out, values[rank:].square().sum().sqrt(), rtol=1e-3, atol=1e-5)


def test_a_whole_rank_is_the_layer_itself() -> None:
    weight = torch.randn(5, 9)
    first, second = truncated_svd(weight, 100)
    assert first.shape == (5, 9)
    assert_close(second @ first, weight)


def test_a_head_of_low_rank_is_kept_exactly_with_fewer_numbers() -> None:
    head = TwoLayerHead(shape=(4, 3, 3), width=20)
    for layer in (head.fc6, head.fc7):
        layer.weight.data = torch.randn(20, 2) @ torch.randn(2, layer.in_features)
    compress = TruncatedSVD(ranks={"fc6": 2, "fc7": 2})
    thin, regions = compress(head), torch.randn(7, 4, 3, 3)
    assert_close(thin(regions), head(regions), rtol=1e-4, atol=1e-4)
    # t * (u + v) weights and u biases for each of the two: section 3.1
    assert sum(value.numel() for value in thin.parameters()) == 2 * (20 + 36) + 20 + 2 * (20 + 20) + 20
    assert isinstance(head.fc6, nn.Linear) and head.fc6.weight.requires_grad


def test_it_is_made_again_only_when_the_weights_changed() -> None:
    head, compress = TwoLayerHead(shape=(8,), width=4), TruncatedSVD(ranks={"fc6": 2})
    first = compress(head)
    assert compress(head) is first
    with torch.no_grad():
        head.fc6.weight.mul_(2)
    second, regions = compress(head), torch.rand(3, 8)
    assert second is not first
    assert_close(second.fc6[1](second.fc6[0](regions)), 2 * (first.fc6(regions) - head.fc6.bias) + head.fc6.bias)


def test_it_travels_without_what_it_made() -> None:
    head, compress = TwoLayerHead(shape=(8,), width=4), TruncatedSVD(ranks={"fc6": 2})
    thin = compress(head)
    again = pickle.loads(pickle.dumps(compress))
    assert again._made is None and again.ranks == {"fc6": 2}
    assert_close(again(head)(torch.ones(1, 8)), thin(torch.ones(1, 8)))


def test_wrong_numbers_and_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\{'fc6': 0\} must be at least 1"):
        TruncatedSVD(ranks={"fc6": 0})
    with pytest.raises(ValueError, match=r"TwoLayerHead has no linear layer 'fc8'; it has \['fc6', 'fc7'\]"):
        TruncatedSVD(ranks={"fc8": 3})(TwoLayerHead(shape=(8,), width=4))
