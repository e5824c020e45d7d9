"""One to three objects a scene, in an hour on two cores: the embedded models, a UNet of 2.4M parameters."""

from ldm_jax.config import DataConfig, EvalConfig, RunConfig, SamplingConfig, TrainConfig
from ldm_jax.configuration import to_config_dict
from ldm_jax.data.captions import CaptionPolicy
from ldm_jax.diffusion import Weyl
from ldm_jax.models.unet_config import UNetConfig
from ldm_jax.training.optimizer import OptimizerConfig


def get_config():
    """The config of an hour on full scenes."""
    return to_config_dict(
        RunConfig(
            data=DataConfig(
                source="scenes:full?count=60000",
                validation="scenes:full?count=256&seed=1",
                encode_batch=64,
            ),
            captions=CaptionPolicy(dropout=0.1, alternatives=0.25),
            backbone=UNetConfig(
                channels=(48, 96),
                num_res_blocks=1,
                transformer_depth=(1, 1),
                head_width=24,
                text_width=64,
                num_groups=12,
                sample_size=8,
            ),
            prediction="v",
            draw=Weyl(),
            optimizer=OptimizerConfig(
                learning_rate=3e-3, warmup_examples=12_800, schedule="cosine", b2=0.99
            ),
            train=TrainConfig(
                examples=256_000,
                batch=64,
                ema=10_000.0,
                log_every=6_400,
                save_every=32_000,
            ),
            sampling=SamplingConfig(steps=20, guidance=3.0, batch=64),
            eval=EvalConfig(every=32_000, prompts="scenes:full?count=128", shown=32),
        )
    )
