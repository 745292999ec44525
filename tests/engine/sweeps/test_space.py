"""Hydra's sweep grammar as a search space."""

from __future__ import annotations

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from detseg.config import ConfigError
from detseg.engine.sweeps.space import Choice, Interval, read_space, typed


def one(text: str) -> Choice | Interval:
    (dimension,) = read_space([text]).dimensions.values()
    return dimension


@pytest.mark.parametrize(
    ("text", "dimension", "distribution"),
    [
        ("a=1,2,3", Choice(("1", "2", "3")), CategoricalDistribution(("1", "2", "3"))),
        ("a=choice(x,y,x)", Choice(("x", "y")), CategoricalDistribution(("x", "y"))),
        ("a=choice([x,y],[z])", Choice(("[x,y]", "[z]")), CategoricalDistribution(("[x,y]", "[z]"))),
        ("a=interval(0.5,2)", Interval(0.5, 2.0), FloatDistribution(0.5, 2.0)),
        ("a=tag(log,interval(1e-4,1e-2))", Interval(1e-4, 1e-2, log=True), FloatDistribution(1e-4, 1e-2, log=True)),
        ("a=int(interval(1,8))", Interval(1, 8, step=1), IntDistribution(1, 8)),
        ("a=tag(log,int(interval(1,64)))", Interval(1, 64, log=True, step=1), IntDistribution(1, 64, log=True)),
        ("seed=range(1,4)", Interval(1, 3, step=1), IntDistribution(1, 3)),
        ("a=range(64,257,32)", Interval(64, 256, step=32), IntDistribution(64, 256, step=32)),
        ("a=range(10,1,-3)", Interval(4, 10, step=3), IntDistribution(4, 10, step=3)),
        (
            "a=range(0.1,0.5,0.1)",
            Choice(("0.1", "0.2", "0.3", "0.4")),
            CategoricalDistribution(("0.1", "0.2", "0.3", "0.4")),
        ),
    ],
)
def test_each_form_is_the_distribution_that_it_says(text, dimension, distribution):
    assert one(text) == dimension
    space = read_space([text])
    assert list(space.distributions().values()) == [distribution]
    assert space.fixed == ()


def test_fixed_overrides_stay_in_order_and_numbers_survive_their_text():
    space = read_space(["model=fcos_small", "optimizer.lr=interval(0.1,0.3)", "name=a b", "seed=choice(1,2)"])
    assert space.fixed == ("model=fcos_small", "name=a b") and list(space.dimensions) == ["optimizer.lr", "seed"]
    number = 0.1 + 0.2
    (text,) = typed({"optimizer.lr": number})
    assert float(text.partition("=")[2]) == number
    assert typed({"model": "[a,b]", "n": 3}) == ["model=[a,b]", "n=3"]


def test_a_grid_is_every_combination_once():
    grid = read_space(["a=choice(x,y)", "b=range(1,4)", "c=5"]).grid()
    assert len(grid) == 6 and grid[0] == {"a": "x", "b": 1} and grid[-1] == {"a": "y", "b": 3}
    with pytest.raises(ConfigError, match=r"optimizer\.lr: an interval of real numbers has no grid"):
        read_space(["optimizer.lr=interval(0,1)"]).grid()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a=interval(3.0,1.0)", "from 3.0 to 1.0 is empty"),
        ("a=tag(log,interval(0,1))", "needs numbers above 0, and 0.0 is not"),
        ("a=range(3,1)", "3, 1 is not reached"),
        ("a=tag(log,range(1,9,2))", "have the step 1"),
        ("a=glob(*)", r"name the choices, as in a=choice\(a,b\)"),
    ],
)
def test_what_has_no_space_says_so(text, message):
    with pytest.raises(ConfigError, match=message):
        read_space([text])
