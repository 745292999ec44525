"""The shapes and textures of Orchard's fruit, each drawn in a small window of its own.

Every species is told apart by its outline and its skin; the hues overlap on purpose.

- apple: round, with a dent where the stem sits, streaked and glossy, usually with a leaf;
- pear: two blended circles, speckled, with a bent stem;
- orange: a circle with dimples and the star that the stem left.

Only ``+ - * /``, ``sqrt``, ``floor`` and comparisons touch the pixels. IEEE 754 fixes the result of each to the last
bit, so an image is the same on every machine, which ``sin`` or ``exp`` of different libraries would not give.

Convention: ``u, v`` are a fruit's own axes, upright, in units of its radius; ``v`` grows downwards.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]  # float32 throughout

SPECIES = ("apple", "pear", "orange")
REACH = 1.4
"""Half the side of a fruit's window, in radii: room for stem and leaf."""

# Hue ranges (0..1, red at 0) with their weights. Each species can take every colour from red to green.
_HUES: dict[str, tuple[tuple[float, float, float], ...]] = {
    "apple": ((-0.03, 0.03, 0.40), (0.03, 0.09, 0.15), (0.11, 0.16, 0.20), (0.19, 0.27, 0.25)),
    "pear": ((-0.02, 0.04, 0.15), (0.06, 0.11, 0.15), (0.12, 0.17, 0.35), (0.18, 0.27, 0.35)),
    "orange": ((0.01, 0.05, 0.15), (0.06, 0.10, 0.50), (0.10, 0.15, 0.20), (0.16, 0.23, 0.15)),
}
_STEM = np.array([92, 66, 40], np.float32).reshape(3, 1, 1)
_LEAF = np.array([66, 122, 48], np.float32).reshape(3, 1, 1)


@dataclass(frozen=True)
class Fruit:
    """One fruit before it is drawn; lengths as shares of the image's shorter side.

    Attributes:
        species: 0 apple, 1 pear, 2 orange.
        x: centre, as a share of the width.
        y: centre, as a share of the height.
        radius: of the body, as a share of the shorter side.
        turn: (cos, sin) of the rotation.
        colours: base and blush, ``(2, 3)`` in 0..255.
        leaf: whether a leaf hangs on the stem.
        blush: direction and reach (u, v, offset) of the second colour.
        star: (u, v) of an orange's star.
        dots: ``(2, 16, 16)``, where in its cell of a lattice each speckle sits.
    """

    species: int
    x: float
    y: float
    radius: float
    turn: tuple[float, float]
    colours: Floats
    leaf: bool
    blush: tuple[float, float, float]
    star: tuple[float, float]
    dots: Floats


def uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """Return a number in [low, high)."""
    return low + (high - low) * rng.random()


def pick(rng: np.random.Generator, weights: Sequence[float]) -> int:
    """Return an index with the probability that its weight gives; the weights sum to 1."""
    choice = rng.random()
    for index, weight in enumerate(weights):
        choice -= weight
        if choice < 0:
            return index
    return len(weights) - 1


def random_turn(rng: np.random.Generator, *, upright: bool) -> tuple[float, float]:
    """Return (cos, sin) of a random angle by the rational form of the circle, without a call to libm.

    Args:
        rng: source of randomness.
        upright: stay within about 45 degrees of upright; otherwise the whole circle.
    """
    t = uniform(rng, -0.4142, 0.4142)  # tan of half the angle: up to 45 degrees either way
    cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    quarter = 0 if upright else int(rng.integers(4))
    return ((cos, sin), (-sin, cos), (-cos, -sin), (sin, -cos))[quarter]


def hsv(hue: float, saturation: float, value: float) -> Floats:
    """Return a colour as ``(3,)`` in 0..255; ``hue`` may lie outside 0..1 and wraps."""
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, saturation, value), np.float32) * np.float32(255)


def plan_fruit(rng: np.random.Generator, *, species: int, x: float, y: float, radius: float) -> Fruit:
    """Choose the looks of a fruit of which kind, place and size are known."""
    name = SPECIES[species]
    return Fruit(
        species=species,
        x=x,
        y=y,
        radius=radius,
        turn=random_turn(rng, upright=name == "apple"),
        colours=np.stack([_fruit_colour(rng, name), _fruit_colour(rng, name)]),
        leaf=rng.random() < {"apple": 0.8, "pear": 0.2, "orange": 0.0}[name],
        blush=(uniform(rng, -0.8, 0.8), uniform(rng, -0.8, 0.8), uniform(rng, -0.3, 0.5)),
        star=(uniform(rng, -0.45, 0.45), uniform(rng, -0.45, 0.45)),
        dots=(rng.integers(22, 79, size=(2, 16, 16)) / 100).astype(np.float32),
    )


def _fruit_colour(rng: np.random.Generator, name: str) -> Floats:
    low, high = _HUES[name][pick(rng, [weight for _, _, weight in _HUES[name]])][:2]
    return hsv(uniform(rng, low, high), uniform(rng, 0.62, 0.95), uniform(rng, 0.68, 0.98))


