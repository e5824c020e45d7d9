"""What a run is: one frozen dataclass for all commands, composed of the components' own.

`configs/*.py` make a `RunConfig` and give `get_config() -> ConfigDict`; `ldm_jax.settings.schema` converts
between the two, and `ldm_jax.settings.command_line` is the command line over both.
"""

import dataclasses
import re
from typing import Any

from etils import epath

from ldm_jax.data.captions import CaptionPolicy
from ldm_jax.data.sources import ON_DISK
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
)
from ldm_jax.evals import METRICS
from ldm_jax.evals.networks import SCORING
from ldm_jax.evals.prompt_sets import PROMPT_SETS
from ldm_jax.files.durable import write_atomically
from ldm_jax.models import BACKBONES, Backbone
from ldm_jax.models.computation import PRECISIONS
from ldm_jax.models.unet_config import UNetConfig
from ldm_jax.parallel.mesh import MeshConfig
from ldm_jax.settings.fields import (
    IMAGES,
    NOTHING,
    PARAMETERS,
    SCORES,
    check_fields,
    choice,
    one_of,
    setting,
)
from ldm_jax.settings.paths import absolute_path
from ldm_jax.settings.ranges import SEEDS
from ldm_jax.settings.schema import (
    CONFIG_FILE,
    config_difference,
    deciding,
    from_json,
    to_json,
    values,
    with_absolute_paths,
)
from ldm_jax.tasks import OBJECTIVES, Objective
from ldm_jax.tasks.pretraining import Pretraining
from ldm_jax.training.optimizer import OptimizerConfig

COUNTED = 4294967295  # examples; a state counts them in 32 bits
EMBEDDED = "embedded"
WEIGHTS = ("ema", "raw")
_DATA_DIR = re.compile(r"(?<=[?&]data_dir=)[^&]+")  # where TensorFlow's datasets are


def _pretrained(text: str) -> str:
    return text if text == EMBEDDED else absolute_path(text)


