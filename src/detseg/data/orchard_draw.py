"""Draws one scene of Orchard: fruit on grass under a sky, with the truth of every pixel.

A scene is planned in shares of the image, then drawn at any size, so one index shows the same orchard at 128 and at
640 pixels (fruit of which less than a quarter shows is dropped, and sizes may disagree on one at the limit). The random
numbers are PCG64's, seeded by (seed, split, index); see ``orchard_fruit`` for why no ``sin`` or ``exp`` occurs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from detseg.data.orchard_fruit import (
    Floats,
    Fruit,
    cover,
    draw_fruit,
    hsv,
    lens,
    pick,
    plan_fruit,
    random_turn,
    uniform,
    window,
)

MIN_VISIBLE = 0.25
"""Fruit of which less than this share can be seen, hidden or beyond the border, is left out of picture and truth."""
EMPTY_SHARE = 0.05
"""Share of images without any fruit."""

_COUNTS = (0.14, 0.18, 0.18, 0.16, 0.13, 0.10, 0.07, 0.04)  # of 1..8 fruit, given that there is any
_SMALLEST, _LARGEST = 0.066, 0.22  # radius of a fruit's body: 17 to 56 px across at 128 px, less where hidden


@dataclass(frozen=True)
class Scene:
    """A drawn scene and its truth.

    Attributes:
        image: ``(3, H, W)`` uint8 RGB.
        segments: ``(H, W)`` uint8; 0 is no fruit, k is fruit k - 1.
        semantic: ``(H, W)`` uint8; 0 sky, 1 grass, 2 apple, 3 pear, 4 orange.
        labels: ``(N,)`` int64, species of each fruit: 0 apple, 1 pear, 2 orange.
    """

    image: NDArray[np.uint8]
    segments: NDArray[np.uint8]
    semantic: NDArray[np.uint8]
    labels: NDArray[np.int64]


def draw_scene(*, seed: int, split: int, index: int, size: tuple[int, int]) -> Scene:
    """Draw image ``index`` of a split; the same arguments give the same bytes on every machine.

    Args:
        seed: of the dataset.
        split: a number per split, so that splits never share a scene.
        index: of the image in its split.
        size: (height, width) in pixels.
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, split, index])))
    horizon = uniform(rng, 0.18, 0.45)
    fruits = plan_fruits(rng, horizon)
    light = _light_direction(rng)
    canvas, skyline = _background(rng, horizon, size)
    for _ in range(int(rng.integers(4, 10))):
        _decorate(rng, canvas, horizon)
    segments, labels = paint_fruits(fruits, canvas, skyline, light)
    semantic = np.concatenate([np.array([1], np.uint8), (labels + 2).astype(np.uint8)])[segments]
    semantic[(segments == 0) & (skyline > 0.5)] = 0
    return Scene(image=_expose(rng, canvas), segments=segments, semantic=semantic, labels=labels)


def plan_fruits(rng: np.random.Generator, horizon: float) -> list[Fruit]:
    """Choose the fruit of a scene, farthest first; nearer fruit (lower in the image) hides what is behind it."""
    if rng.random() < EMPTY_SHARE:
        return []
    count = 1 + pick(rng, _COUNTS)
    fruits: list[Fruit] = []
    for _ in range(count):
        for _ in range(8):  # look for a place where little is hidden; a crowded scene goes without
            share = rng.random()
            radius = _SMALLEST + (_LARGEST - _SMALLEST) * share * share  # small fruit is the more common
            x = uniform(rng, 0.04, 0.96)
            y = uniform(rng, max(horizon - 0.2 * radius, radius), 0.97)
            if all(_clear(x - other.x, y - other.y, radius, other.radius) for other in fruits):
                fruits.append(plan_fruit(rng, species=int(rng.integers(3)), x=x, y=y, radius=radius))
                break
    return sorted(fruits, key=lambda fruit: fruit.y + fruit.radius)


def _clear(dx: float, dy: float, first: float, second: float) -> bool:
    """Whether two circles overlap only in part: their centres are further apart than 0.55 of the sum of radii."""
    reach = 0.55 * (first + second)
    return dx * dx + dy * dy > reach * reach


def _light_direction(rng: np.random.Generator) -> tuple[float, float, float]:
    x, y, z = uniform(rng, -0.7, 0.7), uniform(rng, -0.8, -0.3), uniform(rng, 0.5, 0.9)
    norm = math.sqrt(x * x + y * y + z * z)
    return x / norm, y / norm, z / norm


