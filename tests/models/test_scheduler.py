"""A schedule and its spacing as diffusers reads them."""

import numpy as np
import pytest

from ldm_jax.diffusion import Karras, Leading, Linspace, ScaledLinear, Trailing, grid
from ldm_jax.models.scheduler import to_diffusers


@pytest.mark.parametrize("zero", [False, True])
def test_diffusers_reads_the_same_levels(zero):
    diffusers = pytest.importorskip("diffusers")
    schedule = ScaledLinear(zero_terminal_snr=zero)
    config = to_diffusers(schedule, "v", Trailing())
    theirs = diffusers.DDIMScheduler.from_config(config)
    theirs.set_timesteps(10)
    points = grid(schedule, Trailing(), 10)
    np.testing.assert_array_equal(points.told[:-1], theirs.timesteps)
    levels = theirs.alphas_cumprod[theirs.timesteps].numpy()
    np.testing.assert_allclose(points.alpha[:-1] ** 2, levels, atol=1e-6)


@pytest.mark.parametrize("spacing", [Leading(skipped=1), Linspace(skipped=1), Karras()])
def test_a_spacing_that_a_ddim_scheduler_cannot_walk_is_refused(spacing):
    with pytest.raises(ValueError, match="by Leading, Trailing or Linspace; the spacing is"):
        to_diffusers(ScaledLinear(), "v", spacing)
