from __future__ import annotations

import pytest

from detseg.data.samplers import EvalSampler, TrainSampler


def test_order_depends_on_seed_and_epoch_alone() -> None:
    sampler = TrainSampler(length=20, seed=3)
    first = list(sampler)
    assert first == list(sampler) == list(TrainSampler(length=20, seed=3))
    assert sorted(index for _, index in first) == list(range(20)) and {epoch for epoch, _ in first} == {0}
    sampler.set_epoch(4)
    later = list(sampler)
    assert {epoch for epoch, _ in later} == {4}
    assert [index for _, index in later] != [index for _, index in first]
    assert list(TrainSampler(length=20, seed=4)) != first


@pytest.mark.parametrize(("length", "world_size"), [(20, 3), (7, 2), (2, 5), (6, 3)])
def test_training_ranks_get_equally_many_and_all_images(length: int, world_size: int) -> None:
    ranks = [TrainSampler(length=length, rank=rank, world_size=world_size) for rank in range(world_size)]
    shares = [[index for _, index in sampler] for sampler in ranks]
    assert {len(share) for share in shares} == {-(-length // world_size)} == {len(sampler) for sampler in ranks}
    assert {index for share in shares for index in share} == set(range(length))


@pytest.mark.parametrize(("length", "world_size"), [(7, 2), (7, 3), (2, 3), (0, 2)])
def test_evaluation_sees_every_image_once(length: int, world_size: int) -> None:
    ranks = [EvalSampler(length=length, rank=rank, world_size=world_size) for rank in range(world_size)]
    shares = [[index for _, index in sampler] for sampler in ranks]
    assert [len(share) for share in shares] == [len(sampler) for sampler in ranks]
    assert sorted(index for share in shares for index in share) == list(range(length))  # none twice, none missing
    assert list(EvalSampler(length=3)) == [(0, 0), (0, 1), (0, 2)]


def test_keys_have_the_number_of_their_batch_in_every_process() -> None:
    ranks = [TrainSampler(length=11, rank=rank, world_size=2, batch_size=2) for rank in range(2)]
    for sampler in ranks:
        sampler.set_epoch(3)
        keys = list(sampler)
        assert [batch for _, _, batch in keys] == [0, 0, 1, 1, 2, 2] and {epoch for epoch, _, _ in keys} == {3}
        sampler.skip = 4  # a resumed run counts on
        assert list(sampler) == keys[4:]
    plain = TrainSampler(length=11, rank=0, world_size=2)
    plain.set_epoch(3)
    assert [key[:2] for key in ranks[0]] == list(plain)
