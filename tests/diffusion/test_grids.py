import numpy as np
import pytest

from ldm_jax.diffusion import (
    SCHEDULES,
    SPACINGS,
    Cosine,
    Even,
    Leading,
    Linspace,
    RectifiedFlow,
    ScaledLinear,
    Trailing,
    grid,
)

DISCRETE = [Leading(), Leading(ends_clean=True), Trailing(), Trailing(ends_clean=False), Linspace()]
PAIRS = [(ScaledLinear(), spacing) for spacing in DISCRETE] + [
    (Cosine(), Even()),
    (RectifiedFlow(), Even()),
    (RectifiedFlow(shift=3.0), Even()),
]


@pytest.mark.parametrize(("schedule", "spacing"), PAIRS)
@pytest.mark.parametrize("steps", [2, 7, 50, 333])
def test_a_grid_walks_from_noise_to_data_in_f64(schedule, spacing, steps):
    points = grid(schedule, spacing, steps)
    for field in points:
        assert isinstance(field, np.ndarray)
        assert field.shape == (steps + 1,) and field.dtype == np.float64
    assert (np.diff(points.alpha) > 0).all() and (np.diff(points.sigma) < 0).all()
    assert (points.sigma[:-1] > 0).all() and (points.alpha[1:] > 0).all()


@pytest.mark.parametrize(("schedule", "spacing"), PAIRS)
def test_the_points_of_a_grid_lie_on_its_schedule(schedule, spacing):
    points = grid(schedule, spacing, 20)
    first = schedule(np.ones(1))
    if spacing not in (Leading(), Leading(ends_clean=True)):
        assert points.sigma[0] == first.sigma[0] and points.told[0] == first.told[0]
    if schedule.steps:
        on_path = schedule((points.told[:-1] + 0.5) / schedule.steps)
        np.testing.assert_array_equal(points.alpha[:-1], on_path.alpha)


def test_stable_diffusion_with_ddim_ends_at_the_first_index():
    points = grid(ScaledLinear(), Leading(), 50)
    np.testing.assert_array_equal(points.told, [*range(981, 0, -20), 0])
    np.testing.assert_allclose(points.alpha[-1] ** 2, 1 - 0.00085, rtol=1e-12)


@pytest.mark.parametrize("spacing", [Leading(ends_clean=True), Trailing(), Linspace()])
def test_a_clean_end_has_no_noise(spacing):
    points = grid(ScaledLinear(), spacing, 10)
    assert points.alpha[-1] == 1 and points.sigma[-1] == 0


@pytest.mark.parametrize("name", SPACINGS)
@pytest.mark.parametrize("path", SCHEDULES)
def test_every_schedule_is_served_or_told_which_spacing_to_use(name, path):
    schedule, spacing = SCHEDULES[path](), SPACINGS[name]()
    serves_both = name in ("karras", "log_snr")
    if serves_both or (schedule.steps is None) == (name == "uniform"):
        assert len(grid(schedule, spacing, 5).alpha) == 6
    else:
        with pytest.raises(ValueError, match=r"use (Even|Leading)"):
            grid(schedule, spacing, 5)


@pytest.mark.parametrize(
    ("spacing", "steps", "words"),
    [
        (Trailing(), 0, "at least 1 step, got 0"),
        (Trailing(), 1001, "1001 steps: ScaledLinear has only 1000"),
        (Leading(), 1000, "needs the indices 1 to 1000, but ScaledLinear has 0 to 999"),
        (Linspace(), 1, "at least 2 steps"),
    ],
)
def test_impossible_grids_are_refused(spacing, steps, words):
    with pytest.raises(ValueError, match=words):
        grid(ScaledLinear(), spacing, steps)
