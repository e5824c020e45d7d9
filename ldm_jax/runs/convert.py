"""Conversion: a pipeline in diffusers' layout from a run or another pipeline, a scoring network from its files."""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

from ldm_jax.files.buckets import in_bucket
from ldm_jax.models import Backbone, originals, scheduler, weights
from ldm_jax.models.clip import CLIPTextConfig
from ldm_jax.models.json_files import read_json
from ldm_jax.models.names import Names
from ldm_jax.models.networks import NAMES, Kind, described, make_network
from ldm_jax.models.pixart_config import PixArtConfig
from ldm_jax.models.t5 import T5Config
from ldm_jax.models.text import Text
from ldm_jax.models.unet_config import UNetConfig
from ldm_jax.parallel import MeshConfig
from ldm_jax.runs.config import RunConfig
from ldm_jax.runs.pretrained import pretrained_directory
from ldm_jax.runs.run import Run
from ldm_jax.settings.schema import CONFIG_FILE, from_json
from ldm_jax.types import Params

INDEX = "model_index.json"
FROZEN = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
NETWORKS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2")
UNET = ["diffusers", "UNet2DConditionModel"]
CLIP_TEXT, CLIP_TOKENIZER = ["transformers", "CLIPTextModel"], ["transformers", "CLIPTokenizer"]

Save = Callable[[Path, Params, Names, Mapping[str, Any]], None]


def convert(
    sources: Sequence[epath.Path],
    to: epath.Path,
    *,
    dtype: str = "float32",
    max_shard_size: int = weights.MAX_SHARD_SIZE,
    which: str | None = None,
) -> list[str]:
    """Writes the directory beside its place, and moves it there once it is whole; returns the names in it.

    `dtype` is of the weights, `max_shard_size` in bytes, and `which` parameters of a run are "ema" or "raw".

    Raises:
      ValueError: `to` exists or is in a bucket; all else as `from_any`.
    """
    if in_bucket(to):
        raise ValueError(f"--to={to} is in a bucket; write to a disk and copy from there")
    to = Path(to)
    if to.exists():
        raise ValueError(f"--to={to} exists; give a directory that there is not yet")
    save = functools.partial(weights.save, dtype=dtype, max_shard_size=max_shard_size)
    unfinished = to.with_name(to.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        from_any(sources, unfinished, save, which)
        unfinished.rename(to)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return sorted(path.name for path in to.iterdir())


def from_any(sources: Sequence[epath.Path], to: Path, save: Save, which: str | None) -> None:
    """Writes what `sources` hold: files of a network, or one directory."""
    source, *more = sources
    if more and not all(path.is_file() for path in sources):
        given = ", ".join(map(str, sources))
        raise ValueError(f"--from is given {len(sources)} times, which is for files alone: {given}")
    if (source / CONFIG_FILE).is_file() and not (source / INDEX).is_file():
        from_run(source, to, save, which)
        return
    if which:
        raise ValueError(f"--weights={which} is for runs; {source} is none")
    if source.is_file():
        from_files(sources, to, save)
    else:
        from_pipeline(source, to, save)


def from_files(files: Sequence[epath.Path], to: Path, save: Save) -> None:
    """A network of the files that its authors released.

    Raises:
      ValueError: a file in a bucket, or one that is no file of torch.save, or tensors that are no known network.
    """
    where = " and ".join(map(str, files))
    if any(map(in_bucket, files)):
        raise ValueError(f"--from={where} is in a bucket; files are read from a disk: copy it")
    tensors = [pair for file in files for pair in originals.read(file)]
    kind, config = originals.described(dict(tensors), where)
    read = functools.partial(weights.fitted, tensors, where=where)
    write_network(kind, config, read, to, save)


def from_pipeline(source: epath.PathLike, to: Path, save: Save) -> None:
    """Every network of a pipeline read and written; all else copied.

    Raises:
      FileNotFoundError, ValueError: no pipeline on a disk, or a network in it that cannot be read whole.
    """
    if in_bucket(source):
        raise ValueError(f"--from={source} is no run, and a pipeline is read from a disk: copy it")
    source = Path(source)
    if not (source / INDEX).is_file():
        raise FileNotFoundError(
            f"--from={source} is neither a run ({CONFIG_FILE}) nor a pipeline ({INDEX}), and no file"
        )
    read_json(source / INDEX)
    for path in sorted(source.iterdir()):
        if path.is_file():
            shutil.copy(path, to)
        else:
            copy(path, to / path.name, save)


def copy(source: Path, to: Path, save: Save) -> None:
    """One part of a pipeline: a network's weights are read into this library's form and written from it.

    Its config.json stays as it is, since diffusers and transformers need more of it than the network here does, such
    as `upcast_attention` in half precision.
    """
    if source.name not in NETWORKS:
        shutil.copytree(source, to)
        return
    kind, config = described(source)
    kept = weights.read_config(source)
    write_network(kind, config, functools.partial(weights.lazy, source), to, save, kept)


def write_network(
    kind: Kind,
    config: Any,
    read: Callable[[Params, Names], Params],
    to: Path,
    save: Save,
    kept: Mapping[str, Any] | None = None,
) -> None:
    """Writes a network's directory with the parameters that `read(like, names)` returns.

    Its config.json holds `kept`, and otherwise what the config says; of either, the class is that of what is written.
    """
    like = jax.eval_shape(make_network(config).init, jax.random.key(0))
    names, values = kind.names(config), kind.write(config)
    named = {name: values[name] for name in NAMES if name in values}
    save(to, read(like, names), names, {**(values if kept is None else kept), **named})


def from_run(workdir: epath.Path, to: Path, save: Save, which: str | None) -> None:
    """The backbone of the newest checkpoint, the frozen models beside it, and the scheduler.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: diffusers has no such pipeline, or no scheduler for the run's schedule.
    """
    config = from_json((workdir / CONFIG_FILE).read_text(), RunConfig)
    if which:
        config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, weights=which))
    config = dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=-1))  # whatever the run had
    run = Run(config, workdir)
    backbone = config.backbone
    index = model_index(backbone, run.frozen.text)
    steps = scheduler.to_diffusers(config.schedule, config.prediction, config.sampling.spacing)
    _, params = run.weights()
    name = "unet" if isinstance(backbone, UNetConfig) else "transformer"
    save(to / name, params, backbone.names, backbone.to_diffusers())
    directory = pretrained_directory(config)
    for part in filter(Path.is_dir, (directory / name for name in FROZEN)):
        copy(part, to / part.name, save)
    write_json(to / "scheduler" / "scheduler_config.json", steps)
    write_json(to / INDEX, index)


