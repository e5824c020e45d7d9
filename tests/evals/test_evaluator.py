"""The evaluator with a model whose images are known: what a prompt's number and noise make of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.data.scenes import draw_scene
from ldm_jax.diffusion import DDIM, DDPM, RectifiedFlow, grid, velocity
from ldm_jax.diffusion.grids import Even
from ldm_jax.evals.evaluator import Evaluator, View, Viewer, rebatched
from ldm_jax.evals.generation import make_generate
from ldm_jax.evals.image_grids import image_grid
from ldm_jax.evals.prompts import HELD_OUT, SEEN, read_prompts
from ldm_jax.metrics.resize import rounded, to_images
from ldm_jax.parallel import MeshConfig, make_mesh
from ldm_jax.types import Cond

COUNT = 13  # no batch divides it
TOKENS = np.stack([np.arange(COUNT), np.ones(COUNT)], 1).astype(np.int32)


class Sums:
    """Features that are easy to check: sums of the images, with the prompt's first token."""

    preprocessing = "none"

    def features(self, params, images, read):
        return {"sum": params * images.sum((1, 2, 3)), "token": read[:, 0]}


def apply(params, x, told, context):
    """A network that leans towards its prompt's first token."""
    return x - params * context.tokens[:, :1, :1, None] * jnp.ones_like(x)


def generate(sampler=DDIM()):
    return make_generate(
        apply,
        lambda params, cond: cond,
        lambda frozen, tokens: Cond(tokens[:, :, None] / 10.0),
        lambda frozen, latents: jnp.tile(latents[..., :1], (1, 1, 1, 3)),
        prediction=velocity,
        grid=grid(RectifiedFlow(), Even(), 4),
        sampler=sampler,
        shape=(2, 2, 4),
        finish=rounded,
    )


def viewer(batch: int, devices: int) -> Viewer:
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    return Viewer({"sum": View(Sums(), "scale", TOKENS)}, mesh=mesh, batch=batch)


def evaluator(batch: int, devices: int, sampler=DDIM()) -> Evaluator:
    return Evaluator(
        generate(sampler),
        viewer(batch, devices),
        tokens=TOKENS,
        negative=np.zeros((1, 2), np.int32),
        key=jax.random.key(3),
    )


FROZEN = {"scale": jnp.float32(2.0)}


@pytest.mark.parametrize("sampler", [DDIM(), DDPM()], ids=["ddim", "ddpm"])
@pytest.mark.parametrize(("batch", "devices"), [(4, 2), (8, 8), (16, 4)])
def test_images_and_scores_depend_neither_on_the_batch_nor_on_the_devices(batch, devices, sampler):
    one = evaluator(1, 1, sampler)(jnp.float32(0.5), FROZEN, 3.0)
    other = evaluator(batch, devices, sampler)(jnp.float32(0.5), FROZEN, 3.0)
    np.testing.assert_array_equal(other.images, one.images)
    np.testing.assert_array_equal(other.features["sum"]["token"], np.arange(COUNT))
    np.testing.assert_allclose(other.features["sum"]["sum"], one.features["sum"]["sum"], atol=1e-5)


def test_features_of_given_images_are_those_of_the_same_images_drawn():
    drawn = evaluator(8, 4)(jnp.float32(0.5), FROZEN, 3.0)
    seen = viewer(8, 4)(FROZEN, np.split(np.asarray(to_images(drawn.images)), [1, 4, 12]))
    np.testing.assert_array_equal(seen["sum"]["sum"], drawn.features["sum"]["sum"])


def test_an_image_that_is_nan_has_features_that_are():
    drawn = evaluator(8, 4)(jnp.float32(np.nan), FROZEN, 3.0)
    assert drawn.images.dtype == np.uint8 and np.isnan(drawn.features["sum"]["sum"]).all()


def test_an_evaluation_continues_at_any_prompt():
    arguments = jnp.float32(0.5), FROZEN, 3.0
    whole = evaluator(4, 1)(*arguments, kept=COUNT)
    for start in (0, 4, 5, 12):
        parts = list(evaluator(4, 2).parts(*arguments, start=start, kept=9))
        assert [first for first, _ in parts] == list(range(start, COUNT, 4))
        found = np.concatenate([part.features["sum"]["sum"] for _, part in parts])
        np.testing.assert_allclose(found, whole.features["sum"]["sum"][start:], atol=1e-5)
        images = [part.images for _, part in parts if part.images is not None]
        assert sum(map(len, images)) == max(0, 9 - start)