def absolute_location(text: str) -> str:
    """A source, a prompt set or a file of features, from any directory: its path is absolute, where it has one.

    Raises ValueError as `absolute_path`.
    """
    name, colon, rest = text.partition(":")
    if colon and name in (*ON_DISK, *PROMPT_SETS):
        path, options = re.fullmatch(r"(.*?)(\?\w+=.*)?", rest, re.DOTALL).groups(default="")
        return f"{name}:{absolute_path(path)}{options}" if path else text
    if name == "tfds":
        return _DATA_DIR.sub(lambda found: absolute_path(found[0]), text)
    return absolute_path(text) if text.endswith(".npz") else text


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Images and captions, and the latents made of them."""

    # folder:PATH, tfds:NAME, tars:GLOB or scenes:PRESET, with ?option=value&...
    source: str = setting("scenes:simple", path=absolute_location)
    # source of the validation loss; none: the first training records
    validation: str | None = setting(None, path=absolute_location, decides=(IMAGES, SCORES))
    # directory of the latents; none: WORKDIR/latents
    records: str | None = setting(None, path=absolute_path, decides=NOTHING)
    # side of the images in pixels
    size: int = setting(64, within="[1, inf)", decides=(PARAMETERS, IMAGES, SCORES))
    # store the captions' embeddings with the latents, and train on them
    text_embeddings: bool = setting(False, decides=(PARAMETERS, SCORES))
    # images that the autoencoder takes at a time
    encode_batch: int = setting(32, within="[1, inf)", decides=NOTHING)
    # items behind one file of latents
    items_per_shard: int = setting(4096, within="[1, inf)", decides=NOTHING)
    # pixels of the shorter side below which an image is skipped
    min_side: int = setting(16, within="[1, inf)")
    max_caption: int = setting(4000, within="[1, inf)")  # characters above which it is skipped
    # share of skipped items above which encoding is an error
    max_skipped: float = setting(0.05, within="[0, 1]", decides=NOTHING)
    # threads that read and decode images, or latents
    workers: int = setting(2, within="[1, inf)", decides=NOTHING)

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How images are drawn from a model."""

    sampler: Sampler = choice(SAMPLERS, DDIM())  # the rule of a step
    spacing: Spacing = choice(SPACINGS, Trailing())  # which points of the schedule it visits
    # steps of the walk: network evaluations (heun: two a step), in pairs with guidance
    steps: int = setting(50, within="[1, inf)")
    guidance: float = setting(7.5, within="(-inf, inf)")  # scale of classifier-free guidance
    # noise levels sigma, of 0 to 1, with guidance; elsewhere it costs nothing
    guidance_interval: tuple[float, float] = setting(EVERYWHERE, within="[0, 1]")
    # share of the contrast added by guidance that is taken back
    guidance_rescale: float = setting(0.0, within="[0, 1]")
    negative: str = ""  # prompt that guidance leads away from
    batch: int = setting(32, within="[1, inf)", decides=NOTHING)  # images drawn at a time
    # latent rows and columns decoded at a time, for large images; 0: all at once
    tile: int = setting(0, within="[0, inf)")

    def __post_init__(self) -> None:
        check_fields(self)
        check_interval(self.guidance_interval)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training run."""

    examples: int = setting(1_000_000, within=f"[1, {COUNTED}]")  # length of the run
    # examples a step, on all devices together
    batch: int = setting(64, within=f"[1, {COUNTED}]")
    # parts that a batch is taken in, to save memory
    accumulate: int = setting(1, within="[1, inf)")
    # of the network's computation; parameters are float32
    precision: str = one_of(PRECISIONS, "float32", decides=(PARAMETERS, IMAGES))
    # half-life of the average of the parameters, in examples; 0: no average
    ema: float = setting(50_000.0, within="[0, inf)")
    # losses of so many medians, 12 of 16 steps, stop the run
    explosion: float = setting(10.0, within="(1, inf)", decides=NOTHING)
    # examples between lines of metrics
    log_every: int = setting(5_000, within="[1, inf)", decides=NOTHING)
    # examples between checkpoints
    save_every: int = setting(50_000, within="[1, inf)", decides=NOTHING)
    keep: int = setting(3, within="[1, inf)", decides=NOTHING)  # checkpoints that are kept
    # trace from the first to the second count of examples
    profile: tuple[int, ...] = setting((), within="[0, inf)", count="0 or 2", decides=NOTHING)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.profile and not self.profile[0] < self.profile[1]:
            raise ValueError(
                f"profile is {self.profile}; it is two counts of examples, 0 <= first < second"
            )
        if (end := -(-self.examples // self.batch) * self.batch) > COUNTED:
            raise ValueError(
                f"examples is {self.examples}, which batches of {self.batch} end after {end}; the counter of examples"
                f" ends at {COUNTED}"
            )


_DIRECTORY = "  {0}: directory of this network that scores; none: {0}/ beside the pretrained models"
NetworkDirectories = dataclasses.make_dataclass(
    "NetworkDirectories",
    [(name, str | None, setting(None, path=absolute_path)) for name in SCORING],
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

    # examples between evaluations
    every: int = setting(100_000, within="[1, inf)", decides=NOTHING)
    # scenes:PRESET?count=64, captions:64 (of the data), or file:PATH, coco:PATH, parti:PATH, tifa:PATH
    prompts: str = setting(
        "scenes:simple?count=64", path=absolute_location, decides=(IMAGES, SCORES)
    )
    weights: str = one_of(WEIGHTS, "ema", decides=IMAGES)  # which parameters are evaluated
    shown: int = setting(16, within="[1, inf)", decides=NOTHING)  # images in the grid
    validation: int = setting(256, within="[0, inf)")  # records of the validation loss; 0: none
    # its noise levels, times
    levels: tuple[float, ...] = setting(
        (0.1, 0.3, 0.5, 0.7, 0.9), within="(0, 1)", count="[1, inf)"
    )
    metrics: tuple[str, ...] = one_of(METRICS, ())  # names of scores; none: all that can be had
    # images that scores of sets are compared with: a source as data.source, or what ldm_jax.reference wrote (.npz)
    reference: str | None = setting(None, path=absolute_location)
    networks: NetworkDirectories = NetworkDirectories()

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole run, from images to scores."""

    # of initialisation, data order, noise and captions
    seed: int = setting(0, within=SEEDS, decides=(PARAMETERS, IMAGES))
    # directory in Stable Diffusion's layout: autoencoder, text encoder, tokenizer
    pretrained: str = setting(EMBEDDED, path=_pretrained, decides=(PARAMETERS, IMAGES, SCORES))
    # of the text encoders: their parameters are held and computed in it
    text_precision: str = one_of(PRECISIONS, "float32", decides=(PARAMETERS, IMAGES))
    data: DataConfig = setting(DataConfig(), decides=PARAMETERS)
    captions: CaptionPolicy = setting(CaptionPolicy(), decides=PARAMETERS)
    # the network that is trained
    backbone: Backbone = choice(BACKBONES, UNetConfig(), decides=(PARAMETERS, IMAGES))
    # of the noise
    schedule: Schedule = choice(SCHEDULES, ScaledLinear(), decides=(PARAMETERS, IMAGES))
    prediction: str = one_of(PREDICTIONS, "v", decides=(PARAMETERS, IMAGES))  # of the network
    # distribution of the training time
    times: Times = choice(TIMES, Uniform(), decides=PARAMETERS)
    # where its uniform numbers come from
    draw: Draw = choice(DRAWS, Independent(), decides=PARAMETERS)
    # of the loss over noise levels
    weighting: Weighting = choice(WEIGHTINGS, Flat(), decides=PARAMETERS)
    optimizer: OptimizerConfig = setting(OptimizerConfig(), decides=PARAMETERS)
    train: TrainConfig = setting(TrainConfig(), decides=PARAMETERS)
    sampling: SamplingConfig = setting(SamplingConfig(), decides=IMAGES)
    eval: EvalConfig = setting(EvalConfig(), decides=SCORES)
    mesh: MeshConfig = setting(MeshConfig(), decides=NOTHING)
    # what training minimises
    objective: Objective = choice(OBJECTIVES, Pretraining(), decides=PARAMETERS)
    # directory of a run or of a pipeline in diffusers' layout, whose weights training starts from; none: fresh ones
    initial: str | None = setting(None, path=absolute_path, decides=PARAMETERS)

    def __post_init__(self) -> None:
        check_fields(self)

    @staticmethod
    def upgrade(content: dict[str, Any]) -> dict[str, Any]:
        """Moves the directories of scoring networks of an earlier config.json to `eval.networks`."""
        section = content.get("eval", {})
        if not isinstance(section, dict):  # which is refused with its path
            return content
        moved = {name: section[name] for name in SCORING if name in section}
        section = {name: value for name, value in section.items() if name not in moved}
        return content | {"eval": {"networks": moved} | section}


