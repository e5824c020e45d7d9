"""Training that begins from a released pipeline in diffusers' layout: `--config=configs/released.py:DIRECTORY`.

    python -m ldm_jax.encode --config=configs/released.py:/data/stable-diffusion-v1-5 \
        --config.data.source=folder:/photos --workdir=runs/tuned
    python -m ldm_jax.train --workdir=runs/tuned

Networks, schedule, prediction and the size of the images are the pipeline's. The rate, the length and the batch are
chosen here, after what fine-tuning uses elsewhere: AdamW at 1e-5, constant, with an average. There is no expected
result, as the pictures are yours.
"""

import dataclasses

from ldm_jax.runs.config import EvalConfig, RunConfig, TrainConfig
from ldm_jax.runs.initial import pipeline_config
from ldm_jax.settings.schema import to_config_dict
from ldm_jax.training.optimizer import OptimizerConfig


def get_config(directory):
    """The config of a pipeline's directory."""
    config = RunConfig(
        optimizer=OptimizerConfig(learning_rate=1e-5, warmup_examples=500),
        train=TrainConfig(examples=50_000, batch=8, ema=5_000.0, log_every=400, save_every=5_000),
        eval=EvalConfig(every=10_000, prompts="captions:16"),
    )
    config = pipeline_config(directory, config)
    return to_config_dict(
        dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, batch=8))
    )
