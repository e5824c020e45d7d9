"""Captioned scenes: one to three objects on a plain background, rendered with their graph, captions and questions.

Every scene is a function of (seed, index) alone. Its graph is the truth that its captions describe and that
multiple-choice questions about a generated image are marked against (`ldm_jax.evals.faithfulness`).
Some pairs of kind and colour, `HELD_OUT`, never occur in the split that models are trained on, so that prompts
which name them measure whether attributes are combined or only remembered.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from ldm_jax.data.sources import Item
from ldm_jax.settings.ranges import check_seed

SIDE = 64  # pixels
RENDERER = 1  # goes up with every change of what a scene looks like or is called
KINDS = ("circle", "square", "triangle", "diamond", "cross", "ring")
COLOURS = {
    "red": (214, 39, 40),
    "orange": (255, 140, 20),
    "yellow": (250, 220, 60),
    "green": (50, 170, 70),
    "cyan": (60, 205, 220),
    "blue": (45, 85, 225),
    "purple": (140, 65, 190),
    "pink": (250, 140, 190),
}
SIZES = {"small": 6.5, "large": 10.5}  # radius in pixels
TEXTURES = ("plain", "striped", "dotted")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
BACKGROUNDS = {"white": 245, "gray": 128, "black": 12, "beige": (226, 206, 170)}
# What can be asked of one object, with its possible answers, in the order of the reader's outputs.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "presence": ("absent", "present"),
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "texture": TEXTURES,
    "row": ROWS,
    "column": COLUMNS,
}
HELD_OUT = frozenset(
    (kind, colour)
    for k, kind in enumerate(KINDS)
    for c, colour in enumerate(COLOURS)
    if (2 * k + c) % len(COLOURS) == 0
)
SPLITS = ("train", "held_out", "all")
PRESETS = {"simple": (1, 1), "full": (1, 3)}  # fewest and most objects

Row = Float[np.ndarray, "1 columns"]
Column = Float[np.ndarray, "rows 1"]

_CELL = (12.5, 32.0, 51.5)  # centre of a row or column, in pixels
_JITTER = 1.5  # of the position, in pixels
_SHADE = 0.55  # what a stripe or a dot keeps of the object's colour


class Thing(NamedTuple):
    """One object: named attributes, and where exactly it is drawn."""

    kind: str
    colour: str
    size: str
    texture: str
    row: str
    column: str
    x: float
    y: float
    radius: float

    @property
    def held_out(self) -> bool:
        """Whether its kind and colour never occur together in training."""
        return (self.kind, self.colour) in HELD_OUT


class Scene(NamedTuple):
    """A scene graph; no two of its things are of one kind, so that a kind names a thing."""

    background: str
    things: tuple[Thing, ...]


def draw_scene(preset: str, split: str, seed: int, index: int) -> Scene:
    """The scene at (seed, index).

    Args:
      preset: a row of `PRESETS`, which bounds the number of objects.
      split: "train" has no held-out pair of kind and colour, "held_out" has at least one, "all" is unrestricted.
      seed, index: which scene; any two differ independently.
    """
    # A counter-based generator costs a tenth of a SeedSequence, and (seed, index) is its very key.
    u = iter(np.random.Generator(np.random.Philox(key=[seed, index])).random(40).tolist())
    fewest, most = PRESETS[preset]
    count = fewest + int(next(u) * (most - fewest + 1))
    background = _pick(tuple(BACKGROUNDS), next(u))
    kinds = _distinct(KINDS, count, u)
    cells = _distinct(tuple((r, c) for r in range(3) for c in range(3)), count, u)
    things = [
        _draw_thing(kind, cell, split, number == 0, u)
        for number, (kind, cell) in enumerate(zip(kinds, cells, strict=True))
    ]
    return Scene(background, tuple(things))


def _draw_thing(
    kind: str, cell: tuple[int, int], split: str, first: bool, u: Iterator[float]
) -> Thing:
    colours = tuple(COLOURS)
    if split == "train":
        colours = tuple(c for c in colours if (kind, c) not in HELD_OUT)
    elif split == "held_out" and first:
        colours = tuple(c for c in colours if (kind, c) in HELD_OUT)
    colour, size = _pick(colours, next(u)), _pick(tuple(SIZES), next(u))
    texture = _pick(TEXTURES, next(u))
    x, y = (_CELL[cell[axis]] + _JITTER * (2 * next(u) - 1) for axis in (1, 0))
    radius = SIZES[size] * (0.95 + 0.1 * next(u))
    return Thing(kind, colour, size, texture, ROWS[cell[0]], COLUMNS[cell[1]], x, y, radius)


def _pick(values: tuple, u: float) -> Any:
    return values[int(u * len(values))]


def _distinct(values: tuple, count: int, u: Iterator[float]) -> list:
    left = list(values)
    return [left.pop(int(next(u) * len(left))) for _ in range(count)]


def render(scene: Scene) -> UInt8[np.ndarray, "64 64 3"]:
    """Draws a scene, antialiased: an edge covers a pixel by its signed distance to the pixel's centre."""
    image = np.empty((SIDE, SIDE, 3), np.float32)
    image[:] = BACKGROUNDS[scene.background]
    for thing in scene.things:
        _paint(image, thing)
    return (image + 0.5).astype(np.uint8)


