"""Writes samplers/trajectories.npz beside this file: where diffusers' schedulers walk, step by step.

A made-up network is walked from the same noise by each scheduler, with the settings that Stable Diffusion, SDXL and
Stable Diffusion 3 come with and variants of them. The file holds the states after every step, as
alpha x_0 + sigma noise whatever scale a scheduler keeps, the noises, and their betas in float32. Needs diffusers:

    python tests/goldens/make_sampler_goldens.py
"""

import sys
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import numpy as np
import torch

STEPS = 50  # noises in the file, one a step
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEADING = BETAS | {"timestep_spacing": "leading", "steps_offset": 1}
TRAILING = BETAS | {"timestep_spacing": "trailing"}
LINSPACE = BETAS | {"timestep_spacing": "linspace"}
V = {"prediction_type": "v_prediction"}
X_0 = {"prediction_type": "sample"}
ZERO_SNR = TRAILING | V | {"rescale_betas_zero_snr": True}
TO_MIN = {"final_sigmas_type": "sigma_min"}
KARRAS, LU = {"use_karras_sigmas": True}, {"use_lu_lambdas": True}
FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
NOT_CLIPPED = {"clip_sample": False}
DDIM, DDPM, LCM = "DDIM", "DDPM", "LCM"
DPM, EULER, ANCESTRAL = "DPMSolverMultistep", "EulerDiscrete", "EulerAncestralDiscrete"
HEUN, FLOW_EULER = "HeunDiscrete", "FlowMatchEulerDiscrete"

# name: (scheduler, its settings, steps, what `step` is given besides)
CASES = {
    "ddim sd": (DDIM, LEADING | NOT_CLIPPED | {"set_alpha_to_one": False}, 20, {}),
    "ddim sd2 eta": (
        DDIM,
        LEADING | V | NOT_CLIPPED | {"set_alpha_to_one": False},
        20,
        {"eta": 0.6},
    ),
    "ddim zero snr": (DDIM, ZERO_SNR | NOT_CLIPPED, 20, {}),
    "ddpm sd": (DDPM, LEADING | NOT_CLIPPED, 20, {}),
    "ddpm sd2": (DDPM, TRAILING | V | NOT_CLIPPED, 20, {}),
    "dpmpp 1": (DPM, LEADING | {"solver_order": 1}, 20, {}),
    "dpmpp 2 sd": (DPM, LEADING, 20, {}),
    "dpmpp 2 sd few": (DPM, LEADING, 8, {}),
    "dpmpp 2 heun": (DPM, LEADING | {"solver_type": "heun"}, 20, {}),
    "dpmpp 2 heun few": (DPM, LEADING | {"solver_type": "heun"}, 8, {}),
    "dpmpp 2 trailing": (DPM, TRAILING | V, 20, {}),
    "dpmpp 2 linspace": (DPM, LINSPACE | X_0, 20, {}),
    "dpmpp 2 to min": (DPM, LEADING | TO_MIN, 20, {}),
    "dpmpp 2 to min few": (DPM, LEADING | TO_MIN, 8, {}),
    "dpmpp 2 to min few as ever": (DPM, LEADING | TO_MIN | {"lower_order_final": False}, 8, {}),
    "dpmpp 2 karras": (DPM, LEADING | KARRAS, 20, {}),
    "dpmpp 2 lu": (DPM, LEADING | LU, 20, {}),
    "dpmpp 2 zero snr": (DPM, ZERO_SNR, 20, {}),
    "dpmpp 2 sd3": (DPM, FLOW, 20, {}),
    "euler sdxl": (EULER, LEADING, 20, {}),
    "euler trailing": (EULER, TRAILING | V, 20, {}),
    "euler linspace": (EULER, LINSPACE, 15, {}),
    "euler karras": (EULER, LINSPACE | KARRAS, 20, {}),
    "euler exponential": (EULER, LINSPACE | {"use_exponential_sigmas": True}, 20, {}),
    "euler ancestral sdxl": (ANCESTRAL, LEADING, 20, {}),
    "euler ancestral linspace": (ANCESTRAL, LINSPACE, 15, {}),
    "euler ancestral trailing": (ANCESTRAL, TRAILING | V, 20, {}),
    "heun sdxl": (HEUN, LEADING, 10, {}),
    "heun trailing": (HEUN, TRAILING | V, 10, {}),
    "heun linspace": (HEUN, LINSPACE | V, 7, {}),
    "heun karras": (HEUN, LINSPACE | KARRAS, 10, {}),
    "lcm": (LCM, BETAS, 4, {}),
    "lcm v": (LCM, BETAS | V, 8, {}),
    "flow euler sd3": (FLOW_EULER, {"shift": 3.0}, 28, {}),
    "flow euler": (FLOW_EULER, {}, 10, {}),
    "flow heun sd3": ("FlowMatchHeunDiscrete", {"shift": 3.0}, 10, {}),
}


def network(x: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
    """It is not linear in anything."""
    return torch.tanh(0.7 * x + torch.sin(told / 300))


def scheduler(name: str):
    """The scheduler of a case."""
    import diffusers

    kind, settings, _, _ = CASES[name]
    return getattr(diffusers, f"{kind}Scheduler")(**settings)


def trajectory(name: str, x_1: np.ndarray, noises: np.ndarray, steps: int = 0) -> np.ndarray:
    """The states [steps, ...] after each step of a case, from the latent x_1."""
    kind, _, own_steps, options = CASES[name]
    theirs, steps = scheduler(name), steps or own_steps
    theirs.set_timesteps(steps)
    scaled = hasattr(theirs, "is_scale_input_called") or kind == HEUN  # these keep x / alpha
    ratios = theirs.sigmas.double() if scaled else torch.zeros(2 * steps)
    # A step of Heun's method is two of theirs, but for the last one.
    ends = (
        [2 * i + 1 for i in range(steps - 1)] + [2 * steps - 2] if "Heun" in kind else range(steps)
    )
    x, states, drawn = torch.from_numpy(x_1) * (1 + ratios[0] ** 2).float() ** 0.5, [], []
    module = sys.modules[type(theirs).__module__]
    with ExitStack() as stack:
        if hasattr(module, "randn_tensor"):
            stack.enter_context(
                mock.patch.object(module, "randn_tensor", lambda *_, **__: drawn[0])
            )
        for call, t in enumerate(theirs.timesteps):
            drawn[:] = [torch.from_numpy(noises[min(call, len(noises) - 1)])]
            told = torch.as_tensor(t, dtype=torch.float32)
            seen = theirs.scale_model_input(x, t) if scaled else x
            extra = {"variance_noise": drawn[0]} if options else {}
            x = theirs.step(network(seen, told), t, x, **options, **extra).prev_sample
            if call in ends:
                states.append((x / (1 + ratios[call + 1] ** 2) ** 0.5).float().numpy())
    return np.stack(states)


def draw(seed: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The first latent and the noises of the steps."""
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=s).astype(np.float32) for s in (shape, (STEPS, *shape)))


def main() -> None:
    """Writes the file."""
    x_1, noises = draw(0, (2, 3, 3, 1))
    states = {name: trajectory(name, x_1, noises) for name in CASES}
    betas = {
        "betas": scheduler("ddim sd").betas,
        "betas zero snr": scheduler("ddim zero snr").betas,
    }
    directory = Path(__file__).parent / "samplers"
    directory.mkdir(exist_ok=True)
    betas = {name: rows.numpy() for name, rows in betas.items()}
    np.savez_compressed(
        directory / "trajectories.npz", **states, **betas, **{"x_1": x_1, "noises": noises}
    )


if __name__ == "__main__":
    main()
