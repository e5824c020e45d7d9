"""From names to objects: what a `RunConfig` stands for. The only place that knows every part."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from ldm_jax import diffusion
from ldm_jax.config import CHECKPOINTS, RunConfig
from ldm_jax.data.latents import Autoencoder, Manifest, main_captions
from ldm_jax.data.loader import Loader, fixed_batch
from ldm_jax.evals.evaluator import Evaluator, Viewer, proceed
from ldm_jax.evals.generation import Generate, make_generate
from ldm_jax.evals.prompts import Prompts, read_prompts
from ldm_jax.metrics.resize import rounded
from ldm_jax.models import weights
from ldm_jax.models.axes import TABLE
from ldm_jax.models.networks import make_network
from ldm_jax.nn.functional import Functional
from ldm_jax.parallel import batch_share, jit, put_same, replicated, shardings
from ldm_jax.pretrained import Pretrained
from ldm_jax.scaling.records import in_bucket
from ldm_jax.training import State, abstract_state, init_state, make_optimizer, make_step
from ldm_jax.training.checkpoints import Checkpoints
from ldm_jax.training.step import Step
from ldm_jax.types import Batch, Cond, Params, Point


def make_backbone(config: RunConfig, pretrained: Pretrained) -> Functional:
    """The network that is trained, in the precision of the run.

    Raises:
      ValueError: it does not fit the text encoder, the autoencoder or the size of the images.
    """
    backbone = dataclasses.replace(config.backbone, dtype=config.train.precision)
    channels = pretrained.autoencoder.config.latent_channels
    fits = {
        "text_width": (backbone.text_width, pretrained.text.width),
        "in_channels": (backbone.in_channels, channels),
        "predicted_channels": (backbone.predicted_channels, channels),
    }
    if backbone.pooled_width:
        fits["pooled_width"] = backbone.pooled_width, pretrained.text.pooled_width
    for field, (given, wanted) in fits.items():
        if given != wanted:
            raise ValueError(
                f"the backbone's {field} is {given}, and the pretrained models have {wanted}"
            )
    side = config.data.size // pretrained.autoencoder.config.downsampling
    if side % backbone.multiple:
        raise ValueError(
            f"data.size is {config.data.size}, which gives latents of {side} rows; this backbone takes a multiple of"
            f" {backbone.multiple}"
        )
    return make_network(backbone)


def prepare(network: Functional) -> Callable[[Params, Cond], Any]:
    """What the network makes of a prompt, once."""
    return functools.partial(network.apply, method="prepare")


class Training(NamedTuple):
    """What `training.fit` needs: `step(state, frozen, batch)` is not jitted yet."""

    step: Step
    init: Callable[[], State]
    abstract: State


def make_training(
    config: RunConfig, network: Functional, pretrained: Pretrained, mesh: Mesh
) -> Training:
    """The step of a run, and its state, fresh or abstract, placed on the mesh."""
    loss = diffusion.make_loss(
        network.apply,
        prepare(network),
        pretrained.encode,
        schedule=config.schedule,
        prediction=diffusion.PREDICTIONS[config.prediction],
        times=config.times,
        draw=config.draw,
        weighting=config.weighting,
    )
    train = config.train
    tx = make_optimizer(config.optimizer, batch_size=train.batch, examples=train.examples)
    place = functools.partial(shardings, table=TABLE, rules=config.mesh.pairs, mesh=mesh)
    step = make_step(loss, tx, key(config, "train"), ema=train.ema, accumulate=train.accumulate)
    return Training(
        step,
        lambda: init_state(network.init, tx, key(config, "init"), place, ema=train.ema > 0),
        abstract_state(network.init, tx, place, ema=train.ema > 0),
    )


def load_weights(
    config: RunConfig,
    workdir: epath.PathLike,
    network: Functional,
    pretrained: Pretrained,
    mesh: Mesh,
) -> tuple[int, Params]:
    """The examples that the newest checkpoint has seen, and its parameters that `eval.weights` names.

    Raises:
      FileNotFoundError: there is no sound checkpoint.
    """
    field = "ema" if config.eval.weights == "ema" and config.train.ema else "params"
    abstract = make_training(config, network, pretrained, mesh).abstract
    checkpoints = Checkpoints(os.path.join(workdir, CHECKPOINTS))
    state = checkpoints.restore(abstract, only=(field, "examples"))
    return int(state.examples), getattr(state, field)


def key(config: RunConfig, use: str) -> jax.Array:
    """The run's key for one use: init, train, eval, sample."""
    number = int.from_bytes(hashlib.sha256(use.encode()).digest()[:4], "little")
    return jax.random.fold_in(jax.random.key(config.seed), number)


def records(config: RunConfig, workdir: epath.PathLike, part: str = "train") -> Path:
    """The directory of latents of a part, "train" or "validation".

    Raises:
      ValueError: it is in a bucket, which ArrayRecord can neither read nor write.
    """
    directory = config.data.records or os.path.join(workdir, "latents")
    if in_bucket(directory):
        raise ValueError(
            f"latents cannot be in {directory}, as ArrayRecord knows no buckets: give --config.data.records=DIRECTORY,"
            " on a disk or where the bucket is mounted (gcsfuse)"
        )
    return Path(directory) / part


def validation_records(config: RunConfig, workdir: epath.PathLike) -> Path:
    """The directory of latents that the validation loss, and prompts that are captions, come from."""
    return records(config, workdir, "validation" if config.data.validation else "train")


def autoencoder_of(pretrained: Pretrained) -> Autoencoder:
    """What a directory of latents must have been made by."""
    network = pretrained.autoencoder
    return Autoencoder(
        weights.fingerprint(network.params),
        network.config.shift_factor,
        network.config.scaling_factor,
    )


