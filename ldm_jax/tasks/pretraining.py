"""Pretraining: to predict noise, image or velocity from noisy latents and a caption."""

from dataclasses import dataclass

from ldm_jax.diffusion import make_loss
from ldm_jax.diffusion.losses import Loss
from ldm_jax.tasks.objective import Objective, Run
from ldm_jax.types import Batch


@dataclass(frozen=True)
class Pretraining(Objective):
    """The denoising loss of latent diffusion (Rombach et al. 2022, arXiv:2112.10752, equation 2)."""

    def loss(self, run: Run) -> Loss:
        """Makes the loss of the run's schedule, prediction, times and weighting."""
        config = run.config
        return make_loss(
            run.apply,
            run.prepare,
            run.frozen.encode,
            schedule=config.schedule,
            prediction=run.prediction,
            times=config.times,
            draw=config.draw,
            weighting=config.weighting,
        )

    def needs(self, batch: Batch) -> str:
        """Says that captions are missing, if they are."""
        return "captions, as tokens or as embeddings" if batch.cond is None else ""
