from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import (
    PREDICTIONS,
    SCHEDULES,
    WEIGHTINGS,
    Cosine,
    Flat,
    LogitNormal,
    MinSNR,
    RectifiedFlow,
    ScaledLinear,
    Uniform,
    Weyl,
    determinant,
    make_loss,
    make_validation_loss,
    v,
    velocity,
)
from ldm_jax.types import Batch

SHAPE = (8, 8, 4)


def batch_of(normal_data, count):
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(count, *SHAPE)).astype(np.float32)
    latents = normal_data.mean + normal_data.std * noise
    text, weight = np.zeros((count, 3), np.int32), np.ones(count, np.float32)
    keys = jax.random.wrap_key_data(rng.integers(2**32, size=(count, 2), dtype=np.uint32))
    return Batch(latents, text, weight, np.arange(count, dtype=np.uint32)), keys


def rows(batch, keys, order):
    return jax.tree.map(lambda row: row[order], batch), keys[order]


def irreducible(normal_data, prediction, point):
    """The variance of y given x: at fixed x, dy = -determinant / sigma dx_0."""
    return (determinant(prediction, point) * normal_data.std) ** 2 / normal_data.variance(point)


def test_a_perfect_network_leaves_the_irreducible_loss(normal_data):
    levels, cases = (0.1, 0.5, 0.9), list(product(SCHEDULES.values(), PREDICTIONS.values()))

    @jax.jit
    def losses_of(batch, keys):
        losses = []
        for schedule, prediction in cases:
            network = normal_data.network(schedule(), prediction)
            settings = {"schedule": schedule(), "prediction": prediction, "levels": levels}
            losses.append(make_validation_loss(network, **settings)(None, None, batch, keys))
        return losses

    batch, keys = batch_of(normal_data, 64)
    tolerance = 5 * (2 / batch.latents.size) ** 0.5
    for (schedule, prediction), losses in zip(cases, losses_of(batch, keys), strict=True):
        expected = irreducible(normal_data, prediction, schedule()(np.array(levels)))
        assert losses.shape == (64, 3)
        np.testing.assert_allclose(np.mean(losses, axis=0), expected, rtol=tolerance)


@pytest.mark.parametrize(
    ("times", "weigh"), [(Uniform(), MinSNR()), (LogitNormal(), Flat())], ids=repr
)
def test_the_training_loss_is_the_weighted_mean_over_times(normal_data, times, weigh):
    path = Cosine()
    network = normal_data.network(path, v)
    loss = make_loss(
        network, schedule=path, prediction=v, times=times, draw=Weyl(), weighting=weigh
    )
    losses = jax.jit(loss)(None, None, None, *batch_of(normal_data, 512))
    point = path(np.asarray(times((jnp.arange(4000) + 0.5) / 4000), np.float64))
    expected = np.mean(weigh(v, point) * irreducible(normal_data, v, point))
    np.testing.assert_allclose(np.mean(losses), expected, rtol=0.02)


def test_under_min_snr_all_predictions_have_the_same_loss(normal_data):
    @jax.jit
    def losses_of(batch, keys):
        losses = []
        for prediction in PREDICTIONS.values():
            network = normal_data.network(Cosine(), prediction)
            settings = {"schedule": Cosine(), "prediction": prediction, "weighting": MinSNR()}
            losses.append(make_loss(network, **settings)(None, None, None, batch, keys))
        return losses

    first, *others = losses_of(*batch_of(normal_data, 16))
    for other in others:
        np.testing.assert_allclose(other, first, rtol=2e-3)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_has_its_published_forms(gamma):
    point = Cosine()(np.linspace(0.01, 0.99, 50))
    snr = (point.alpha / point.sigma) ** 2
    clipped = np.minimum(snr, gamma)
    published = {"eps": clipped / snr, "x_0": clipped, "v": clipped / (snr + 1)}
    for name, expected in published.items():
        np.testing.assert_allclose(MinSNR(gamma)(PREDICTIONS[name], point), expected, rtol=1e-5)


