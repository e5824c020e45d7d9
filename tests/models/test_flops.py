"""Counted operations against arithmetic, and the count by layers against programs, ours and diffusers'."""

import warnings

import jax
import jax.numpy as jnp
import pytest
from specimens import SMALL, answer, num_params, shapes

from ldm_jax.models.flops import count, traced_flops
from ldm_jax.models.networks import make_network
from ldm_jax.types import Cond

TOKENS = 7


def program(config):
    """The sum of what a backbone answers, and the shapes of its parameters and of one example's inputs."""
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)  # noqa: E731
    side = config.sample_size
    pooled, sizes = (shape(1, width) for width in (max(config.pooled_width, 1), 6))
    cond = Cond(shape(1, TOKENS, config.text_width), pooled=pooled, sizes=sizes)
    inputs = shape(1, side, side, config.in_channels), shape(1), cond
    return lambda *args: answer(make_network(config).apply, *args).sum(), (shapes(config), *inputs)


@pytest.mark.parametrize("name", SMALL)
def test_layers_add_up_to_the_parameters_and_the_products_of_the_program(name):
    forward, arguments = program(SMALL[name])
    counted = count(SMALL[name], text_tokens=TOKENS)
    assert counted.total.params == num_params(SMALL[name])
    assert counted.total.flops == traced_flops(forward, *arguments)


@pytest.mark.parametrize("name", SMALL)
def test_the_gradient_costs_two_forward_passes(name):
    """Where that of the inputs is taken too: a product for either side of each product."""
    forward, arguments = program(SMALL[name])
    traced = traced_flops(jax.grad(forward, argnums=range(4)), *arguments)
    assert traced == count(SMALL[name], text_tokens=TOKENS).training_flops


# Multiply-adds of the layers that see an input: of the latents, the time, and the text.
@pytest.mark.parametrize(
    ("name", "macs"),
    [
        ("unet without a middle", 9 * 4 * 16 * 64 + 16 * 64 + 3 * 2 * 24 * 16 * TOKENS),
        ("pixart without a caption MLP", 16 * 24 * 16 + 256 * 24 + 2 * 2 * 24 * 24 * TOKENS),
        ("uvit", 16 * 16 * 16 + 20 * 16 * TOKENS),
    ],
)
def test_training_does_without_the_gradient_of_the_inputs_alone(name, macs):
    forward, arguments = program(SMALL[name])
    counted = count(SMALL[name], text_tokens=TOKENS)
    assert traced_flops(jax.grad(forward), *arguments) == counted.training_flops - 2 * macs


def test_torch_counts_the_same_in_diffusers_networks():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode

        for name, network in {
            "unet without sizes": diffusers.UNet2DConditionModel,
            "unet of IF's blocks": diffusers.UNet2DConditionModel,
            "pixart without sizes": diffusers.PixArtTransformer2DModel,
        }.items():
            config = SMALL[name]
            model = network.from_config(config.to_diffusers())
            latents = torch.zeros(1, config.in_channels, 8, 8)
            text = torch.zeros(1, TOKENS, config.text_width)
            sizes = {"resolution": None, "aspect_ratio": None}
            # It does not know the fused attention of CPUs.
            plain, counter = sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False)
            with plain, counter, torch.no_grad():
                model(
                    latents,
                    timestep=torch.tensor([7]),
                    encoder_hidden_states=text,
                    added_cond_kwargs=sizes,
                )
            counted = count(config, text_tokens=TOKENS)
            assert counted.total.flops == counter.get_total_flops(), name
            assert counted.total.params == sum(p.numel() for p in model.parameters()), name


def test_a_product_of_matrices_is_two_operations_a_multiply_add():
    a, b = jnp.ones((3, 4)), jnp.ones((4, 5))
    assert traced_flops(jnp.dot, a, b) == 2 * 3 * 4 * 5
    assert traced_flops(jax.jit(lambda a, b: a @ b + 1), a, b) == 2 * 3 * 4 * 5


def test_a_batched_contraction_counts_its_batch():
    q = jnp.ones((2, 7, 3, 5))
    assert traced_flops(lambda q: jnp.einsum("bnka,blka->bknl", q, q), q) == 2 * 2 * 3 * 7 * 7 * 5


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 4)])
def test_a_convolution_counts_every_tap(stride, groups):
    x, kernel = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4 // groups, 8))

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    outputs = 2 * (8 // stride) ** 2 * 8
    assert traced_flops(convolve, x, kernel) == 2 * outputs * 9 * (4 // groups)


def test_the_gradient_of_a_strided_convolution_costs_what_the_convolution_costs():
    kernel = jax.ShapeDtypeStruct((3, 3, 4, 6), jnp.float32)
    x = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32)

    def convolve(x, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=layout)

    def pull_back(y, kernel):
        return jax.linear_transpose(lambda x: convolve(x, kernel), x)(y)

    y = jax.eval_shape(convolve, x, kernel)
    assert traced_flops(pull_back, y, kernel) == traced_flops(convolve, x, kernel)


def test_a_scan_counts_as_often_as_it_runs_and_a_gradient_three_times():
    w, x = jnp.ones((6, 6)), jnp.ones((2, 6))

    def repeated(w, x):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=5)[0].sum()

    once = 2 * 2 * 6 * 6
    assert traced_flops(repeated, w, x) == 5 * once
    assert traced_flops(jax.grad(repeated, argnums=(0, 1)), w, x) == 3 * 5 * once


def test_remat_counts_what_it_computes_again():
    w, x = jnp.ones((6, 6)), jnp.ones((2, 6))
    block = jax.checkpoint(
        lambda w, x: jnp.tanh(x @ w) @ w, policy=jax.checkpoint_policies.nothing_saveable
    )
    plain = traced_flops(jax.grad(lambda w, x: (jnp.tanh(x @ w) @ w).sum()), w, x)
    assert traced_flops(jax.grad(lambda w, x: block(w, x).sum()), w, x) > plain
