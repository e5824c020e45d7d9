"""The same walks as diffusers' schedulers, state by state, from their own f32 betas."""

import runpy
import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import (
    DDIM,
    DDPM,
    LCM,
    PREDICTIONS,
    Discrete,
    Distilled,
    DPMpp,
    Euler,
    EulerAncestral,
    Even,
    Heun,
    Karras,
    Leading,
    Linspace,
    LogSNR,
    RectifiedFlow,
    Trailing,
    denoiser,
    grid,
    samplers,
)

GOLDENS = Path(__file__).parent.parent / "goldens"
SD = Leading()  # with DDIM; other schedulers go on to the clean image
CLEAN = Leading(ends_clean=True)
DPM = Leading(ends_clean=True, skipped=1)
DPM_TO_MIN = Leading(skipped=1)
SD3 = RectifiedFlow(shift=3.0)


class FlowOfDPMSolver(NamedTuple):
    """Their DPM-Solver's own grid for rectified flow: whole numbers told, and no pure noise."""

    def __call__(self, schedule, steps):
        points = schedule(np.linspace(0.999, 0, steps + 1))
        return points._replace(told=np.floor(points.told))


# name: (sampler, spacing, prediction), from the betas unless there is a schedule
OURS = {
    "ddim sd": (DDIM(), SD, "eps"),
    "ddim sd2 eta": (DDIM(eta=0.6), SD, "v"),
    "ddim zero snr": (DDIM(), Trailing(), "v"),
    "ddpm sd": (DDPM(), CLEAN, "eps"),
    "ddpm sd2": (DDPM(), Trailing(), "v"),
    "dpmpp 1": (DPMpp(order=1), DPM, "eps"),
    "dpmpp 2 sd": (DPMpp(), DPM, "eps"),
    "dpmpp 2 sd few": (DPMpp(), DPM, "eps"),
    "dpmpp 2 heun": (DPMpp(solver="heun"), DPM, "eps"),
    "dpmpp 2 heun few": (DPMpp(solver="heun"), DPM, "eps"),
    "dpmpp 2 trailing": (DPMpp(), Trailing(), "v"),
    "dpmpp 2 linspace": (DPMpp(), Linspace(skipped=1), "x_0"),
    "dpmpp 2 to min": (DPMpp(), DPM_TO_MIN, "eps"),
    "dpmpp 2 to min few": (DPMpp(), DPM_TO_MIN, "eps"),
    "dpmpp 2 to min few as ever": (DPMpp(lower_order_final=False), DPM_TO_MIN, "eps"),
    "dpmpp 2 karras": (DPMpp(), Karras(whole=True), "eps"),
    "dpmpp 2 lu": (DPMpp(), LogSNR(whole=True), "eps"),
    "dpmpp 2 zero snr": (DPMpp(), Trailing(), "v"),
    "dpmpp 2 sd3": (DPMpp(), FlowOfDPMSolver(), "velocity", SD3),
    "euler sdxl": (Euler(), CLEAN, "eps"),
    "euler trailing": (Euler(), Trailing(), "v"),
    "euler linspace": (Euler(), Linspace(between=True), "eps"),
    "euler karras": (Euler(), Karras(), "eps"),
    "euler exponential": (Euler(), LogSNR(), "eps"),
    "euler ancestral sdxl": (EulerAncestral(), CLEAN, "eps"),
    "euler ancestral linspace": (EulerAncestral(), Linspace(between=True), "eps"),
    "euler ancestral trailing": (EulerAncestral(), Trailing(), "v"),
    "heun sdxl": (Heun(variable="ratio"), CLEAN, "eps"),
    "heun trailing": (Heun(variable="ratio"), Trailing(), "v"),
    "heun linspace": (Heun(variable="ratio"), Linspace(between=True), "v"),
    "heun karras": (Heun(variable="ratio"), Karras(), "eps"),
    "lcm": (LCM(), Distilled(), "eps"),
    "lcm v": (LCM(), Distilled(), "v"),
    "flow euler sd3": (Euler(), Even(last=3 / 1002), "velocity", SD3),
    "flow euler": (Euler(), Even(last=1 / 1000), "velocity", RectifiedFlow()),
    "flow heun sd3": (Heun(), Even(last=3 / 1002), "velocity", SD3),
}


def apply(params, x, told, context):
    """The network that diffusers walked."""
    return jnp.tanh(0.7 * x + jnp.sin(told / 300)[:, None, None, None])


def trajectory(name, betas, x_1, noises, steps, monkeypatch):
    """Our states [steps, ...] after each step."""
    sampler, spacing, prediction, *schedule = OURS[name]
    schedule = schedule[0] if schedule else Discrete(tuple(betas.astype(np.float64).tolist()))
    noise_of = lambda keys, i, shape: jnp.asarray(noises)[i]  # noqa: E731
    monkeypatch.setattr(samplers, "step_noise", noise_of)
    denoise = denoiser(apply, None, None, prediction=PREDICTIONS[prediction])
    points, keys = grid(schedule, spacing, steps), jax.random.split(jax.random.key(0), len(x_1))

    def body(state, i):
        state = sampler.step(denoise, *state, points, i, keys)
        return state, state[0]

    @jax.jit
    def walk(x_1):
        return jax.lax.scan(body, (x_1, sampler.init(x_1)), jnp.arange(steps))[1]

    return walk(x_1)


def betas_of(name, betas):
    """Their betas as they use them: at no signal some schedulers leave a variance of 2^-24."""
    betas = betas.astype(np.float64)
    if name == "dpmpp 2 zero snr":
        betas[-1] = 1 - 2.0**-24 / np.prod(1 - betas[:-1])
    return betas


def check_states(ours, theirs):
    scale = abs(theirs).max(axis=(1, 2, 3, 4), keepdims=True)
    np.testing.assert_array_less(abs(np.asarray(ours) - theirs) / scale, 1e-5)


@pytest.fixture(scope="module")
def goldens():
    with np.load(GOLDENS / "samplers" / "trajectories.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def make():
    """The script that wrote them, if diffusers is there."""
    pytest.importorskip("diffusers")
    return runpy.run_path(str(GOLDENS / "make_sampler_goldens.py"))


@pytest.mark.parametrize("name", OURS)
def test_every_state_is_that_of_diffusers(name, goldens, monkeypatch):
    betas = betas_of(name, goldens["betas zero snr" if "zero snr" in name else "betas"])
    theirs = goldens[name]
    found = trajectory(name, betas, goldens["x_1"], goldens["noises"], len(theirs), monkeypatch)
    check_states(found, theirs)


@pytest.mark.parametrize("name", OURS)
def test_every_state_is_that_of_live_diffusers(name, make, monkeypatch):
    """From other noise, and more steps of it where that is no other rule."""
    x_1, noises = make["draw"](1, (3, 4, 4, 2))
    steps = 8 if "few" in name else 25
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = make["trajectory"](name, x_1, noises, steps)
        betas = getattr(make["scheduler"](name), "betas", None)
    betas = None if betas is None else betas_of(name, betas.numpy())
    check_states(trajectory(name, betas, x_1, noises, steps, monkeypatch), theirs)


def test_every_case_of_the_goldens_is_compared(goldens):
    assert {"x_1", "noises", "betas", "betas zero snr", *OURS} == set(goldens)
