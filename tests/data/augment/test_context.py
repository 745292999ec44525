from __future__ import annotations

import torch

from detseg.data.augment import Context
from planted import Planted, context


def test_one_choice_for_a_batch_whatever_else_is_drawn() -> None:
    drawn = []
    for batch in range(60):
        torch.rand(batch)
        drawn.append(context(Planted(), seed=4, epoch=2, batch=batch).choice(3, every=10))
    assert [drawn[first : first + 10] for first in range(0, 60, 10)] == [[value] * 10 for value in drawn[::10]]
    assert set(drawn) == {0, 1, 2}
    every = [context(Planted(), seed=4, epoch=2, batch=batch).choice(3) for batch in range(60)]
    assert every[:6] == drawn[::10]
    assert [context(Planted(), seed=4, epoch=3, batch=batch).choice(3) for batch in range(60)] != every
    assert [context(Planted(), seed=5, epoch=2, batch=batch).choice(3) for batch in range(60)] != every
    shares = torch.tensor(every).bincount(minlength=3) / 60
    assert float(shares.min()) > 0.15


def test_any_image_is_another() -> None:
    samples = Planted(5)
    seen = [context(samples).another()[1].image_id for _ in range(200)]
    assert set(seen) == set(range(5)) and min(map(seen.count, range(5))) > 15
    alone = Context(images=1, read=lambda other: samples[other][:2])
    assert alone.another()[1].image_id == 0
