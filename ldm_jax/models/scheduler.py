"""A model's schedule, prediction and spacing, as diffusers' `scheduler_config.json` says them."""

from typing import Any

from ldm_jax.diffusion import Discrete, Leading, Linspace, ScaledLinear, Schedule, Spacing, Trailing

PREDICTION_TYPES = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}


def to_diffusers(schedule: Schedule, prediction: str, spacing: Spacing) -> dict[str, Any]:
    """The config of a DDIMScheduler that walks as our DDIM does.

    Raises:
      ValueError: continuous time, or a prediction of the velocity, neither of which it knows.
    """
    if prediction not in PREDICTION_TYPES:
        raise ValueError(
            f"a DDIMScheduler knows no prediction {prediction!r}; it can be {', '.join(PREDICTION_TYPES)}"
        )
    return {
        "_class_name": "DDIMScheduler",
        **_betas(schedule),
        **_spacing(spacing),
        "prediction_type": PREDICTION_TYPES[prediction],
        "clip_sample": False,
        "thresholding": False,
    }


def _betas(schedule: Schedule) -> dict[str, Any]:
    if isinstance(schedule, ScaledLinear):
        return {
            "beta_schedule": "scaled_linear",
            "beta_start": schedule.beta_start,
            "beta_end": schedule.beta_end,
            "trained_betas": None,
            "num_train_timesteps": schedule.steps,
            "rescale_betas_zero_snr": schedule.zero_terminal_snr,
        }
    if isinstance(schedule, Discrete):
        return {
            "trained_betas": list(schedule.betas),
            "num_train_timesteps": schedule.steps,
            "rescale_betas_zero_snr": False,
        }
    raise ValueError(
        f"a DDIMScheduler needs discrete noise levels, ScaledLinear or Discrete; the schedule is {schedule}"
    )


def _spacing(spacing: Spacing) -> dict[str, Any]:
    match spacing:
        case Leading(offset, ends_clean, 0):
            kind = "leading"
        case Trailing(ends_clean):
            kind, offset = "trailing", 0
        case Linspace(0):
            kind, offset, ends_clean = "linspace", 0, True
        case _:
            raise ValueError(
                f"a DDIMScheduler walks indices, by Leading, Trailing or Linspace; the spacing is {spacing}"
            )
    return {"timestep_spacing": kind, "steps_offset": offset, "set_alpha_to_one": ends_clean}
