import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import (
    PREDICTIONS,
    SCHEDULES,
    RectifiedFlow,
    determinant,
    diffuse,
    eps,
    solve,
    target,
    v,
    velocity,
    x_0,
)
from ldm_jax.types import Point

SHAPE = (5, 4, 4, 3)
DATA, NOISE = np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)
TIMES = np.linspace(0.1, 0.9, 5, dtype=np.float32)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_solve_inverts_target(prediction, schedule):
    row, path = PREDICTIONS[prediction], SCHEDULES[schedule]()

    @jax.jit
    def there_and_back(t):
        point = path(t)
        return solve(row, point, target(row, point, DATA, NOISE), diffuse(point, DATA, NOISE))

    found = there_and_back(TIMES)
    np.testing.assert_allclose(found.x_0, DATA, atol=2e-4)
    np.testing.assert_allclose(found.eps, NOISE, atol=2e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_one_point_for_all_examples_is_a_point_for_each(prediction):
    row, schedule = PREDICTIONS[prediction], RectifiedFlow()
    one, each = schedule(np.full((), 0.3)), schedule(np.full(5, 0.3))
    for a, b in zip(solve(row, one, DATA, NOISE), solve(row, each, DATA, NOISE), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_determinants_say_where_a_prediction_is_ill_posed(schedule):
    point = SCHEDULES[schedule]()(np.linspace(0, 1, 33))
    np.testing.assert_array_equal(determinant(eps, point), point.alpha)
    np.testing.assert_array_equal(determinant(x_0, point), -point.sigma)
    np.testing.assert_allclose(determinant(v, point), point.alpha**2 + point.sigma**2)
    np.testing.assert_array_equal(determinant(velocity, point), point.alpha + point.sigma)


def test_velocity_is_the_slope_of_rectified_flow():
    def x(t):
        return diffuse(RectifiedFlow()(t), DATA, NOISE)

    _, slope = jax.jvp(x, (TIMES,), (np.ones_like(TIMES),))
    np.testing.assert_allclose(
        target(velocity, RectifiedFlow()(TIMES), DATA, NOISE), slope, atol=1e-6
    )


def test_v_is_the_slope_along_the_angle_of_a_path_that_preserves_variance():
    def point(angle):
        return Point(jnp.cos(angle), jnp.sin(angle), angle)

    _, slope = jax.jvp(
        lambda angle: diffuse(point(angle), DATA, NOISE), (TIMES,), (np.ones_like(TIMES),)
    )
    np.testing.assert_allclose(target(v, point(TIMES), DATA, NOISE), slope, atol=1e-6)


def test_a_half_precision_output_is_solved_in_f32():
    point = RectifiedFlow()(TIMES)
    found = solve(velocity, point, jnp.asarray(DATA, jnp.bfloat16), NOISE)
    assert found.x_0.dtype == found.eps.dtype == jnp.float32
    x_again = diffuse(point, found.x_0, found.eps)
    np.testing.assert_allclose(x_again, NOISE, atol=1e-5)