def _paint(image: Float[np.ndarray, "64 64 3"], thing: Thing) -> None:
    left, top = (max(0, int(centre - thing.radius - 2)) for centre in (thing.x, thing.y))
    right, bottom = (min(SIDE, int(centre + thing.radius + 3)) for centre in (thing.x, thing.y))
    u = np.arange(left, right, dtype=np.float32)[None, :] + (0.5 - thing.x)
    v = np.arange(top, bottom, dtype=np.float32)[:, None] + (0.5 - thing.y)
    coverage = np.clip(0.5 - _distance(thing.kind, u, v, thing.radius), 0, 1)[:, :, None]
    colour = np.asarray(COLOURS[thing.colour], np.float32) * _shade(thing.texture, u, v)
    window = image[top:bottom, left:right]
    window += coverage * (colour - window)


def _distance(kind: str, u: Row, v: Column, r: float) -> Float[np.ndarray, "rows columns"]:
    """Signed distance in pixels to the outline of a kind of radius r, negative inside."""
    x, y = np.abs(u), np.abs(v)
    if kind == "circle":
        return np.sqrt(u * u + v * v) - r
    if kind == "ring":
        return np.abs(np.sqrt(u * u + v * v) - 0.7 * r) - 0.3 * r
    if kind == "square":
        return np.maximum(x, y) - 0.85 * r
    if kind == "diamond":
        return (x + y - 1.15 * r) * 0.7071
    if kind == "triangle":  # apex up: rows count downwards
        return np.maximum(v - 0.65 * r, 0.866 * x - 0.5 * v - 0.55 * r)
    bar, length = 0.36 * r, r
    return np.minimum(
        np.maximum(x - bar, y - length), np.maximum(x - length, y - bar)
    )  # a cross is the union of two bars


def _shade(texture: str, u: Row, v: Column) -> Float[np.ndarray, "_ _ 1"]:
    """How much of its colour each pixel of an object keeps."""
    if texture == "plain":
        return np.ones((1, 1, 1), np.float32)
    if texture == "striped":
        wave = np.abs((v / 6.0 + 0.25) % 1.0 - 0.5) * 6.0 - 1.5  # bands of 3 pixels
        wave = np.broadcast_to(wave, (v.shape[0], u.shape[1]))
    else:
        near = [np.abs((axis / 6.0 + 0.5) % 1.0 - 0.5) * 6.0 for axis in (u, v)]
        wave = np.sqrt(near[0] ** 2 + near[1] ** 2) - 1.9  # dots of 3.8 pixels, 6 apart
    return (1 - (1 - _SHADE) * np.clip(0.5 - wave, 0, 1))[:, :, None]


def place(thing: Thing) -> str:
    """Where a thing is, in words: "top left", "left", "center"."""
    if thing.row == "middle":
        return thing.column
    return thing.row if thing.column == "center" else f"{thing.row} {thing.column}"