def test_images_drawn_again_are_the_same():
    arguments = jnp.float32(0.5), FROZEN, 3.0
    whole = evaluator(4, 1)(*arguments).images
    again = evaluator(4, 2).images_of(*arguments, [7, 0, 12, 3, 3])
    np.testing.assert_array_equal(again, whole[[7, 0, 12, 3, 3]])


def test_another_seed_is_other_noise_and_compiles_nothing():
    evaluate = evaluator(8, 1)
    first, second = (evaluate(jnp.float32(0.5), FROZEN, 1.0, seed=seed) for seed in (0, 1))
    assert (first.images != second.images).any()
    assert evaluate._draw.__wrapped__._cache_size() == 1


def test_parts_of_any_size_become_batches_in_the_same_order():
    rows = np.arange(23.0)[:, None, None, None] * np.ones((1, 1, 1, 3))
    for cuts in ([], [1], [5, 6, 20], [0, 0, 23]):
        batches = list(rebatched(np.split(rows, cuts), 4))
        assert list(map(len, batches)) == [4, 4, 4, 4, 4, 3]
        np.testing.assert_array_equal(np.concatenate(batches), rows)


def test_another_guidance_compiles_nothing_and_changes_the_images():
    evaluate = evaluator(8, 1)
    first = evaluate(jnp.float32(0.5), FROZEN, 1.0)
    second = evaluate(jnp.float32(0.5), FROZEN, 4.0)
    assert evaluate._draw.__wrapped__._cache_size() == 1
    assert (first.images != second.images).any()


def no_data(count):
    raise AssertionError("nobody asked for the captions of the data")


def test_prompts_of_scenes_are_half_seen_and_half_held_out():
    prompts = read_prompts("scenes:full?count=40", no_data)
    assert prompts.groups == (SEEN, HELD_OUT) * 20
    for group, scene in zip(prompts.groups, prompts.scenes, strict=True):
        assert any(thing.held_out for thing in scene.things) == (group == HELD_OUT)


def test_prompts_of_a_file_are_its_lines(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\n\n  a café \n", encoding="utf-8")
    assert read_prompts(f"file:{path}", no_data).texts == ("a red circle", "a café")
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(f"file:{path}", no_data)


def test_prompts_may_be_captions_of_the_data():
    captions = ["a dog", "a cat", "a bird"]
    prompts = read_prompts("captions:2", lambda count: captions[:count])
    assert (prompts.texts, prompts.groups, prompts.scenes) == (("a dog", "a cat"), ("", ""), ())


@pytest.mark.parametrize(
    "spec", ["prompts.txt", "captions:", "captions:0", "captions:-1", "captions:x"]
)
def test_prompts_that_cannot_be_are_refused_with_what_is_allowed(spec):
    with pytest.raises(
        ValueError, match=f"{spec}.*allowed are captions:COUNT, file:PATH and scenes"
    ):
        read_prompts(spec, no_data)


def test_a_grid_holds_every_image_in_reading_order_on_white():
    images = np.stack([np.full((4, 5, 3), value, np.uint8) for value in (0, 128, 250)])
    grid = image_grid(images, columns=2, gap=1)
    assert grid.shape == (2 * 5 + 1, 2 * 6 + 1, 3)
    assert [grid[2, 2, 0], grid[2, 8, 0], grid[7, 2, 0], grid[7, 8, 0]] == [0, 128, 250, 255]


def test_prompts_of_scenes_are_those_that_were_asked_for():
    usual, zero = (read_prompts(f"scenes:full?count=8{seed}", no_data) for seed in ("", "&seed=0"))
    assert zero.scenes[0] == draw_scene("full", "train", 0, 0) != usual.scenes[0]
    with pytest.raises(ValueError, match="it takes no split"):
        read_prompts("scenes:full?split=train", no_data)
    with pytest.raises(ValueError, match="count is 0"):
        read_prompts("scenes:full?count=0", no_data)
