"""The same walks as diffusers' schedulers, from their own f32 betas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import (
    DDIM,
    DDPM,
    PREDICTIONS,
    Discrete,
    Leading,
    Linspace,
    RectifiedFlow,
    ScaledLinear,
    Trailing,
    denoiser,
    gaussian,
    grid,
    join,
    sample,
    target,
    velocity,
    zero_terminal_snr,
)

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}
TYPES = {"epsilon": "eps", "sample": "x_0", "v_prediction": "v"}
SHAPE = (3, 4, 4, 2)


def scheduler(name, **settings):
    return getattr(diffusers, f"{name}Scheduler")(**STABLE_DIFFUSION | settings)


def walk(theirs, steps, spacing, sampler, keys, x_1):
    """Our sample with the made-up network, from their betas."""

    def apply(params, x, told, context):
        return jnp.tanh(0.7 * x + jnp.sin(told / 300)[:, None, None, None])

    schedule = Discrete(tuple(theirs.betas.double().tolist()))
    prediction = PREDICTIONS[TYPES[theirs.config.prediction_type]]
    denoise = denoiser(apply, None, None, prediction=prediction)
    return sample(denoise, x_1, grid(schedule, spacing, steps), keys, sampler)


def their_walk(theirs, steps, noise_of, x_1, **options):
    """Their loop with the same network; `noise_of(i)` is set up before step i."""
    theirs.set_timesteps(steps)
    x = torch.from_numpy(np.array(x_1))
    for i, t in enumerate(theirs.timesteps):
        y = torch.tanh(0.7 * x + torch.sin(t / 300))
        x = theirs.step(y, t, x, **options, **noise_of(i)).prev_sample
    return x.numpy()


def noises(keys):
    def noise(i):
        step = gaussian(jax.vmap(jax.random.fold_in, (0, None))(keys, i), SHAPE[1:])
        return torch.from_numpy(np.array(step))

    return noise


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * abs(theirs).max(), rtol=0)


@pytest.fixture
def keys():
    return jax.random.split(jax.random.key(2), SHAPE[0])


@pytest.fixture
def x_1():
    return jax.random.normal(jax.random.key(4), SHAPE)


def test_scaled_linear_is_theirs():
    point = ScaledLinear()((np.arange(1000) + 0.5) / 1000)
    np.testing.assert_allclose(point.alpha**2, scheduler("DDIM").alphas_cumprod, rtol=1e-4)
    same_betas = Discrete(tuple(scheduler("DDIM").betas.double().tolist()))(np.ones(1))
    np.testing.assert_allclose(
        same_betas.alpha**2, scheduler("DDIM").alphas_cumprod[-1:], rtol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "spacing", "settings"),
    [
        ("leading", Leading(), {"steps_offset": 1}),
        ("leading", Leading(offset=0), {}),
        ("trailing", Trailing(), {}),
        ("linspace", Linspace(), {}),
    ],
)
@pytest.mark.parametrize("steps", [2, 7, 48, 50, 80, 999])
def test_spacings_are_theirs(name, spacing, settings, steps):
    theirs = scheduler("DDIM", timestep_spacing=name, **settings)
    theirs.set_timesteps(steps)
    told = grid(ScaledLinear(), spacing, steps).told
    np.testing.assert_array_equal(told[:-1], theirs.timesteps)


@pytest.mark.parametrize("phi", [0.0, 0.3, 1.0])
def test_rescaled_guidance_is_theirs(x_1, phi):
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    def apply(params, x, told, context):
        return jnp.tanh(0.7 * x + context[:, :1, None, None])

    cond, uncond = np.arange(3, dtype=np.float32)[:, None] / 3, np.zeros((1, 1), np.float32)
    point = RectifiedFlow()(np.full((), 0.6))
    denoise = denoiser(
        apply, None, join(cond, uncond), prediction=velocity, guidance=7.5, rescale=phi
    )
    y = target(velocity, point, *denoise(x_1, point))
    y_c, y_u = (
        torch.from_numpy(np.array(apply(None, x_1, None, np.repeat(c, 3 // len(c), axis=0))))
        for c in (cond, uncond)
    )
    assert_close(y, rescale_noise_cfg(y_u + 7.5 * (y_c - y_u), y_c, guidance_rescale=phi).numpy())


def test_rescaled_betas_are_theirs():
    theirs = [scheduler("DDIM", rescale_betas_zero_snr=zero) for zero in (False, True)]
    betas, rescaled = (t.betas.double().numpy() for t in theirs)
    found = zero_terminal_snr(tuple(betas))
    np.testing.assert_allclose(found, rescaled, rtol=5e-4)  # theirs are made in f32


@pytest.mark.parametrize(
    ("predicted", "eta"),
    [("epsilon", 0.0), ("sample", 0.0), ("v_prediction", 0.0), ("v_prediction", 0.6)],
)
def test_ddim_walks_as_theirs_does_for_stable_diffusion(keys, x_1, predicted, eta):
    theirs = scheduler("DDIM", prediction_type=predicted, steps_offset=1, set_alpha_to_one=False)
    noise = noises(keys)
    expected = their_walk(
        theirs, 20, lambda i: {"variance_noise": noise(i)} if eta else {}, x_1, eta=eta
    )
    assert_close(walk(theirs, 20, Leading(), DDIM(eta), keys, x_1), expected)


def test_ddim_walks_as_theirs_does_to_a_clean_end(keys, x_1):
    theirs = scheduler("DDIM", timestep_spacing="trailing", prediction_type="v_prediction")
    expected = their_walk(theirs, 25, lambda i: {}, x_1)
    assert_close(walk(theirs, 25, Trailing(), DDIM(), keys, x_1), expected)


@pytest.mark.parametrize(
    ("predicted", "name", "spacing"),
    [
        ("epsilon", "leading", Leading(offset=0, ends_clean=True)),
        ("sample", "linspace", Linspace()),
        ("v_prediction", "trailing", Trailing()),
    ],
)
def test_ddpm_walks_as_theirs(keys, x_1, predicted, name, spacing, monkeypatch):
    from diffusers.schedulers import scheduling_ddpm

    noise, drawn = noises(keys), []

    def ready(i):
        drawn[:] = [noise(i)]
        return {}

    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: drawn[0])
    theirs = scheduler("DDPM", prediction_type=predicted, timestep_spacing=name)
    expected = their_walk(theirs, 20, ready, x_1)
    assert_close(walk(theirs, 20, spacing, DDPM(), keys, x_1), expected)
