"""Counted operations against arithmetic."""

import jax
import jax.numpy as jnp
import pytest

from ldm_jax.models.flops import traced_flops


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