LENGTH = "train.examples"  # a run may be made longer
CHECKPOINTS = "checkpoints"  # the directory of a run that says that its training has begun


def claim(config: RunConfig, workdir: epath.PathLike, *, write: bool = True) -> None:
    """Writes the config of a run into its directory, where later commands find it; without `write` it is only compared.

    Until training has begun any setting may change; what the latents were made with their manifest checks. Then those
    may that decide neither parameters nor images, and the length of the run.

    Raises:
      ValueError: the directory holds another run, in the settings that the sentence names; or the run cannot have this
        length.
    """
    workdir = epath.Path(workdir)
    path = workdir / CONFIG_FILE
    if path.exists() and (workdir / CHECKPOINTS).exists():
        # With settings newer than the file, and paths that it may have as they were typed.
        before = with_absolute_paths(from_json(path.read_text(), RunConfig))
        _check_same(before, with_absolute_paths(config), workdir)
        _check_length(before, config, workdir)
    if write:
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(path, to_json(config).encode())


def _check_same(before: RunConfig, config: RunConfig, workdir: epath.Path) -> None:
    fixed = deciding(RunConfig, PARAMETERS, IMAGES) - {LENGTH}
    found = config_difference(to_json(before), to_json(config))
    if differences := [str(difference) for difference in found if difference.path in fixed]:
        free = [path for path in values(config) if path not in fixed]
        raise ValueError(
            f"{workdir} holds another run: {'; '.join(differences)}. Give the values it was begun with, or another "
            f"--workdir (only {', '.join(free)} may change)"
        )


def _check_length(before: RunConfig, config: RunConfig, workdir: epath.Path) -> None:
    old, new = before.train.examples, config.train.examples
    saved = (path.name for path in (workdir / CHECKPOINTS).iterdir())
    trained = max((int(name) for name in saved if name.isdigit()), default=0)
    if old == new or not trained:
        return
    if new < trained:
        raise ValueError(
            f"{LENGTH} is {new}, and the run in {workdir} has trained {trained} examples; give at least as many, or"
            " another --workdir"
        )
    if not config.optimizer.extendable:
        raise ValueError(
            f"{LENGTH} is {new}, and the run in {workdir} was begun with {old}: its rate ends with the run"
            f" (optimizer.schedule is {config.optimizer.schedule!r}) and would jump; give {old}, or another --workdir"
        )
