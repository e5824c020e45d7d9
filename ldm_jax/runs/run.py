"""A run: everything that a config and a working directory stand for."""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from ldm_jax import diffusion
from ldm_jax.data import open_source
from ldm_jax.data.encoding import stored
from ldm_jax.data.latents import Autoencoder, Manifest, main_captions
from ldm_jax.data.loader import Collate, Example, Loader
from ldm_jax.data.sources import options_of
from ldm_jax.evals.evaluator import Evaluator, Viewer
from ldm_jax.evals.generation import Generate, make_generate
from ldm_jax.evals.prompts import Prompts, read_prompts
from ldm_jax.files.buckets import in_bucket
from ldm_jax.files.durable import alone_in
from ldm_jax.metrics.resize import rounded
from ldm_jax.models import weights
from ldm_jax.models.axes import TABLE
from ldm_jax.models.flops import Count, count
from ldm_jax.models.networks import make_network
from ldm_jax.models.text import warn_of_truncation
from ldm_jax.nn.functional import Functional
from ldm_jax.parallel import (
    batch_share,
    distributed,
    make_mesh,
    shardings,
)
from ldm_jax.runs.backbone import make_backbone
from ldm_jax.runs.config import CHECKPOINTS, RunConfig, SamplingConfig
from ldm_jax.runs.initial import copied, fitted, read_backbone
from ldm_jax.runs.pretrained import (
    Network,
    Pretrained,
    ScoringNetworks,
    load_pretrained,
    load_scoring,
)
from ldm_jax.training import (
    State,
    abstract_state,
    init_state,
    jit_step,
    make_optimizer,
    make_step,
)
from ldm_jax.training.checkpoints import Checkpoints
from ldm_jax.training.optimizer import restricted
from ldm_jax.training.step import Step
from ldm_jax.types import Apply, Batch, Cond, Params, Point

_log = logging.getLogger(__name__)


class Training(NamedTuple):
    """The step `step(state, frozen, batch)`, not jitted; the function that makes the state; the shapes of the state."""

    step: Step
    init: Callable[[], State]
    abstract: State


