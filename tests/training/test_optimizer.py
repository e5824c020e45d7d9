import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.training.optimizer import OptimizerConfig, decayed, learning_rate, make_optimizer


def adamw(config, gradient, point, steps):
    """AdamW as its paper states it (Loshchilov & Hutter 2019, algorithm 2), in f64."""
    m = v = np.zeros_like(point)
    for t in range(1, steps + 1):
        g = gradient(point)
        g = g * min(1.0, config.clip_norm / np.linalg.norm(g))
        m = config.b1 * m + (1 - config.b1) * g
        v = config.b2 * v + (1 - config.b2) * g**2
        ratio = (m / (1 - config.b1**t)) / (np.sqrt(v / (1 - config.b2**t)) + config.eps)
        point = point - config.learning_rate * (ratio + config.weight_decay * point)
    return point


def rates(config, updates, **run):
    return jax.jit(jax.vmap(learning_rate(config, **run)))(jnp.asarray(updates, jnp.int32))


@pytest.mark.parametrize("clip_norm", [0.5, float("inf")])
def test_steps_on_a_quadratic_are_those_of_adamw_on_clipped_gradients(clip_norm):
    config = OptimizerConfig(learning_rate=0.1, clip_norm=clip_norm, weight_decay=0.1)
    curvature = np.array([[1.0, 3.0], [0.1, 10.0]])
    tx = make_optimizer(config, batch_size=8, examples=1000)
    params = {"kernel": jnp.array([[1.0, -2.0], [3.0, 0.5]])}
    expected = adamw(config, lambda p: curvature * p, np.array(params["kernel"], float), 6)

    @jax.jit
    def step(params, state):
        gradient = {"kernel": jnp.asarray(curvature, jnp.float32) * params["kernel"]}
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(6):
        params, state = step(params, state)
    # 1 - b2^t has lost three of its digits in f32.
    np.testing.assert_allclose(params["kernel"], expected, rtol=2e-4)


@pytest.mark.parametrize("batch_size", [8, 16, 64])
def test_warm_up_counts_examples_whatever_the_batch_size(batch_size):
    config = OptimizerConfig(learning_rate=0.2, warmup_examples=256)
    seen = np.array([64, 128, 192, 256, 320, 6400])
    found = rates(config, seen // batch_size - 1, batch_size=batch_size, examples=10_000)
    np.testing.assert_allclose(found, 0.2 * np.minimum(1.0, seen / 256), rtol=1e-6)


def test_a_constant_rate_does_not_know_the_length_of_the_run():
    config, updates = OptimizerConfig(warmup_examples=100), np.arange(300)
    short, long = (rates(config, updates, batch_size=8, examples=n) for n in (1_000, 10**9))
    np.testing.assert_array_equal(short, long)


def test_cosine_falls_from_the_end_of_the_warm_up_to_zero_at_the_end_of_the_run():
    config = OptimizerConfig(learning_rate=1.0, warmup_examples=200, schedule="cosine")
    found = rates(config, np.arange(14), batch_size=100, examples=1200)
    expected = [0.5] + [0.5 * (1 + np.cos(np.pi * i / 10)) for i in range(11)] + [0.0, 0.0]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_clock_of_a_long_run_of_large_batches_does_not_overflow():
    config = OptimizerConfig(learning_rate=1.0, schedule="cosine")
    found = rates(config, [2**12 - 1], batch_size=2**20, examples=2**33)
    np.testing.assert_allclose(found, [0.5], atol=1e-6)


def test_decay_spares_biases_and_scales_though_stacked_blocks_make_matrices_of_them():
    dense = {"kernel": jnp.zeros((6, 3, 4)), "bias": jnp.zeros((6, 4)), "scale": jnp.zeros((6, 3))}
    params = {"blocks": dense, "embedding": jnp.zeros((9, 3)), "gain": jnp.zeros(3)}
    assert decayed(params) == {
        "blocks": {"kernel": True, "bias": False, "scale": False},
        "embedding": True,
        "gain": False,
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"schedule": "step"}, "schedule is 'step'; allowed are constant, cosine"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0; it is above 0, or inf"),
        ({"warmup_examples": -1}, "warmup_examples is -1; it is at least 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**given)
