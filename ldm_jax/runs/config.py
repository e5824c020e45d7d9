"""What a run is: one frozen dataclass for all commands, composed of the components' own.

`configs/*.py` make a `RunConfig` and give `get_config() -> ConfigDict`; `ldm_jax.settings.schema` converts
between the two, and `ldm_jax.settings.command_line` is the command line over both.
"""

import dataclasses
import fnmatch
from typing import Any

from etils import epath

from ldm_jax.data.captions import CaptionPolicy
from ldm_jax.diffusion import (
    DDIM,
    DRAWS,
    EVERYWHERE,
    PREDICTIONS,
    SAMPLERS,
    SCHEDULES,
    SPACINGS,
    TIMES,
    WEIGHTINGS,
    Draw,
    Flat,
    Independent,
    Sampler,
    ScaledLinear,
    Schedule,
    Spacing,
    Times,
    Trailing,
    Uniform,
    Weighting,
    check_interval,
    check_rescale,
)
from ldm_jax.evals import METRICS
from ldm_jax.evals.networks import SCORING
from ldm_jax.files.durable import write_atomically
from ldm_jax.models import BACKBONES, Backbone
from ldm_jax.models.unet_config import UNetConfig
from ldm_jax.parallel.mesh import MeshConfig
from ldm_jax.settings.schema import (
    CONFIG_FILE,
    check_name,
    choice,
    config_difference,
    from_json,
    one_of,
    to_json,
)
from ldm_jax.tasks import OBJECTIVES, Objective
from ldm_jax.tasks.pretraining import Pretraining
from ldm_jax.training.optimizer import OptimizerConfig

EMBEDDED = "embedded"
PRECISIONS = ("float32", "bfloat16")
WEIGHTS = ("ema", "raw")


