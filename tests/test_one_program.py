"""The program from prompts to pixels as the commands make it, of a small UNet and the embedded frozen networks."""

import dataclasses
import functools

import jax
import numpy as np
import tiny
from jax.extend import core

from ldm_jax.diffusion import DDIM, Leading, ScaledLinear, eps, grid
from ldm_jax.evals.generation import make_generate
from ldm_jax.models.networks import make_network
from ldm_jax.models.unet_config import UNetConfig
from ldm_jax.parallel import MeshConfig, jit, put_same, replicated
from ldm_jax.runs.run import Run
from ldm_jax.types import Cond

PROMPTS = ["a large red circle", "a small blue ring", *[f"picture {n}" for n in range(6)]]
UNET = UNetConfig(
    channels=(16,),
    num_res_blocks=1,
    transformer_depth=(2,),
    head_width=16,
    text_width=24,  # and nothing else is
    num_groups=4,
    sample_size=8,
)
WIDTH, STEPS = UNET.text_width, 7


def drawn(init):
    """Parameters without a zero, so that all that is told counts."""
    rng = np.random.default_rng(0)
    draw = lambda leaf: leaf + rng.normal(0, 0.1, leaf.shape).astype(leaf.dtype)  # noqa: E731
    return jax.tree.map(draw, jax.jit(init)(jax.random.key(0)))


@functools.cache
def program(devices=1):
    """`draw(prompts, seed, guidance) -> uint8`, of so many devices, and what `jit` gave."""
    config = dataclasses.replace(tiny.TINY, mesh=MeshConfig())
    run = Run(config, devices=jax.devices()[:devices])
    params = jax.device_put(drawn(run.network.init), replicated(run.mesh))
    generate, text = jit(run.generate(), run.mesh), run.frozen.text
    negative = text([""])

    def draw(prompts, seed=0, guidance=3.0):
        rows = {"tokens": text(prompts), "number": np.arange(len(prompts), dtype="u4")}
        rows = put_same(rows, run.mesh)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows["number"])
        given = rows["tokens"], negative, keys, np.float32(guidance)
        return generate(params, run.frozen.params, *given)

    return draw, generate.__wrapped__


def test_images_do_not_depend_on_the_number_of_devices():
    """But for a value that rounding moves by one, where a sum was made in another order."""
    one, other = (program(devices)[0](PROMPTS) for devices in (1, 8))
    assert one.dtype == np.uint8 and one.shape == (len(PROMPTS), 64, 64, 3)
    assert len(other.sharding.device_set) == 8
    one, other = (np.asarray(pixels, int) for pixels in (one, other))
    assert np.abs(one - other).max() <= 1 and (one != other).mean() < 0.01
    assert one.std() > 5


def test_guidance_prompts_and_seeds_compile_nothing_anew_and_all_count():
    draw, jitted = program()
    first = np.asarray(draw(PROMPTS))
    compiled = jitted._cache_size()
    for changes in ({"guidance": 7.5}, {"guidance": 0.0}, {"seed": 3}, {"prompts": PROMPTS[::-1]}):
        assert (np.asarray(draw(**{"prompts": PROMPTS} | changes)) != first).any(), changes
    assert jitted._cache_size() == compiled


def made(steps):
    """The program of so many steps with text that is given encoded, and what it takes."""
    init, apply = make_network(UNET)
    generate = make_generate(
        apply,
        functools.partial(apply, method="prepare"),
        lambda frozen, tokens: Cond(jax.nn.one_hot(tokens, WIDTH)),
        lambda frozen, latents: latents[..., :3],
        prediction=eps,
        grid=grid(ScaledLinear(), Leading(), steps),
        sampler=DDIM(),
        shape=(8, 8, 4),
    )
    keys, tokens = jax.random.split(jax.random.key(0), 4), np.zeros((4, 5), "i4")
    return generate, (drawn(init), {}, tokens, tokens[:1], keys, np.float32(3.0))


def products(jaxpr, walked=False):
    """The sizes that products sum over, each with whether it is part of the walk."""
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            ((dims, _), _), shape = params["dimension_numbers"], equation.invars[0].aval.shape
            yield from ((shape[dim], walked) for dim in dims)
        inside = walked or (name == "scan" and params["length"] == STEPS)
        for inner in core.jaxprs_in_params(params):
            yield from products(inner, inside)


def test_keys_and_values_of_the_text_are_made_once_a_prompt():
    generate, given = made(STEPS)
    found = list(products(jax.make_jaxpr(generate)(*given).jaxpr))
    assert (WIDTH, False) in found and (WIDTH, True) not in found
    assert any(walked for _, walked in found)


def test_a_long_walk_takes_the_memory_of_a_short_one():
    """But for the rows of its grid: three f32 and the number, a step. One step alone is compiled without a loop."""
    sizes = {}
    for steps in (1, 2, 50):
        generate, given = made(steps)
        compiled = jax.jit(generate).lower(*given).compile()
        sizes[steps] = compiled.memory_analysis().temp_size_in_bytes
    assert sizes[50] - sizes[2] <= 16 * 50
    assert sizes[50] < 1.1 * sizes[1]