class Run:
    """The parts of a run, each made when it is first asked for.

    Commands, hooks, studies and plans take a `Run`, and no other function repeats what is made here. A part that cannot
    be made raises ValueError or FileNotFoundError with the setting and the value that is wrong.
    """

    def __init__(
        self,
        config: RunConfig,
        workdir: epath.PathLike = ".",
        *,
        devices: Sequence[Any] | None = None,
    ) -> None:
        """Nothing is read or computed yet; `devices` are those of the mesh, all by default."""
        self.config, self.workdir = config, epath.Path(workdir)
        self._devices = devices

    def sampled_by(self, sampling: SamplingConfig) -> "Run":
        """This run with other settings of sampling; it shares all parts that are made already."""
        other = copy.copy(self)
        other.config = dataclasses.replace(self.config, sampling=sampling)
        return other

    # Where and with what

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The devices by the axes of `config.mesh`."""
        return make_mesh(self.config.mesh, self._devices)

    @functools.cached_property
    def scorers(self) -> ScoringNetworks:
        """The frozen networks that score images."""
        return load_scoring(self.config, self.mesh)

    @functools.cached_property
    def frozen(self) -> Pretrained:
        """The frozen networks: autoencoder, text encoders, and those that score."""
        frozen = load_pretrained(self.config, self.mesh, self.scorers)
        beside = self.config.objective.networks()
        found = {name: read_backbone(path, self.place) for name, path in beside.items()}
        networks = {
            name: Network(given.backbone, make_network(given.backbone).apply, given.params)
            for name, given in found.items()
        }
        return frozen._replace(beside=networks)

    @functools.cached_property
    def network(self) -> Functional:
        """The network that is trained, in the precision of the run.

        Raises:
          ValueError: it does not fit the text encoder, the autoencoder or the size of the images.
        """
        return make_backbone(self.config, self.frozen)

    @property
    def side(self) -> int:
        """Rows and columns of the latents."""
        return self.config.data.size // self.frozen.autoencoder.config.downsampling

    @property
    def text_length(self) -> int:
        """Text tokens that the backbone reads."""
        return self.frozen.text.tokenizers[0].max_length

    @property
    def count(self) -> Count:
        """Parameters and operations of the backbone, for one example."""
        return count(self.config.backbone, self.side, self.text_length)

    def key(self, use: str) -> jax.Array:
        """The run's key for one use: init, train, eval, sample."""
        number = int.from_bytes(hashlib.sha256(use.encode()).digest()[:4], "little")
        return jax.random.fold_in(jax.random.key(self.config.seed), number)

    @property
    def apply(self) -> Apply:
        """The backbone as a function of its parameters, noisy latents, time and context."""
        return self.network.apply

    @functools.cached_property
    def prepare(self) -> Callable[[Params, Cond], Any]:
        """Function from parameters and an encoded prompt to what the backbone computes once per prompt."""
        return functools.partial(self.network.apply, method="prepare")

    @property
    def prediction(self) -> diffusion.Prediction:
        """The quantity that the backbone predicts."""
        return diffusion.PREDICTIONS[self.config.prediction]

    # Training

    @functools.cached_property
    def training(self) -> Training:
        """The step and the state, placed on the mesh."""
        config, train = self.config, self.config.train
        objective, half_life = config.objective, config.objective.half_life(self)
        tx = make_optimizer(config.optimizer, batch_size=train.batch, examples=train.examples)
        tx = restricted(tx, objective.trained)
        loss, init, ema = objective.loss(self), self.network.init, half_life > 0
        return Training(
            make_step(loss, tx, self.key("train"), ema=half_life, accumulate=train.accumulate),
            lambda: init_state(init, tx, self.key("init"), self.place, ema=ema),
            abstract_state(init, tx, self.place, ema=ema),
        )

    def place(self, tree: Any) -> Any:
        """Maps a tree of shapes to the shardings that the rules of the mesh give."""
        return shardings(tree, table=TABLE, rules=self.config.mesh.pairs, mesh=self.mesh)

    def initial(self) -> Params:
        """Reads the parameters of `config.initial` and fits them into the backbone.

        Raises:
          FileNotFoundError, ValueError: as `read_backbone`, `Given.require` and `fitted`.
        """
        given = read_backbone(self.config.initial, self.place)
        given.require(self.config)
        differs, training = self.config.objective.differs, self.training
        # Without a difference no fresh value is used: shapes do, and no moments are made to draw an image.
        fresh = training.init().params if differs else training.abstract.params
        return fitted(given, self.config.backbone, fresh, differs)

    def state(self) -> State:
        """Restores the newest sound checkpoint; without one, starts from `config.initial`, or from fresh values."""
        if self.checkpoints.latest() is not None:
            state = self.checkpoints.restore(self.training.abstract)
            _log.info("Continuing after %d examples.", int(state.examples))
            return state
        state = self.training.init()
        if self.config.initial is None:
            return state
        params = self.initial()
        _log.info("Starting from the weights of %s.", self.config.initial)
        average = None if state.ema is None else copied(params)
        return state._replace(params=params, ema=average)

    def jit_step(self) -> Callable[..., Any]:
        """Returns `step(state, frozen, batch) -> (state, scalars)`, compiled; it takes the state's memory."""
        return jit_step(self.training.step, self.training.abstract, self.mesh)

    @functools.cached_property
    def checkpoints(self) -> Checkpoints:
        """Checkpoints in the working directory."""
        path = os.path.join(self.workdir, CHECKPOINTS)
        return Checkpoints(path, keep=self.config.train.keep)

    def weights(self) -> tuple[int, Params]:
        """Reads the newest checkpoint: the examples that it has seen, and the parameters that `eval.weights` names.

        Without a checkpoint they are those of `config.initial`, which have seen no example.

        Raises:
          FileNotFoundError: there is no sound checkpoint, and the config names no initial weights.
        """
        if self.config.initial is not None and self.checkpoints.latest() is None:
            return 0, self.initial()
        ema = self.config.eval.weights == "ema" and self.config.train.ema
        field = "ema" if ema else "params"
        state = self.checkpoints.restore(self.training.abstract, only=(field, "examples"))
        return int(state.examples), getattr(state, field)

    # Data

    def records(self, part: str = "train") -> Path:
        """Returns the directory of latents of a part, "train" or "validation".

        Raises:
          ValueError: it is in a bucket, which ArrayRecord can neither read nor write.
        """
        directory = self.config.data.records or os.path.join(self.workdir, "latents")
        if in_bucket(directory):
            raise ValueError(
                f"latents cannot be in {directory}, as ArrayRecord knows no buckets: give"
                " --config.data.records=DIRECTORY, on a disk or where the bucket is mounted (gcsfuse)"
            )
        return Path(directory) / part

    @property
    def validation_records(self) -> Path:
        """Directory of the latents of the validation loss, and of prompts that are captions."""
        return self.records("validation" if self.config.data.validation else "train")

    @property
    def autoencoder(self) -> Autoencoder:
        """The autoencoder that a directory of latents must have been made by."""
        network = self.frozen.autoencoder
        return Autoencoder(
            weights.fingerprint(network.params),
            network.config.shift_factor,
            network.config.scaling_factor,
        )

    @property
    def tokenizer(self) -> Callable[[Sequence[str]], Any] | None:
        """The tokenizer of training batches; None where they hold embeddings."""
        return None if self.config.data.text_embeddings else self.frozen.text

    def loader(self) -> Loader:
        """Opens the training batches of this process.

        Raises:
          ValueError: the latents are missing, unfinished, or of another autoencoder or size.
        """
        directory = self.records()
        self.check_records(directory)
        if missing := self.config.objective.needs(self.empty_batch()):
            raise ValueError(f"the objective needs {missing}, which {directory} does not give")
        index, count = batch_share(self.mesh)
        return Loader(
            [(directory, 1.0)],
            batch=self.config.train.batch,
            seed=self.config.seed,
            policy=self.config.captions,
            tokenizer=self.tokenizer,
            process_index=index,
            process_count=count,
            threads=self.config.data.workers,
        )

    def empty_batch(self) -> Batch:
        """Makes a batch of one example, all zeros, as the loader makes batches of records."""
        channels = self.frozen.autoencoder.config.latent_channels
        latents, text = np.zeros((self.side, self.side, channels), np.float16), ""
        if self.tokenizer is None:
            tokens, frozen = self.frozen.text([""]), {"text": self.frozen.text_params}
            cond = jax.eval_shape(self.frozen.encode, frozen, tokens)
            zeros = stored(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), cond))
            text = {name: rows[0] for name, rows in zeros.items()}
        return Collate(self.tokenizer)([Example(latents, text, 0)])

    def check_records(self, directory: Path) -> Manifest:
        """Reads the manifest of a directory of latents. Raises ValueError if this run cannot use it."""
        embedded = self.config.data.text_embeddings
        manifest = Manifest.read_from(directory)
        manifest.require(
            autoencoder=self.autoencoder.fingerprint,
            text_encoder=weights.fingerprint(self.frozen.text_params) if embedded else "",
        )
        if manifest.size != self.config.data.size:
            raise ValueError(
                f"{directory} holds latents of images of {manifest.size} pixels, and data.size is"
                f" {self.config.data.size}"
            )
        self._warn_of_source(directory, manifest)
        return manifest

    def _warn_of_source(self, directory: Path, manifest: Manifest) -> None:
        """Logs that latents were made of another source than the config names; the record would name the wrong one."""
        data = self.config.data
        spec = data.validation if directory.name == "validation" else data.source
        wanted = json.loads(json.dumps(options_of(open_source(spec or data.source))))
        if any(manifest.source.get(name) != value for name, value in wanted.items()):
            stored = {k: v for k, v in manifest.source.items() if k in ("class", *wanted)}
            _log.warning(
                "The latents in %s were made of %s, and the config names %s: give its data.source.",
                *(directory, stored, spec),
            )

    # Sampling

    def walk(self) -> Point:
        """Makes the points that `config.sampling` visits.

        Raises:
          ValueError: the prediction does not determine the image where the sampler starts, or the sampler is not
            defined on the schedule with this spacing.
        """
        sampling = self.config.sampling
        grid = diffusion.grid(self.config.schedule, sampling.spacing, sampling.steps)
        diffusion.check_walk(sampling.sampler, grid)
        if not np.all(diffusion.determinant(self.prediction, grid)[:-1]):
            raise ValueError(
                f"prediction {self.config.prediction!r} says nothing of the image at a signal of 0, where this schedule"
                " starts: choose v, velocity or x_0, or another sampling.spacing"
            )
        return grid

    def evaluations(self) -> int:
        """Counts the latents that the backbone sees for one image, of both branches of guidance."""
        sampling = self.config.sampling
        return diffusion.evaluations(sampling.sampler, self.walk(), sampling.guidance_interval)

    def generate(self, **options: Any) -> Generate:
        """Makes the program from prompts to images that `config.sampling` describes; `options` are `make_generate`'s.

        Raises:
          ValueError: as `walk`.
        """
        sampling = self.config.sampling
        return make_generate(
            self.network.apply,
            self.prepare,
            self.frozen.encode,
            self.frozen.decode,
            prediction=self.prediction,
            grid=self.walk(),
            sampler=sampling.sampler,
            shape=(self.side, self.side, self.frozen.autoencoder.config.latent_channels),
            rescale=sampling.guidance_rescale,
            interval=sampling.guidance_interval,
            **options,
        )

    # Evaluation

    @functools.cached_property
    def prompts(self) -> Prompts:
        """The prompts of `eval.prompts`; the part of them that no text encoder sees is logged.

        Raises ValueError or FileNotFoundError where they cannot be read.
        """
        prompts = self.read_prompts()
        warn_of_truncation([*prompts.texts, self.config.sampling.negative], self.frozen.text)
        return prompts

    def read_prompts(self) -> Prompts:
        """Reads the prompts of `eval.prompts`, without a network. Raises as `prompts`."""
        captions = lambda count: main_captions(self.validation_records, count)  # noqa: E731
        return read_prompts(self.config.eval.prompts, captions)

    def evaluator(self, viewer: Viewer) -> Evaluator:
        """Makes the evaluator that draws one image per prompt and extracts its features."""
        text = self.frozen.text
        return Evaluator(
            self.generate(finish=rounded),
            viewer,
            tokens=text(list(self.prompts.texts)),
            negative=text([self.config.sampling.negative]),
            key=self.key("eval"),
        )


@contextlib.contextmanager
def alone_among_runs(directory: epath.PathLike) -> Iterator[None]:
    """Makes a directory and locks it against other runs; of several processes the first one does.

    Raises ValueError if another run holds it.
    """
    epath.Path(directory).mkdir(parents=True, exist_ok=True)
    with alone_in(directory) if distributed.is_first() else contextlib.nullcontext():
        yield