def model_index(backbone: Backbone, text: Text) -> dict[str, Any]:
    """What `model_index.json` holds: the pipeline's class, and the class of each of its parts.

    Raises:
      ValueError: diffusers has no pipeline of these.
    """
    parts = {"vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", "DDIMScheduler"]}
    clip = {"text_encoder": CLIP_TEXT, "tokenizer": CLIP_TOKENIZER}
    match backbone, text.configs:
        case UNetConfig(pooled_width=0), (CLIPTextConfig(),):
            return {
                "_class_name": "StableDiffusionPipeline",
                "unet": UNET,
                **parts,
                **clip,
                **absent("safety_checker", "feature_extractor", "image_encoder"),
                "requires_safety_checker": False,
            }
        case UNetConfig(), (CLIPTextConfig(), CLIPTextConfig()):
            return {
                "_class_name": "StableDiffusionXLPipeline",
                "unet": UNET,
                **parts,
                **clip,
                "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
                "tokenizer_2": CLIP_TOKENIZER,
                **absent("feature_extractor", "image_encoder"),
                "force_zeros_for_empty_prompt": False,
            }
        case PixArtConfig(), (T5Config(),):
            return {
                "_class_name": "PixArtAlphaPipeline",
                "transformer": ["diffusers", "PixArtTransformer2DModel"],
                **parts,
                "text_encoder": ["transformers", "T5EncoderModel"],
                "tokenizer": ["transformers", "T5Tokenizer"],
            }
    encoders = " and ".join(type(config).__name__ for config in text.configs)
    raise ValueError(f"diffusers has no pipeline of a {type(backbone).__name__} and {encoders}")


def absent(*parts: str) -> dict[str, Any]:
    """How an index says that a pipeline has no such part."""
    return {part: [None, None] for part in parts}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes `content`, and the directory that it is in."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
