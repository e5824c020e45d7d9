"""A model's schedule, prediction and spacing, as diffusers' `scheduler_config.json` says them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.diffusion import Discrete, Leading, Linspace, ScaledLinear, Schedule, Spacing, Trailing
from ldm_jax.diffusion.schedules import zero_terminal_snr
from ldm_jax.models.json_files import Fields, naming, typed

PREDICTION_TYPES = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}
# diffusers' values where its file is silent.
FIELDS: Fields = {
    "beta_schedule": (str, "linear"),
    "beta_start": (float, 0.0001),
    "beta_end": (float, 0.02),
    "trained_betas": (tuple[float, ...] | None, None),
    "num_train_timesteps": (int, 1000),
    "rescale_betas_zero_snr": (bool, False),
    "prediction_type": (str, "epsilon"),
    "timestep_spacing": (str, "leading"),
    "steps_offset": (int, 0),
    "set_alpha_to_one": (bool, True),
}


def from_diffusers(values: Mapping[str, Any], where: Path) -> tuple[Schedule, str, Spacing]:
    """Returns the schedule, the prediction and the spacing of a scheduler_config.json with discrete noise levels.

    Raises:
      ValueError: a value of another type, or a schedule, prediction or spacing that there is not here.
    """
    with naming(where):
        fields = typed(values, FIELDS, free=("steps_offset",))
        names = {theirs: ours for ours, theirs in PREDICTION_TYPES.items()}
        if fields["prediction_type"] not in names:
            raise ValueError(
                f"prediction_type is {fields['prediction_type']!r}; it can be {', '.join(names)}"
            )
        return _schedule(fields), names[fields["prediction_type"]], _spacing_of(fields)


def _schedule(fields: Mapping[str, Any]) -> Schedule:
    steps, stretched = fields["num_train_timesteps"], fields["rescale_betas_zero_snr"]
    ends = fields["beta_start"], fields["beta_end"]
    if (betas := fields["trained_betas"]) is None:
        if fields["beta_schedule"] == "scaled_linear":
            return ScaledLinear(steps, *ends, zero_terminal_snr=stretched)
        if fields["beta_schedule"] != "linear":
            raise ValueError(
                f"beta_schedule is {fields['beta_schedule']!r}; it can be scaled_linear or linear"
            )
        betas = tuple(np.linspace(*ends, steps, dtype=np.float32).astype(float).tolist())
    return Discrete(zero_terminal_snr(betas) if stretched else betas)


def _spacing_of(fields: Mapping[str, Any]) -> Spacing:
    ends_clean = fields["set_alpha_to_one"]
    match fields["timestep_spacing"]:
        case "leading":
            return Leading(fields["steps_offset"], ends_clean)
        case "trailing":
            return Trailing(ends_clean)
        case "linspace":
            return Linspace()
        case other:
            raise ValueError(
                f"timestep_spacing is {other!r}; it can be leading, trailing or linspace"
            )


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
