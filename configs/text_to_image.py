"""A backbone of the papers, trained as they trained it: `--config=configs/text_to_image.py:unet-866m`.

    python -m ldm_jax.encode --config=configs/text_to_image.py:unet-866m --workdir=RUN \
        --config.pretrained=/data/stable-diffusion-2-1 --config.data.source=tars:/data/*.tar
    python -m ldm_jax.train --workdir=RUN

The argument is a name of `ldm_jax.models.sizes` (`python -m ldm_jax.plan --table` lists them), or the width of one that
comes nearest to a cost: `unet@params=300e6`, `unet-sdxl@flops=2e11`. Paper A (arXiv:2404.01367) trains at 512 pixels,
500K steps of 2048, at a rate of 1e-4; B (arXiv:2404.02883) at 256 pixels, up to 600K steps of 2048, AdamW at 8e-5
after 10K steps of warm-up, in bfloat16. The schedule and predicting the noise are Stable Diffusion's, as are the rate
of empty captions and the average, which neither paper says.

There is no expected result here: the papers' data is not public. The autoencoder and the text encoder of `pretrained`
must fit the backbone: a text width of 1024 is Stable Diffusion 2.1's, 768 that of 1.5, 4096 T5-XXL's.
"""

import dataclasses

from ldm_jax.data.captions import CaptionPolicy
from ldm_jax.models.sizes import backbone
from ldm_jax.runs.config import DataConfig, EvalConfig, RunConfig, SamplingConfig, TrainConfig
from ldm_jax.settings.schema import to_config_dict
from ldm_jax.training.optimizer import OptimizerConfig

BATCH = 2048
PIXELS = 8  # of an image to one row or column of its latent


def get_config(name="unet-866m"):
    """The config of a size."""
    network = dataclasses.replace(backbone(name), remat="full")
    of_a = network.sample_size >= 64
    steps, rate, warmup = (500_000, 1e-4, 0) if of_a else (600_000, 8e-5, 10_000)
    return to_config_dict(
        RunConfig(
            data=DataConfig(size=PIXELS * network.sample_size),
            captions=CaptionPolicy(dropout=0.1),
            text_precision="bfloat16",
            backbone=network,
            prediction="eps",
            optimizer=OptimizerConfig(learning_rate=rate, warmup_examples=warmup * BATCH),
            train=TrainConfig(
                examples=steps * BATCH,
                batch=BATCH,
                precision="bfloat16",
                ema=10_000.0 * BATCH,
                log_every=100 * BATCH,
                save_every=5_000 * BATCH,
            ),
            sampling=SamplingConfig(steps=50, guidance=7.5),
            eval=EvalConfig(every=25_000 * BATCH, prompts="captions:256"),
        )
    )