def _at_least_one(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it is at least 1")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Images and captions, and the latents made of them."""

    source: str = "scenes:simple"  # folder:PATH, tfds:NAME, tars:GLOB or scenes:PRESET, with ?option=value&...
    validation: str | None = None  # source of the validation loss; none: the first training records
    records: str | None = None  # directory of the latents; none: WORKDIR/latents
    size: int = 64  # side of the images in pixels
    text_embeddings: bool = (
        False  # store the captions' embeddings with the latents, and train on them
    )
    encode_batch: int = 32  # images that the autoencoder takes at a time
    items_per_shard: int = 4096  # items behind one file of latents
    min_side: int = 16  # pixels of the shorter side below which an image is skipped
    max_caption: int = 4000  # characters above which a caption is skipped
    max_skipped: float = 0.05  # share of skipped items above which encoding is an error
    workers: int = 2  # threads that read and decode images, or latents

    def __post_init__(self) -> None:
        _at_least_one(self, "size", "encode_batch", "items_per_shard", "workers")


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How images are drawn from a model."""

    sampler: Sampler = choice(SAMPLERS, DDIM())  # the rule of a step
    spacing: Spacing = choice(SPACINGS, Trailing())  # which points of the schedule it visits
    steps: int = (
        50  # steps of the walk: network evaluations (heun: two a step), in pairs with guidance
    )
    guidance: float = 7.5  # scale of classifier-free guidance
    guidance_interval: tuple[float, float] = (
        EVERYWHERE  # noise levels sigma, of 0 to 1, with guidance; elsewhere it costs nothing
    )
    guidance_rescale: float = (
        0.0  # share of the contrast added by guidance that is taken back, 0 to 1
    )
    negative: str = ""  # prompt that guidance leads away from
    batch: int = 32  # images drawn at a time
    tile: int = 0  # latent rows and columns decoded at a time, for large images; 0: all at once

    def __post_init__(self) -> None:
        _at_least_one(self, "steps", "batch")
        check_interval(self.guidance_interval)
        check_rescale(self.guidance_rescale)
        if self.tile < 0:
            raise ValueError(f"tile is {self.tile}; it is a number of latent rows, or 0")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training run."""

    examples: int = 1_000_000  # length of the run
    batch: int = 64  # examples a step, on all devices together
    accumulate: int = 1  # parts that a batch is taken in, to save memory
    precision: str = one_of(
        PRECISIONS, "float32"
    )  # of the network's computation; parameters are float32
    ema: float = 50_000.0  # half-life of the average of the parameters, in examples; 0: no average
    explosion: float = 10.0  # losses of so many medians, 12 of 16 steps, stop the run
    log_every: int = 5_000  # examples between lines of metrics
    save_every: int = 50_000  # examples between checkpoints
    keep: int = 3  # checkpoints that are kept
    profile: tuple[int, ...] = ()  # trace from the first to the second count of examples

    def __post_init__(self) -> None:
        names = ("examples", "batch", "accumulate", "log_every", "save_every", "keep")
        _at_least_one(self, *names)
        if self.profile and not (len(self.profile) == 2 and 0 <= self.profile[0] < self.profile[1]):
            raise ValueError(
                f"profile is {self.profile}; it is two counts of examples, 0 <= first < second"
            )


_DIRECTORY = "  {0}: directory of this network that scores; none: {0}/ beside the pretrained models"
NetworkDirectories = dataclasses.make_dataclass(
    "NetworkDirectories",
    [(name, str | None, None) for name in SCORING],
    frozen=True,
    namespace={
        "__doc__": "\n".join(
            ["Directories of networks.\n\nAttributes:", *map(_DIRECTORY.format, SCORING)]
        ),
        "__module__": __name__,
    },
)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation in the loop, and of `ldm_jax.evaluate`."""

    every: int = 100_000  # examples between evaluations
    # scenes:PRESET?count=64, captions:64 (of the data), or file:PATH, coco:PATH, parti:PATH, tifa:PATH
    prompts: str = "scenes:simple?count=64"
    weights: str = one_of(WEIGHTS, "ema")  # which parameters are evaluated
    shown: int = 16  # images in the grid
    validation: int = 256  # records of the validation loss; 0: none
    levels: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)  # its noise levels, times in (0, 1)
    metrics: tuple[str, ...] = ()  # names of scores; none: all that can be had
    # images that scores of sets are compared with: a source as data.source, or what ldm_jax.reference wrote (.npz)
    reference: str | None = None
    networks: NetworkDirectories = NetworkDirectories()

    def __post_init__(self) -> None:
        _at_least_one(self, "every", "shown")
        for name in self.metrics:
            check_name(name, METRICS, "eval.metrics")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole run, from images to scores."""

    seed: int = 0  # of initialisation, data order, noise and captions
    pretrained: str = (
        EMBEDDED  # directory in Stable Diffusion's layout: autoencoder, text encoder, tokenizer
    )
    text_precision: str = one_of(
        PRECISIONS, "float32"
    )  # of the text encoders: their parameters are held and computed in it
    data: DataConfig = DataConfig()
    captions: CaptionPolicy = CaptionPolicy()
    backbone: Backbone = choice(BACKBONES, UNetConfig())  # the network that is trained
    schedule: Schedule = choice(SCHEDULES, ScaledLinear())  # of the noise
    prediction: str = one_of(PREDICTIONS, "v")  # what the network predicts
    times: Times = choice(TIMES, Uniform())  # distribution of the training time
    draw: Draw = choice(DRAWS, Independent())  # where its uniform numbers come from
    weighting: Weighting = choice(WEIGHTINGS, Flat())  # of the loss over noise levels
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    sampling: SamplingConfig = SamplingConfig()
    eval: EvalConfig = EvalConfig()
    mesh: MeshConfig = MeshConfig()
    objective: Objective = choice(OBJECTIVES, Pretraining())  # what training minimises
    # directory of a run or of a pipeline in diffusers' layout, whose weights training starts from; none: fresh ones
    initial: str | None = None

    @staticmethod
    def upgrade(content: dict[str, Any]) -> dict[str, Any]:
        """Moves the directories of scoring networks of an earlier config.json to `eval.networks`."""
        section = dict(content.get("eval", {}))
        moved = {name: section.pop(name) for name in SCORING if name in section}
        return content | {"eval": {"networks": moved} | section}


# What a run may change when it continues; fnmatch patterns of dotted paths.
MAY_CHANGE = (
    "train.examples",
    "train.log_every",
    "train.save_every",
    "train.keep",
    "train.profile",
    "train.explosion",
    "eval.every",
    "eval.shown",
    "eval.metrics",
    "eval.reference",
    "eval.networks.*",
    "sampling.batch",
    "mesh.*",
    "data.workers",
    "data.encode_batch",
)
CHECKPOINTS = "checkpoints"  # the directory of a run that says that its training has begun


def claim(config: RunConfig, workdir: epath.PathLike, *, write: bool = True) -> None:
    """Writes the config of a run into its directory, where later commands find it; without `write` it is only compared.

    Until training has begun any setting may change; what the latents were made with is their manifest's business.

    Raises:
      ValueError: the directory holds another run; the sentence says in which settings.
    """
    workdir = epath.Path(workdir)
    path, text = workdir / CONFIG_FILE, to_json(config)
    if path.exists() and (workdir / CHECKPOINTS).exists():
        before = to_json(
            from_json(path.read_text(), RunConfig)
        )  # with settings newer than the file
        differences = [
            str(difference)
            for difference in config_difference(before, text)
            if not any(fnmatch.fnmatch(difference.path, pattern) for pattern in MAY_CHANGE)
        ]
        if differences:
            raise ValueError(
                f"{workdir} holds another run: {'; '.join(differences)}. Give the values it was begun with, or another "
                f"--workdir (only {', '.join(MAY_CHANGE)} may change)"
            )
    if write:
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
