"""A whole run of a one-block model in seconds, for the tests that need one."""

from pathlib import Path

from ldm_jax import encode, evaluate, train
from ldm_jax.models.unet_config import UNetConfig
from ldm_jax.parallel import distributed
from ldm_jax.runs.config import DataConfig, EvalConfig, RunConfig, SamplingConfig, TrainConfig
from ldm_jax.settings.command_line import parse
from ldm_jax.settings.schema import to_json
from ldm_jax.training.optimizer import OptimizerConfig

TINY = RunConfig(
    data=DataConfig(source="scenes:simple?count=48", encode_batch=16, items_per_shard=16),
    backbone=UNetConfig(
        channels=(16,),
        num_res_blocks=1,
        transformer_depth=(1,),
        head_width=16,
        text_width=64,
        num_groups=4,
        sample_size=8,
    ),
    optimizer=OptimizerConfig(learning_rate=1e-3),
    train=TrainConfig(examples=64, batch=8, ema=16.0, log_every=16, save_every=32),
    sampling=SamplingConfig(steps=2, guidance=2.0, batch=8),
    eval=EvalConfig(every=32, prompts="scenes:simple?count=8", shown=8, validation=8),
)


FILE = """from ldm_jax.runs.config import RunConfig
from ldm_jax.settings.schema import from_json, to_config_dict


def get_config():
    return to_config_dict(from_json({text!r}, RunConfig))
"""


def given(directory: Path, config: RunConfig = TINY) -> str:
    """The flag `--config=FILE`, with a config file that was written for it."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "given.py"
    path.write_text(FILE.format(text=to_json(config)))
    return f"--config={path}"


def run(command, workdir: Path, *words: str, **options) -> None:
    """What `python -m ldm_jax.COMMAND --workdir=... WORDS` does, in this process."""
    if command in (train, evaluate):
        options["add_flags"] = getattr(command, "add_flags", distributed.add_flags)
    command.main(parse([f"--workdir={workdir}", *words], RunConfig, **options))


def run_whole(workdir: Path, config: RunConfig = TINY) -> None:
    """Encodes and trains."""
    run(encode, workdir, given(workdir, config))
    run(train, workdir)