def draw_fruit(
    fruit: Fruit, *, radius: float, centre: tuple[float, float], size: int, light: tuple[float, float, float]
) -> tuple[Floats, Floats]:
    """Draw a fruit in a square window.

    Args:
        fruit: what to draw.
        radius: in pixels.
        centre: (y, x) in pixels of the window.
        size: side of the window in pixels.
        light: unit vector towards the light (x right, y down, z to the viewer).

    Returns:
        Colour ``(3, size, size)`` in 0..255 and coverage ``(size, size)`` in [0, 1].
    """
    cos, sin = fruit.turn
    steps = np.arange(size, dtype=np.float32) + np.float32(0.5)
    x, y = (steps - np.float32(centre[1])) / np.float32(radius), (steps - np.float32(centre[0])) / np.float32(radius)
    u = cos * x[None, :] + sin * y[:, None]  # (size, size)
    v = cos * y[:, None] - sin * x[None, :]
    lit = (cos * light[0] + sin * light[1], cos * light[1] - sin * light[0], light[2])
    body = (_apple, _pear, _orange)[fruit.species]
    colour, distance = body(fruit, u, v, radius, lit)
    alpha = cover(distance, radius)
    if fruit.species != 2:
        colour, alpha = _stem_and_leaf(fruit, u, v, radius, colour, alpha)
    return colour, alpha


def cover(distance: Floats, scale: float) -> Floats:
    """Turn a signed distance into coverage with an edge one pixel wide.

    Args:
        distance: negative inside the shape.
        scale: pixels per unit of ``distance``.
    """
    share: Floats = np.clip(np.float32(0.5) - distance * np.float32(scale), 0, 1)
    return share


def lens(x: Floats, y: Floats, length: float, width: float) -> Floats:
    """Return the signed distance to a leaf's outline, two arcs that meet, of half axes ``length`` and ``width``."""
    reach, gap = (length * length / width + width) / 2, (length * length / width - width) / 2
    wide = np.abs(y) + np.float32(gap)
    distance: Floats = np.sqrt(x * x + wide * wide) - np.float32(reach)
    return distance


def _apple(
    fruit: Fruit, u: Floats, v: Floats, radius: float, light: tuple[float, float, float]
) -> tuple[Floats, Floats]:
    r = np.sqrt(u * u + v * v) + np.float32(1e-4)
    up = -v / r  # cosine of the angle from the stem
    dent = np.maximum(up - 0.62, 0) / 0.38
    foot = np.maximum(-up - 0.80, 0) / 0.20
    bound = 0.92 + 0.17 * up * (1 - up * up) - 0.26 * dent * dent - 0.07 * foot * foot
    nu, nv = u / bound, v / bound
    streaks = np.abs(nu * 4 - np.floor(nu * 4) - 0.5)  # a triangle wave along the skin
    blush = _blush(fruit, u, v) * (0.75 + 0.5 * streaks)
    colour = _mix(fruit.colours, blush)
    hollow = 0.45 * np.clip(1 - (u * u + (v + 0.66) * (v + 0.66)) * 12, 0, 1)  # dark where the stem enters
    return _light(colour * (1 - hollow), nu, nv, light, gloss=95), r - bound


def _pear(
    fruit: Fruit, u: Floats, v: Floats, radius: float, light: tuple[float, float, float]
) -> tuple[Floats, Floats]:
    low, high = v - np.float32(0.30), v + np.float32(0.50)
    uu = u * u
    belly, neck = np.sqrt(uu + low * low) - np.float32(0.66), np.sqrt(uu + high * high) - np.float32(0.34)
    # Two circles joined by a polynomial smooth minimum.
    part = np.clip(0.5 + (neck - belly) / 0.9, 0, 1)
    distance = neck + (belly - neck) * part - 0.45 * part * (1 - part)
    nu = u * (part * (1 / 0.68) + (1 - part) * (1 / 0.42))
    nv = np.clip(part * low * (1 / 0.68) + (1 - part) * high * (1 / 0.42), -1, 1)
    colour = _mix(fruit.colours, _blush(fruit, u, v))
    speckles = _dots(fruit, u, v, lattice=6.5, size=0.13, radius=radius)
    return _light(colour * (1 - 0.45 * speckles), nu, nv, light, gloss=40), distance