def test_min_snr_needs_a_positive_gamma():
    with pytest.raises(ValueError, match=r"gamma > 0, got 0.0"):
        MinSNR(gamma=0.0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_no_time_that_can_be_drawn_gives_an_infinite_weight(prediction, schedule, weighting):
    ends = SCHEDULES[schedule]()(np.array([2.0**-24, 1 - 2.0**-24], np.float32))
    weight = WEIGHTINGS[weighting]()(PREDICTIONS[prediction], ends)
    assert weight.dtype == np.float32 and np.isfinite(weight).all()


@partial(jax.jit, static_argnames="data")
def losses_of(batch, keys, *, data):
    path = RectifiedFlow()
    network = data.network(path, velocity)
    loss = make_loss(network, schedule=path, prediction=velocity, draw=Weyl())
    return loss(None, None, None, batch, keys)


def test_a_batch_in_another_order_has_the_same_losses_bit_for_bit(normal_data):
    batch, keys = batch_of(normal_data, 16)
    order = np.random.default_rng(0).permutation(16)
    permuted = losses_of(*rows(batch, keys, order), data=normal_data)
    whole = np.asarray(losses_of(batch, keys, data=normal_data))
    np.testing.assert_array_equal(permuted, whole[order])


def test_an_examples_loss_does_not_depend_on_its_company_or_device(normal_data):
    """But for the rounding of another compiled program."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = jax.NamedSharding(mesh, jax.P("data"))
    batch, keys = batch_of(normal_data, 16)
    whole = losses_of(batch, keys, data=normal_data)
    part = losses_of(*rows(batch, keys, np.array([3, 11, 4])), data=normal_data)
    np.testing.assert_allclose(part, np.asarray(whole)[[3, 11, 4]], rtol=1e-6)
    spread = losses_of(*jax.device_put((batch, keys), placed), data=normal_data)
    np.testing.assert_allclose(spread, whole, rtol=1e-6)


def test_text_is_encoded_with_the_frozen_and_prepared_with_the_trained_parameters(normal_data):
    def encode(frozen, text):
        return frozen["table"][text].sum(axis=1)

    def prepare(params, cond):
        return params["scale"] * cond

    def apply(params, x, told, context):
        return jnp.broadcast_to(context[:, None, None, None], x.shape)

    loss = make_loss(apply, prepare, encode, schedule=RectifiedFlow(), prediction=velocity)
    batch, keys = batch_of(normal_data, 4)
    batch = batch._replace(cond=np.array([[0, 1], [1, 1], [2, 0], [2, 2]], np.int32))
    frozen, losses = {"table": jnp.array([0.0, 1.0, 10.0])}, {}
    for scale in (-1.0, 0.0, 1.0):
        losses[scale] = jax.jit(loss)({"scale": scale}, None, frozen, batch, keys)
    # mean((s c - y)^2) is a parabola in s whose second difference is 2 c^2.
    curvature = losses[1.0] - 2 * losses[0.0] + losses[-1.0]
    np.testing.assert_allclose(curvature, 2 * np.array([1.0, 2.0, 10.0, 20.0]) ** 2, rtol=1e-4)


def test_the_validation_loss_is_the_training_loss_at_its_level(normal_data):
    """A time distribution that is one level makes both look at the same place."""

    def apply(params, x, told, context):
        return params * x

    batch, keys = batch_of(normal_data, 256)
    settings = {"schedule": RectifiedFlow(), "prediction": velocity}
    validate = make_validation_loss(apply, levels=(0.2,), **settings)
    train = make_loss(apply, times=lambda u: jnp.full_like(u, 0.2), **settings)
    expected = np.mean(jax.jit(validate)(0.3, None, batch, keys))
    trained = np.mean(jax.jit(train)(0.3, None, None, batch, keys))
    np.testing.assert_allclose(trained, expected, rtol=0.03)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_is_finite_where_no_signal_is_left(prediction):
    point = ScaledLinear(zero_terminal_snr=True)(np.ones(2, np.float32))
    assert (point.alpha == 0).all()
    assert np.isfinite(MinSNR()(PREDICTIONS[prediction], point)).all()
