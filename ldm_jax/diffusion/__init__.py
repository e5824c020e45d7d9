"""The mathematics of diffusion, with no network in it.

Any function `apply(params, x, told, context)` that returns an array like x can be trained with
`make_loss` and sampled with `denoiser` and `sample`.
"""

from ldm_jax.diffusion.draws import Draw, Independent, Weyl, gaussian
from ldm_jax.diffusion.grids import (
    Distilled,
    Even,
    Karras,
    Leading,
    Linspace,
    LogSNR,
    Spacing,
    Trailing,
    grid,
)
from ldm_jax.diffusion.guidance import (
    EVERYWHERE,
    Interval,
    Joined,
    Limited,
    check_interval,
    check_rescale,
    denoiser,
    join,
)
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
from ldm_jax.diffusion.samplers import DDIM, DDPM, LCM, Euler, EulerAncestral
from ldm_jax.diffusion.schedules import (
    Cosine,
    Discrete,
    RectifiedFlow,
    ScaledLinear,
    Schedule,
    zero_terminal_snr,
)
from ldm_jax.diffusion.solvers import DPMpp, Heun
from ldm_jax.diffusion.times import LogitNormal, Times, Uniform
from ldm_jax.diffusion.walk import (
    Progress,
    Sampler,
    calls,
    check_walk,
    evaluations,
    initial_noise,
    sample,
    walk_on_normal_data,
)

SCHEDULES = {"scaled_linear": ScaledLinear, "cosine": Cosine, "rectified_flow": RectifiedFlow}
PREDICTIONS = {"eps": eps, "x_0": x_0, "v": v, "velocity": velocity}
TIMES = {"uniform": Uniform, "logit_normal": LogitNormal}
DRAWS = {"independent": Independent, "weyl": Weyl}
WEIGHTINGS = {"flat": Flat, "min_snr": MinSNR}
SPACINGS = {
    "leading": Leading,
    "trailing": Trailing,
    "linspace": Linspace,
    "uniform": Even,
    "karras": Karras,
    "log_snr": LogSNR,
    "distilled": Distilled,
}
SAMPLERS = {
    "ddim": DDIM,
    "ddpm": DDPM,
    "dpmpp": DPMpp,
    "euler": Euler,
    "euler_ancestral": EulerAncestral,
    "heun": Heun,
    "lcm": LCM,
}

__all__ = [
    "DDIM",
    "DDPM",
    "DRAWS",
    "EVERYWHERE",
    "LCM",
    "PREDICTIONS",
    "SAMPLERS",
    "SCHEDULES",
    "SPACINGS",
    "TIMES",
    "WEIGHTINGS",
    "Cosine",
    "DPMpp",
    "Discrete",
    "Distilled",
    "Draw",
    "Euler",
    "EulerAncestral",
    "Even",
    "Flat",
    "Heun",
    "Independent",
    "Interval",
    "Joined",
    "Karras",
    "Leading",
    "Limited",
    "Linspace",
    "LogSNR",
    "LogitNormal",
    "Loss",
    "MinSNR",
    "Prediction",
    "Progress",
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
    "calls",
    "check_interval",
    "check_rescale",
    "check_walk",
    "denoiser",
    "determinant",
    "diffuse",
    "eps",
    "evaluations",
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
    "walk_on_normal_data",
    "x_0",
    "zero_terminal_snr",
]