def _orange(
    fruit: Fruit, u: Floats, v: Floats, radius: float, light: tuple[float, float, float]
) -> tuple[Floats, Floats]:
    rr = u * u + v * v
    bend = 1 + 0.3 * rr  # dimples crowd towards the rim, as on a ball
    dimples = _dots(fruit, u * bend, v * bend, lattice=7.0, size=0.27, radius=radius)
    colour = _mix(fruit.colours, 0.4 * _blush(fruit, u, v)) * (1.04 - 0.2 * dimples)
    a, b = (u - fruit.star[0]) * 3, (v - fruit.star[1]) * 3
    d2 = a * a + b * b + np.float32(1e-4)
    re, im = a * a - b * b, 2 * a * b
    re, im = re * re - im * im, 2 * re * im
    fifth = (re * a - im * b) / (d2 * d2 * np.sqrt(d2))  # cos 5t = Re z^5 / |z|^5: five rays
    star = cover(np.sqrt(d2) - (0.62 + 0.38 * fifth), radius / 3)
    green = np.array([88, 104, 44], np.float32).reshape(3, 1, 1)
    colour = colour + (green - colour) * (0.8 * star)
    return _light(colour, u / 0.95, v / 0.95, light, gloss=45), np.sqrt(rr) - np.float32(0.95)


def _stem_and_leaf(
    fruit: Fruit, u: Floats, v: Floats, radius: float, colour: Floats, alpha: Floats
) -> tuple[Floats, Floats]:
    """Lay stem and leaf over the body; both belong to the fruit's mask."""
    foot = -0.66 if fruit.species == 0 else -0.86
    length = 0.46 if fruit.species == 0 else 0.36
    along = np.clip((foot - v) / length, 0, 1)
    du = u - np.float32(0.16) * along * along  # bends a little to the right
    dv = v - (foot - along * length)
    stem = cover(np.sqrt(du * du + dv * dv) - max(0.065, 0.55 / radius), radius)
    colour, alpha = _over(colour, alpha, _STEM, stem)
    if fruit.leaf:
        a, b = u - np.float32(0.44), v - np.float32(foot - 0.30)
        x, y = 0.9 * a - 0.436 * b, 0.436 * a + 0.9 * b
        leaf = cover(lens(x, y, 0.40, max(0.17, 0.8 / radius)), radius)
        colour, alpha = _over(colour, alpha, _LEAF * (1 + 0.35 * (y > 0).astype(np.float32)), leaf)
    return colour, alpha


def _over(colour: Floats, alpha: Floats, paint: Floats, part: Floats) -> tuple[Floats, Floats]:
    """Lay ``paint`` over ``colour``; where nothing was drawn before, only the paint's colour counts."""
    whole = np.maximum(alpha, part)
    share = part / np.maximum(whole, np.float32(1e-3))
    return colour + (paint - colour) * share, whole


def _blush(fruit: Fruit, u: Floats, v: Floats) -> Floats:
    a, b, offset = fruit.blush
    share: Floats = np.clip(a * u + b * v + np.float32(offset), 0, 1)
    return share


def _mix(colours: Floats, share: Floats) -> Floats:
    base, other = colours[0].reshape(3, 1, 1), colours[1].reshape(3, 1, 1)
    mixed: Floats = base + (other - base) * share
    return mixed


def _light(colour: Floats, nu: Floats, nv: Floats, light: tuple[float, float, float], *, gloss: float) -> Floats:
    """Shade a rounded surface whose normal is (nu, nv, sqrt(1 - nu^2 - nv^2)), with a highlight of ``gloss`` levels."""
    nz = np.sqrt(np.maximum(1 - nu * nu - nv * nv, 0))
    facing = np.clip(light[0] * nu + light[1] * nv + light[2] * nz, 0, 1)
    spot = facing * facing
    spot = spot * spot
    spot = spot * spot
    spot = spot * spot
    return colour * (0.42 + 0.66 * facing) + np.float32(gloss) * spot


def _dots(fruit: Fruit, u: Floats, v: Floats, *, lattice: float, size: float, radius: float) -> Floats:
    """Return the coverage of round spots, one in each cell of a lattice with ``lattice`` cells per radius.

    Args:
        fruit: gives the place of each spot in its cell.
        u: fruit coordinates.
        v: fruit coordinates.
        lattice: cells per radius of the fruit.
        size: radius of a spot, in cells.
        radius: of the fruit in pixels, for the anti-aliased edge.
    """
    a, b = u * np.float32(lattice), v * np.float32(lattice)
    column, row = np.floor(a), np.floor(b)
    cell = (row.astype(np.int32) & 15) * 16 + (column.astype(np.int32) & 15)
    da = a - column - fruit.dots[0].ravel()[cell]
    db = b - row - fruit.dots[1].ravel()[cell]
    pixels = radius / lattice  # a cell's side; spots below a pixel fade to their mean
    inside = size - np.sqrt(da * da + db * db)
    spots: Floats = np.clip(inside * np.float32(max(pixels, 0.8)) + np.float32(0.35), 0, 1)
    return spots


def window(fruit: Fruit, height: int, width: int) -> tuple[float, int, int, int, tuple[float, float]]:
    """Return radius in pixels, top, left and side of the fruit's window, and its centre (y, x) in the window.

    The window may reach over the image's border.
    """
    radius = fruit.radius * min(height, width)
    y, x = fruit.y * height, fruit.x * width
    half = math.ceil(radius * REACH) + 1
    top, left = math.floor(y) - half, math.floor(x) - half
    return radius, top, left, 2 * half + 1, (y - top, x - left)
