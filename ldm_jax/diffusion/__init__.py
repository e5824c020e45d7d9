"""The mathematics of diffusion, with no network in it.

Any function `apply(params, x, told, context)` that returns an array like x can be trained with
`make_loss` and sampled with `denoiser` and `sample`.
"""

from ldm_jax.diffusion.draws import Draw, Independent, Weyl, gaussian
from ldm_jax.diffusion.grids import Even, Leading, Linspace, Spacing, Trailing, grid
from ldm_jax.diffusion.guidance import denoiser, join
from ldm_jax.diffusion.losses import (
    Flat,
    Loss,
    MinSNR,
    ValidationLoss,
    Weighting,
    make_loss,
    make_validation_loss,
)
from ldm_jax.diffusion.predictions import (
    Prediction,
    determinant,
    diffuse,
    eps,
    solve,
    target,
    v,
    velocity,
    x_0,
)
from ldm_jax.diffusion.samplers import DDIM, DDPM, Sampler, initial_noise, sample
from ldm_jax.diffusion.schedules import Cosine, Discrete, RectifiedFlow, ScaledLinear, Schedule
from ldm_jax.diffusion.times import LogitNormal, Times, Uniform

SCHEDULES = {"scaled_linear": ScaledLinear, "cosine": Cosine, "rectified_flow": RectifiedFlow}
PREDICTIONS = {"eps": eps, "x_0": x_0, "v": v, "velocity": velocity}
TIMES = {"uniform": Uniform, "logit_normal": LogitNormal}
DRAWS = {"independent": Independent, "weyl": Weyl}
WEIGHTINGS = {"flat": Flat, "min_snr": MinSNR}
SPACINGS = {"leading": Leading, "trailing": Trailing, "linspace": Linspace, "uniform": Even}
SAMPLERS = {"ddim": DDIM, "ddpm": DDPM}

__all__ = [
    "DDIM",
    "DDPM",
    "DRAWS",
    "PREDICTIONS",
    "SAMPLERS",
    "SCHEDULES",
    "SPACINGS",
    "TIMES",
    "WEIGHTINGS",
    "Cosine",
    "Discrete",
    "Draw",
    "Even",
    "Flat",
    "Independent",
    "Leading",
    "Linspace",
    "LogitNormal",
    "Loss",
    "MinSNR",
    "Prediction",
    "RectifiedFlow",
    "Sampler",
    "ScaledLinear",
    "Schedule",
    "Spacing",
    "Times",
    "Trailing",
    "Uniform",
    "ValidationLoss",
    "Weighting",
    "Weyl",
    "denoiser",
    "determinant",
    "diffuse",
    "eps",
    "gaussian",
    "grid",
    "initial_noise",
    "join",
    "make_loss",
    "make_validation_loss",
    "sample",
    "solve",
    "target",
    "v",
    "velocity",
    "x_0",
]