def paint_fruits(
    fruits: list[Fruit], canvas: Floats, skyline: Floats, light: tuple[float, float, float]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Lay the fruit on the canvas, in place; returns segments and labels of what can be seen.

    Nearest first it is found out which fruit shows enough, then those are painted farthest first.
    """
    height, width = canvas.shape[1:]
    taken = np.zeros((height, width), bool)
    shown = []
    for fruit in reversed(fruits):
        radius, top, left, side, centre = window(fruit, height, width)
        colour, alpha = draw_fruit(fruit, radius=radius, centre=centre, size=side, light=light)
        place, part = _clip(top, left, side, height, width)
        mask, occupied = alpha[part] >= 0.5, taken[place]
        if (mask & ~occupied).sum() >= max(MIN_VISIBLE * (alpha >= 0.5).sum(), 1):
            occupied |= mask
            shown.append((fruit, radius, place, colour[(slice(None), *part)], alpha[part], mask))
    segments = np.zeros((height, width), np.uint8)
    for number, (fruit, radius, place, colour, alpha, mask) in enumerate(reversed(shown), start=1):
        _shadow(canvas, skyline, fruit, radius, light)
        below = canvas[(slice(None), *place)]
        below += (colour - below) * alpha
        segments[place][mask] = number
    return segments, np.array([item[0].species for item in reversed(shown)], np.int64)


def _clip(top: int, left: int, side: int, height: int, width: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Return the part of a window that lies in the image, as slices of the image and of the window."""
    y0, y1, x0, x1 = max(top, 0), min(top + side, height), max(left, 0), min(left + side, width)
    y1, x1 = max(y0, y1), max(x0, x1)
    return (slice(y0, y1), slice(x0, x1)), (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))


def _shadow(canvas: Floats, skyline: Floats, fruit: Fruit, radius: float, light: tuple[float, float, float]) -> None:
    """Darken the grass below a fruit, away from the light."""
    height, width = canvas.shape[1:]
    y, x = fruit.y * height + 0.82 * radius, fruit.x * width - 0.5 * light[0] * radius
    half = math.ceil(1.25 * radius) + 1
    place, _ = _clip(math.floor(y) - half, math.floor(x) - half, 2 * half + 1, height, width)
    rows = (np.arange(place[0].start, place[0].stop, dtype=np.float32) + 0.5 - y) / np.float32(0.42 * radius)
    columns = (np.arange(place[1].start, place[1].stop, dtype=np.float32) + 0.5 - x) / np.float32(1.2 * radius)
    dark = 0.6 * np.clip(1 - (rows * rows)[:, None] - (columns * columns)[None], 0, 1) * (1 - skyline[place])
    canvas[(slice(None), *place)] *= 1 - dark


def _background(rng: np.random.Generator, horizon: float, size: tuple[int, int]) -> tuple[Floats, Floats]:
    """Return sky over grass ``(3, H, W)`` and the share of sky ``(H, W)`` in each pixel."""
    height, width = size
    rows = (np.arange(height, dtype=np.float32) + 0.5) / np.float32(height)
    columns = (np.arange(width, dtype=np.float32) + 0.5) / np.float32(width)
    hills = _noise(rng, (1, 6), np.zeros(1, np.float32), columns * 5)[0] - 0.5
    line = horizon + 0.07 * hills  # (W,)
    skyline = cover((rows[:, None] - line[None]), height)
    last_sky, first_grass = math.ceil((horizon + 0.05) * height), math.floor((horizon - 0.05) * height)
    sky = _sky(rng, rows[:last_sky] / np.float32(horizon), columns)
    grass = _grass(rng, np.maximum(rows[first_grass:] - horizon, 0) / (1 - horizon), columns)
    canvas = np.empty((3, height, width), np.float32)
    canvas[:, :last_sky] = sky
    share = skyline[first_grass:last_sky]
    blend = grass[:, : last_sky - first_grass]
    canvas[:, last_sky:] = grass[:, last_sky - first_grass :]
    band = canvas[:, first_grass:last_sky]
    band += (blend - band) * (1 - share)
    return canvas, skyline


def _sky(rng: np.random.Generator, rows: Floats, columns: Floats) -> Floats:
    """Draw a gradient with clouds; ``rows`` run from 0 at the top to 1 at the horizon."""
    warm = rng.random() < 0.25  # morning and evening
    above = hsv(uniform(rng, 0.54, 0.62), uniform(rng, 0.25, 0.65), uniform(rng, 0.70, 0.98)).reshape(3, 1, 1)
    below = hsv(uniform(rng, 0.06, 0.13) if warm else uniform(rng, 0.50, 0.58), uniform(rng, 0.08, 0.3), 0.95)
    colour = above + (below.reshape(3, 1, 1) - above) * rows[None, :, None]
    puffs = _noise(rng, (5, 6), rows * 3.5, columns * 5) + 0.5 * _noise(rng, (9, 14), rows * 7, columns * 13)
    clouds = np.clip((puffs - uniform(rng, 0.7, 1.2)) * 2.2, 0, 0.9)
    white = hsv(uniform(rng, 0.0, 1.0), 0.03, uniform(rng, 0.85, 1.0)).reshape(3, 1, 1)
    return colour + (white - colour) * clouds


