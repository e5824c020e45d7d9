"""A folder of photographs with captions, on one machine.

    python -m ldm_jax.encode --config=configs/photos.py --config.data.source=folder:/photos --workdir=runs/photos
    python -m ldm_jax.train --workdir=runs/photos
    python -m ldm_jax.sample --workdir=runs/photos --prompt="a dog on a beach"

As it stands it uses the embedded models, which know scenes, not photographs: it shows that the path works. For
pictures worth looking at give `--config.pretrained=` a directory in Stable Diffusion's layout, and with it
`--config.data.size=256`, `--config.backbone.unet.text_width=768` (Stable Diffusion 1.5; 1024 for 2.1) and the channels
that the accelerator has room for. There is no expected result: it depends on the photographs.
"""

from ldm_jax.models.unet_config import UNetConfig
from ldm_jax.runs.config import DataConfig, EvalConfig, RunConfig, SamplingConfig, TrainConfig
from ldm_jax.settings.schema import to_config_dict
from ldm_jax.training.optimizer import OptimizerConfig


def get_config():
    """The config of a small run on one's own pictures."""
    return to_config_dict(
        RunConfig(
            data=DataConfig(source="folder:photos"),
            backbone=UNetConfig(
                channels=(64, 128),
                num_res_blocks=2,
                transformer_depth=(1, 1),
                head_width=32,
                text_width=64,
                num_groups=16,
                sample_size=8,
            ),
            optimizer=OptimizerConfig(learning_rate=1e-3, warmup_examples=6_400),
            train=TrainConfig(examples=500_000, batch=64, ema=20_000.0),
            sampling=SamplingConfig(steps=50, guidance=4.0),
            eval=EvalConfig(every=50_000, prompts="captions:16", shown=16),
        )
    )
