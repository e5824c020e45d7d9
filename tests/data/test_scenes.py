"""Scenes against geometry, and captions against the graphs that they describe."""

import itertools
import re

import numpy as np
import pytest

from ldm_jax.data import open_source
from ldm_jax.data.scenes import (
    BACKGROUNDS,
    COLOURS,
    COLUMNS,
    HELD_OUT,
    KINDS,
    ROWS,
    SIZES,
    TEXTURES,
    Scene,
    Scenes,
    Thing,
    captions,
    draw_scene,
    relations,
    render,
)

# Area of each kind by its radius: the closed forms of its outline.
AREAS = {
    "circle": lambda r: np.pi * r**2,
    "ring": lambda r: np.pi * ((1.0 * r) ** 2 - (0.4 * r) ** 2),
    "square": lambda r: (1.7 * r) ** 2,
    "diamond": lambda r: 2 * (1.15 * r) ** 2,
    # Two sides with normals (0.866, -0.5) at distance 0.55 r and a base at 0.65 r: equilateral, height 1.75 r.
    "triangle": lambda r: (1.75 * r) ** 2 / np.sqrt(3),
    "cross": lambda r: 4 * 0.36 * r * 2 * r - (0.72 * r) ** 2,
}


def one(kind: str, texture: str = "plain", radius: float = 10.5, x: float = 31.3) -> Scene:
    return Scene(
        "black", (Thing(kind, "red", "large", texture, "middle", "center", x, 32.6, radius),)
    )


def coverage(scene: Scene) -> np.ndarray:
    """How much of each pixel is not background, from the red channel of a red thing on black."""
    background, red = BACKGROUNDS["black"], COLOURS["red"][0]
    return (render(scene)[:, :, 0].astype(float) - background) / (red - background)


@pytest.mark.parametrize("kind", KINDS)
def test_area_is_that_of_the_outline(kind):
    for radius in (6.5, 10.5):
        np.testing.assert_allclose(
            coverage(one(kind, radius=radius)).sum(), AREAS[kind](radius), rtol=0.03
        )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "triangle"])
def test_centroid_is_where_the_graph_says(kind):
    share = coverage(one(kind))
    rows, columns = np.mgrid[:64, :64] + 0.5
    assert abs((share * columns).sum() / share.sum() - 31.3) < 0.05
    assert abs((share * rows).sum() / share.sum() - 32.6) < 0.05


def test_moving_by_a_pixel_moves_the_picture_by_a_pixel():
    for kind, texture in itertools.product(KINDS, TEXTURES):
        moved = render(one(kind, texture, x=32.3))
        np.testing.assert_allclose(
            moved[:, 1:].astype(int), render(one(kind, texture))[:, :-1], atol=1
        )


@pytest.mark.parametrize("texture", ["striped", "dotted"])
def test_a_texture_darkens_part_of_the_object_only(texture):
    share = coverage(one("square", texture))[26:38, 26:38]
    assert share.max() > 0.95
    assert 0.5 < share.min() < 0.6
    assert 0.6 < share.mean() < 0.95


def test_a_scene_is_a_function_of_seed_and_index():
    assert draw_scene("full", "all", 3, 7) == draw_scene("full", "all", 3, 7)
    scenes = [draw_scene("full", "all", seed, index) for seed in (3, 4) for index in range(50)]
    assert len(set(scenes)) == 100


def test_held_out_pairs_never_occur_in_training_and_always_in_their_split():
    for preset in ("simple", "full"):
        train, held_out = (
            [draw_scene(preset, split, 0, index) for index in range(500)]
            for split in ("train", "held_out")
        )
        assert not any(thing.held_out for scene in train for thing in scene.things)
        assert all(any(thing.held_out for thing in scene.things) for scene in held_out)


def test_every_kind_and_colour_of_a_held_out_pair_is_trained_apart():
    pairs = {
        (t.kind, t.colour) for i in range(2000) for t in draw_scene("simple", "train", 0, i).things
    }
    assert pairs == set(itertools.product(KINDS, COLOURS)) - HELD_OUT
    assert {kind for kind, _ in HELD_OUT} == set(KINDS)


def test_presets_bound_the_number_of_objects():
    counts = {
        preset: {len(draw_scene(preset, "all", 0, i).things) for i in range(200)}
        for preset in ("simple", "full")
    }
    assert counts == {"simple": {1}, "full": {1, 2, 3}}


def test_things_have_kinds_and_places_of_their_own_inside_the_picture():
    for index in range(300):
        things = draw_scene("full", "all", 5, index).things
        assert (
            len({t.kind for t in things}) == len({(t.row, t.column) for t in things}) == len(things)
        )
        for t in things:
            assert COLUMNS[int(t.x // (64 / 3))] == t.column
            assert ROWS[int(t.y // (64 / 3))] == t.row
            assert abs(t.radius / SIZES[t.size] - 1) <= 0.05


def parse(dense: str) -> tuple[str, list[tuple[str, ...]]]:
    """The graph that a dense caption tells, by its grammar alone."""
    body, background = re.fullmatch(r"(.*) on a (\w+) background(?:, the .*)?", dense).groups()
    pattern = r"a (\w+) (\w+) (\w+) (\w+) at the ((?:top|bottom)?(?: ?(?:left|right))?|center)"
    return background, [re.fullmatch(pattern, part).groups() for part in body.split(" and ")]


def test_the_dense_caption_tells_the_whole_graph():
    for index in range(300):
        scene = draw_scene("full", "all", 9, index)
        background, told = parse(captions(scene)[0])
        assert background == scene.background
        assert [row[:4] for row in told] == [
            (t.size, t.texture, t.colour, t.kind) for t in scene.things
        ]
        for row, thing in zip(told, scene.things, strict=True):
            words = set(row[4].split())
            named = {thing.row, thing.column} - {"middle", "center"}
            assert words == (named or {"center"})


def test_every_caption_names_kinds_and_colours_and_no_others():
    for index in range(100):
        scene = draw_scene("full", "all", 2, index)
        for caption in captions(scene):
            words = re.findall(r"\w+", caption)
            assert set(words) & set(KINDS) == {t.kind for t in scene.things}
            assert set(words) & set(COLOURS) == {t.colour for t in scene.things}


def test_relations_agree_with_the_coordinates():
    for index in range(200):
        for a, word, b in relations(draw_scene("full", "all", 1, index)):
            assert (a.x < b.x) if word == "left of" else (a.y < b.y)


def test_scenes_are_a_source():
    source = open_source("scenes:full?count=5&seed=3&split=held_out")
    assert source == Scenes("full", 5, 3, "held_out")
    assert len(source) == 5
    item = source[4]
    assert item.image.shape == (64, 64, 3)
    assert item.captions == captions(source.scene(4))


@pytest.mark.parametrize("spec", ["scenes:medium", "scenes:simple?split=test"])
def test_an_unknown_preset_or_split_is_refused_with_what_there_is(spec):
    with pytest.raises(ValueError, match=r"is not one of .*(simple, full|train, held_out, all)"):
        open_source(spec)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64])
def test_a_seed_out_of_range_is_refused_where_a_source_is_opened(seed):
    with pytest.raises(ValueError, match=f"scenes: seed is {seed}; it is from 0 to 4294967295"):
        open_source(f"scenes:simple?seed={seed}")