def relations(scene: Scene) -> list[tuple[Thing, str, Thing]]:
    """(a, "left of" or "above", b) for every pair that stands in another column or row."""
    found = []
    for i, a in enumerate(scene.things):
        for b in scene.things[i + 1 :]:
            for axis, values, word in (("column", COLUMNS, "left of"), ("row", ROWS, "above")):
                first, second = (values.index(getattr(thing, axis)) for thing in (a, b))
                if first != second:
                    found.append((a, word, b) if first < second else (b, word, a))
    return found


def captions(scene: Scene) -> tuple[str, ...]:
    """A dense caption (names every attribute, and a relation), a terse one (kinds and colours), three paraphrases."""
    return (
        _dense(scene),
        " and ".join(f"{_article(t.colour)} {t.kind}" for t in scene.things),
        *(_paraphrase(scene, style) for style in range(len(_STYLES))),
    )


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _dense(scene: Scene) -> str:
    things = " and ".join(
        f"a {t.size} {t.texture} {t.colour} {t.kind} at the {place(t)}" for t in scene.things
    )
    related = "".join(
        f", the {a.kind} is {word} the {b.kind}" for a, word, b in relations(scene)[:1]
    )
    return f"{things} on a {scene.background} background{related}"


class _Style(NamedTuple):
    thing: str
    whole: str
    size: dict[str, str]
    texture: dict[str, str]


_STYLES = (
    _Style(
        "one {size} {colour} {kind} {texture} at the {place}",
        "{background} background with {things}",
        {"small": "little", "large": "big"},
        {"plain": "in one tone", "striped": "with stripes", "dotted": "with dots"},
    ),
    _Style(
        "a {texture} {kind} at the {place} that is {colour} and {size}",
        "a picture of {things}, the background is {background}",
        {"small": "small", "large": "large"},
        {"plain": "plain", "striped": "striped", "dotted": "dotted"},
    ),
    _Style(
        "{place}: {size} {kind}, {colour}, {texture}",
        "{things}; {background} background",
        {"small": "tiny", "large": "huge"},
        {"plain": "solid", "striped": "stripes", "dotted": "spots"},
    ),
)


def _paraphrase(scene: Scene, style: int) -> str:
    row = _STYLES[style]
    # Every other style also names the objects in the other order.
    ordered = scene.things[::-1] if style % 2 else scene.things
    things = " and ".join(
        row.thing.format(
            size=row.size[t.size],
            texture=row.texture[t.texture],
            colour=t.colour,
            kind=t.kind,
            place=place(t),
        )
        for t in ordered
    )
    return row.whole.format(things=things, background=scene.background)


@dataclasses.dataclass(frozen=True)
class Scenes:
    """Rendered scenes as a source: `scenes:simple?count=20000&seed=0&split=train`.

    Attributes:
      preset: "simple" (one object) or "full" (one to three).
      count: number of scenes.
      seed: which scenes.
      split: "train", "held_out" or "all" (see `draw_scene`).
    """

    preset: str = "simple"
    count: int = 20_000
    seed: int = 0
    split: str = "train"

    def __post_init__(self) -> None:
        for name, allowed in (("preset", tuple(PRESETS)), ("split", SPLITS)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"scenes: {name} {getattr(self, name)!r} is not one of {', '.join(allowed)}"
                )
        check_seed(self.seed, "scenes: seed")
        if self.count < 1:
            raise ValueError(f"scenes: count is {self.count}; it is at least 1")

    @property
    def identity(self) -> str:
        """What makes the same scenes look the same: the renderer's version."""
        return f"renderer {RENDERER}"

    def __len__(self) -> int:
        return self.count

    def scene(self, index: int) -> Scene:
        """The graph of the scene at `index`."""
        return draw_scene(self.preset, self.split, self.seed, index)

    def __getitem__(self, index: int) -> Item:
        scene = self.scene(index)
        key = f"{self.preset}-{self.split}-{self.seed}-{index}"
        return Item(key, render(scene), captions(scene))