def make_loader(
    config: RunConfig, workdir: epath.PathLike, pretrained: Pretrained, mesh: Mesh
) -> Loader:
    """The training batches of this process.

    Raises:
      ValueError: the latents are missing, unfinished, or of another autoencoder or size.
    """
    directory = records(config, workdir)
    check_records(config, directory, pretrained)
    index, count = batch_share(mesh)
    return Loader(
        directory,
        batch=config.train.batch,
        seed=config.seed,
        policy=config.captions,
        tokenizer=None if config.data.text_embeddings else pretrained.text,
        process_index=index,
        process_count=count,
        threads=config.data.workers,
    )


def check_records(config: RunConfig, directory: Path, pretrained: Pretrained) -> Manifest:
    """The manifest of a directory of latents, if this run can use it; a ValueError says why not."""
    manifest = Manifest.read_from(directory)
    manifest.require(
        autoencoder=autoencoder_of(pretrained).fingerprint,
        text_encoder=weights.fingerprint(pretrained.text_params)
        if config.data.text_embeddings
        else "",
    )
    if manifest.size != config.data.size:
        raise ValueError(
            f"{directory} holds latents of images of {manifest.size} pixels, and data.size is {config.data.size}"
        )
    return manifest


def make_validation(
    config: RunConfig,
    workdir: epath.PathLike,
    network: Functional,
    pretrained: Pretrained,
    mesh: Mesh,
) -> Callable[..., dict[str, float]]:
    """`validate(params, frozen, pause=...) -> {noise level: loss}` on fixed records and noise; {} where none is wanted.

    What `pause` raises after a batch ends it.
    """
    if not config.eval.validation:
        return lambda params, frozen, pause=proceed: {}
    directory = validation_records(config, workdir)
    count = min(config.eval.validation, check_records(config, directory, pretrained).written)
    tokenizer = None if config.data.text_embeddings else pretrained.text
    size = config.sampling.batch
    parts = [
        fixed_batch(directory, [min(n, count - 1) for n in range(i, i + size)], tokenizer=tokenizer)
        for i in range(0, count, size)
    ]
    loss = diffusion.make_validation_loss(
        network.apply,
        prepare(network),
        pretrained.encode,
        schedule=config.schedule,
        prediction=diffusion.PREDICTIONS[config.prediction],
        levels=config.eval.levels,
    )

    @functools.partial(jit, mesh=mesh, out_shardings=replicated(mesh))
    def losses(params: Params, frozen: Params, part: Batch) -> jax.Array:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key(config, "eval"), part.index)
        return loss(params, frozen, part, keys)

    def validate(
        params: Params, frozen: Params, pause: Callable[[], None] = proceed
    ) -> dict[str, float]:
        found = []
        for part in parts:
            found.append(jax.device_get(losses(params, frozen, put_same(part, mesh))))
            pause()
        values = np.concatenate(found)[:count].mean(0, dtype=np.float64).tolist()
        return dict(zip(map(str, config.eval.levels), values, strict=True))

    return validate


def make_sampling(
    config: RunConfig, network: Functional, pretrained: Pretrained, **options: Any
) -> Generate:
    """The program from prompts to images that `config.sampling` describes; `options` as `make_generate` has them.

    Raises:
      ValueError: as `walk`.
    """
    sampling = config.sampling
    side = config.data.size // pretrained.autoencoder.config.downsampling
    return make_generate(
        network.apply,
        prepare(network),
        pretrained.encode,
        pretrained.decode,
        prediction=diffusion.PREDICTIONS[config.prediction],
        grid=walk(config),
        sampler=sampling.sampler,
        shape=(side, side, pretrained.autoencoder.config.latent_channels),
        rescale=sampling.guidance_rescale,
        interval=sampling.guidance_interval,
        **options,
    )


def walk(config: RunConfig) -> Point:
    """The points that `config.sampling` visits.

    Raises:
      ValueError: the prediction does not determine the image where the sampler starts, or the
        sampler is not defined on the schedule with this spacing.
    """
    sampling, prediction = config.sampling, diffusion.PREDICTIONS[config.prediction]
    grid = diffusion.grid(config.schedule, sampling.spacing, sampling.steps)
    diffusion.check_walk(sampling.sampler, grid)
    if not np.all(diffusion.determinant(prediction, grid)[:-1]):
        raise ValueError(
            f"prediction {config.prediction!r} says nothing of the image at a signal of 0, where this schedule starts:"
            " choose v, velocity or x_0, or another sampling.spacing"
        )
    return grid


def evaluations(config: RunConfig) -> int:
    """How many latents the network sees for one image of `config.sampling`, of both branches."""
    sampling = config.sampling
    return diffusion.evaluations(sampling.sampler, walk(config), sampling.guidance_interval)


def make_prompts(config: RunConfig, workdir: epath.PathLike) -> Prompts:
    """The prompts that the run is evaluated on; ValueError or FileNotFoundError where they cannot be had."""
    captions = lambda count: main_captions(validation_records(config, workdir), count)  # noqa: E731
    return read_prompts(config.eval.prompts, captions)


def make_evaluator(
    config: RunConfig,
    prompts: Prompts,
    network: Functional,
    pretrained: Pretrained,
    viewer: Viewer,
) -> Evaluator:
    """What draws one image a prompt, and looks at it."""
    return Evaluator(
        make_sampling(config, network, pretrained, finish=rounded),
        viewer,
        tokens=pretrained.text(list(prompts.texts)),
        negative=pretrained.text([config.sampling.negative]),
        key=key(config, "eval"),
    )