def _grass(rng: np.random.Generator, rows: Floats, columns: Floats) -> Floats:
    """Draw a meadow; ``rows`` run from 0 at the horizon to 1 at the lower border, and blades grow towards it."""
    base = hsv(uniform(rng, 0.18, 0.34), uniform(rng, 0.40, 0.65), uniform(rng, 0.48, 0.72)).reshape(3, 1, 1)
    dry = hsv(uniform(rng, 0.10, 0.20), uniform(rng, 0.30, 0.60), uniform(rng, 0.56, 0.78)).reshape(3, 1, 1)
    depth = rows * 1.4 / (rows + 0.4)  # lattice rows crowd towards the horizon
    patches = _noise(rng, (7, 8), depth * 5, columns * 7)
    blades = _noise(rng, (32, 72), depth * 30, columns * 70)
    colour = base + (dry - base) * (0.6 * patches)
    return colour * (0.72 + 0.2 * patches + 0.36 * blades)


def _noise(rng: np.random.Generator, shape: tuple[int, int], rows: Floats, columns: Floats) -> Floats:
    """Return smooth noise in [0, 1): random values on a lattice of ``shape``, read at ``rows`` x ``columns``."""
    lattice = rng.integers(0, 256, size=shape, dtype=np.uint8).astype(np.float32) / 256
    left, across = _steps(columns, shape[1])
    wide = lattice[:, left]
    wide += (lattice[:, np.minimum(left + 1, shape[1] - 1)] - wide) * across  # (rows of the lattice, W)
    top, down = _steps(rows, shape[0])
    out = wide[top]
    out += (wide[np.minimum(top + 1, shape[0] - 1)] - out) * down[:, None]
    return out


def _steps(at: Floats, count: int) -> tuple[NDArray[np.intp], Floats]:
    """Split lattice coordinates into the node before and a smooth share of the way to the next."""
    node = np.minimum(np.floor(at), count - 1)
    share = at - node
    return node.astype(np.intp), share * share * (3 - 2 * share)


def _decorate(rng: np.random.Generator, canvas: Floats, horizon: float) -> None:
    """Draw one thing in the grass that is not fruit, in place: a tuft, a flower, a fallen leaf or a stone."""
    height, width = canvas.shape[1:]
    kind = rng.random()
    y, x, share = uniform(rng, horizon + 0.06, 1.0), rng.random(), rng.random()
    cos, sin = random_turn(rng, upright=kind < 0.4)
    scale = (0.05 if kind < 0.4 else 0.022 if kind < 0.7 else 0.05 if kind < 0.9 else 0.045) * (0.6 + 0.6 * share)
    radius = scale * min(height, width)
    half = math.ceil(1.1 * radius) + 1
    place, _ = _clip(math.floor(y * height) - half, math.floor(x * width) - half, 2 * half + 1, height, width)
    row = (np.arange(place[0].start, place[0].stop, dtype=np.float32) + 0.5 - y * height) / np.float32(radius)
    column = (np.arange(place[1].start, place[1].stop, dtype=np.float32) + 0.5 - x * width) / np.float32(radius)
    u, v = cos * column[None] + sin * row[:, None], cos * row[:, None] - sin * column[None]
    if kind < 0.4:  # three blades from one root
        blades = [lens(v + (0.2 * lean * u), u - lean * (0.5 - 0.5 * v), 1.0, 0.16) for lean in (-0.7, 0.0, 0.7)]
        distance, colour = (
            np.minimum(np.minimum(blades[0], blades[1]), blades[2]),
            hsv(uniform(rng, 0.2, 0.32), 0.6, 0.5),
        )
    elif kind < 0.7:  # a flower: four petals
        distance = np.sqrt(u * u + v * v) - (0.55 + 0.45 * np.abs(u * u - v * v) / (u * u + v * v + 1e-3))
        colour = hsv(rng.random(), uniform(rng, 0.0, 0.6), 0.95)
    elif kind < 0.9:  # a leaf in any colour that fruit has
        distance, colour = (
            lens(u, v, 1.0, 0.42),
            hsv(uniform(rng, 0.0, 0.3), uniform(rng, 0.4, 0.8), uniform(rng, 0.4, 0.8)),
        )
    else:  # a stone
        distance, colour = np.sqrt(u * u + 2 * v * v) - np.float32(0.95), hsv(0.1, 0.1, uniform(rng, 0.4, 0.7))
    below = canvas[(slice(None), *place)]
    shade = 1.1 - 0.35 * (row[:, None] + 0.3 * column[None])
    below += (colour.reshape(3, 1, 1) * shade - below) * cover(distance, radius)


def _expose(rng: np.random.Generator, canvas: Floats) -> NDArray[np.uint8]:
    """Apply the light of the day, the colour cast and the noise of a camera; returns uint8."""
    gain = uniform(rng, 0.78, 1.08)
    tint = np.array([gain * uniform(rng, 0.94, 1.06) for _ in range(3)], np.float32).reshape(3, 1, 1)
    strength = uniform(rng, 0.0, 10.0)
    grain = rng.integers(0, 256, size=(2, *canvas.shape[1:]), dtype=np.uint8).astype(np.float32)
    grain = (grain[0] + grain[1]) * (strength / 256) + (0.5 - strength * 0.998)  # triangular, mean 0; 0.5 to round
    image: NDArray[np.uint8] = np.clip(canvas * tint + grain, 0, 255).astype(np.uint8)
    return image
