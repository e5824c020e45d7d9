import numpy as np
import pytest

from ldm_jax.diffusion import (
    SCHEDULES,
    SPACINGS,
    Cosine,
    Distilled,
    Even,
    Karras,
    Leading,
    Linspace,
    LogSNR,
    RectifiedFlow,
    ScaledLinear,
    Trailing,
    grid,
)

ZERO_SNR = ScaledLinear(zero_terminal_snr=True)
DISCRETE = [
    Leading(),
    Leading(ends_clean=True),
    Leading(skipped=1),
    Trailing(),
    Trailing(ends_clean=False),
    Linspace(),
    Linspace(skipped=1),
]
RATIOS = [Karras(), Karras(rho=3.0, lowest=0.05, highest=10.0), LogSNR(), LogSNR(lowest=0.1)]
CONTINUOUS = [Cosine(), RectifiedFlow(), RectifiedFlow(shift=3.0)]
PAIRS = [
    *((ScaledLinear(), spacing) for spacing in DISCRETE),
    *((schedule, Even()) for schedule in CONTINUOUS),
    *((schedule, spacing) for schedule in (ScaledLinear(), *CONTINUOUS) for spacing in RATIOS),
    (RectifiedFlow(shift=3.0), Even(last=3 / 1002)),
    (ZERO_SNR, Trailing()),
    (ZERO_SNR, Karras()),
    (ScaledLinear(), Linspace(between=True)),
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
    between = getattr(spacing, "between", False)
    if not (between or isinstance(spacing, Leading | Karras | LogSNR)):
        assert points.sigma[0] == first.sigma[0] and points.told[0] == first.told[0]
    if schedule.steps and not (between or isinstance(spacing, Karras | LogSNR)):
        on_path = schedule((points.told[:-1] + 0.5) / schedule.steps)
        np.testing.assert_array_equal(points.alpha[:-1], on_path.alpha)


def test_points_between_indices_lie_between_their_neighbours():
    """Three steps ask for indices 999, 499.5 and 0: the ratio in the middle is the mean of two."""
    points = grid(ScaledLinear(), Linspace(between=True), 3)
    index = np.array([999, 500, 499, 0])
    path = ScaledLinear()((index + 0.5) / 1000)
    ratios = path.sigma / path.alpha
    np.testing.assert_array_equal(points.told[:-1], [999, 499.5, 0])
    expected = [ratios[0], (ratios[1] + ratios[2]) / 2, ratios[3]]
    np.testing.assert_allclose(points.sigma[:-1] / points.alpha[:-1], expected, rtol=1e-12)
    np.testing.assert_allclose(points.alpha**2 + points.sigma**2, 1, rtol=1e-12)


def test_stable_diffusion_with_ddim_ends_at_the_first_index():
    points = grid(ScaledLinear(), Leading(), 50)
    np.testing.assert_array_equal(points.told, [*range(981, 0, -20), 0])
    np.testing.assert_allclose(points.alpha[-1] ** 2, 1 - 0.00085, rtol=1e-12)


@pytest.mark.parametrize("spacing", [Leading(ends_clean=True), Trailing(), Linspace()])
def test_a_clean_end_has_no_noise(spacing):
    points = grid(ScaledLinear(), spacing, 10)
    assert points.alpha[-1] == 1 and points.sigma[-1] == 0


@pytest.mark.parametrize("schedule", [ScaledLinear(), *CONTINUOUS])
@pytest.mark.parametrize(
    ("spacing", "scaled"),
    [(Karras(rho=7.0), lambda u: u ** (1 / 7)), (Karras(rho=2.0), np.sqrt), (LogSNR(), np.log)],
)
def test_ratios_of_noise_to_signal_are_evenly_spaced_in_their_scale(schedule, spacing, scaled):
    points = grid(schedule, spacing, 30)
    gaps = np.diff(scaled(points.sigma[:-1] / points.alpha[:-1]))
    np.testing.assert_allclose(gaps, gaps[0], rtol=1e-9)


@pytest.mark.parametrize("spacing", [Karras, LogSNR])
def test_ratios_keep_within_those_of_the_schedule_and_those_given(spacing):
    ends = ScaledLinear()(np.array([1.0, 0.0]))
    for schedule, given, wanted in (
        (ScaledLinear(), {}, ends.sigma / ends.alpha),
        (RectifiedFlow(), {}, [80.0, 0.002]),
        (ScaledLinear(), {"lowest": 0.1, "highest": 5.0}, [5.0, 0.1]),
    ):
        points = grid(schedule, spacing(**given), 10)
        ratios = points.sigma[:-1] / points.alpha[:-1]
        np.testing.assert_allclose(ratios[[0, -1]], wanted, rtol=1e-9)


@pytest.mark.parametrize("schedule", CONTINUOUS)
@pytest.mark.parametrize("spacing", [Karras(), LogSNR()])
def test_points_of_given_ratios_lie_on_a_continuous_path(schedule, spacing):
    """What the network is told leads back to the same point."""
    points = grid(schedule, spacing, 20)
    told = points.told[:-1] / 1000
    path = RectifiedFlow() if isinstance(schedule, RectifiedFlow) else schedule
    for row, same in zip(points, path(told), strict=True):
        np.testing.assert_allclose(row[:-1], same, rtol=1e-6)


@pytest.mark.parametrize("spacing", [Karras, LogSNR])
def test_what_a_network_is_told_of_a_ratio_lies_between_the_levels_around_it(spacing):
    schedule = ScaledLinear()
    levels = schedule((np.arange(1000) + 0.5) / 1000)
    points, whole = (grid(schedule, spacing(whole=w), 17) for w in (False, True))
    ratio, told = (points.sigma / points.alpha)[:-1], points.told[:-1]
    ratios = levels.sigma / levels.alpha
    below, above = (ratios[f(told).astype(int)] for f in (np.floor, np.ceil))
    assert (below <= ratio * (1 + 1e-9)).all() and (ratio <= above * (1 + 1e-9)).all()
    assert (told != np.round(told)).any()
    np.testing.assert_array_equal(whole.told[:-1], np.round(told))


def test_stable_diffusion_3_ends_its_steps_at_the_shifted_last_thousandth():
    """diffusers shifts its lowest level, which is shifted already, once more."""
    points = grid(RectifiedFlow(shift=3.0), Even(last=3 / 1002), 28)
    lowest = 3 * 0.001 / (1 + 2 * 0.001)
    np.testing.assert_allclose(points.sigma[-2], 3 * lowest / (1 + 2 * lowest), rtol=1e-12)
    assert points.sigma[0] == 1 and points.sigma[-1] == 0


def test_a_last_time_of_one_step_is_even():
    for field in zip(grid(Cosine(), Even(), 10), grid(Cosine(), Even(last=0.1), 10), strict=True):
        np.testing.assert_allclose(*field, rtol=1e-12, atol=1e-12)


def test_distilled_indices_are_every_twentieth_from_the_last_one_down():
    told = grid(ScaledLinear(), Distilled(), 4).told
    np.testing.assert_array_equal(told[:-1], [999, 759, 499, 259])  # 50 - 0, 12, 25, 37 of 50


def test_left_out_indices_stretch_the_others():
    np.testing.assert_array_equal(
        grid(ScaledLinear(), Leading(skipped=1, offset=0), 4).told[:-1], [800, 600, 400, 200]
    )
    np.testing.assert_array_equal(
        grid(ScaledLinear(), Linspace(skipped=1), 3).told[:-1], [999, 666, 333]
    )


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
        (Distilled(), 51, "serves at most 50 steps, got 51"),
        (Distilled(original=2000), 4, "ScaledLinear has only 1000"),
        (Karras(lowest=20.0), 5, "leaves nothing of ScaledLinear"),
    ],
)
def test_impossible_grids_are_refused(spacing, steps, words):
    with pytest.raises(ValueError, match=words):
        grid(ScaledLinear(), spacing, steps)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Leading(skipped=-1), "Leading needs skipped >= 0, got -1"),
        (lambda: Linspace(skipped=-1), "Linspace needs skipped >= 0, got -1"),
        (lambda: Distilled(original=0), "at least 1 original index, got 0"),
        (lambda: Even(last=1.0), r"last time in \(0, 1\), got 1.0"),
        (lambda: Karras(rho=0.0), "rho > 0, got 0.0"),
        (lambda: Karras(lowest=0.0), "Karras needs 0 < lowest < highest"),
        (lambda: LogSNR(lowest=2.0, highest=1.0), "LogSNR needs 0 < lowest < highest"),
    ],
)
def test_impossible_spacings_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
