"""Given weights: the backbone of a run or of a pipeline in diffusers' layout, fitted into a run."""

import dataclasses
import fnmatch
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ldm_jax.diffusion import Schedule
from ldm_jax.models import BACKBONES, Backbone, scheduler, weights
from ldm_jax.models.json_files import read_json
from ldm_jax.models.names import flatten
from ldm_jax.models.networks import KINDS, described, make_network
from ldm_jax.runs.config import CHECKPOINTS, RunConfig
from ldm_jax.settings.schema import CONFIG_FILE, from_json
from ldm_jax.tasks import Difference
from ldm_jax.training import State
from ldm_jax.training.checkpoints import Checkpoints
from ldm_jax.types import Params

NETWORKS = ("unet", "transformer")  # of a pipeline: its backbone
FREE = ("sample_size", "_class_name")  # values of a backbone's config.json that change no function
SHOWN = 3  # parameters that an error names

Place = Callable[[Any], Any]


class Given(NamedTuple):
    """A trained backbone, its parameters on the mesh, and how it was trained as far as its directory says.

    Attributes:
      backbone, params, where: its config, its parameters, and the directory.
      schedule, prediction: None where the directory has no scheduler.
    """

    backbone: Backbone
    params: Params
    where: str
    schedule: Schedule | None = None
    prediction: str | None = None

    def require(self, config: RunConfig) -> None:
        """Raises ValueError where the run is of another schedule or prediction; the sentence says what to give."""
        if self.prediction not in (None, config.prediction):
            raise ValueError(
                f"prediction is {config.prediction}, and {self.where} was trained to predict {self.prediction}: give"
                f" --config.prediction={self.prediction}"
            )
        if self.schedule is not None and not _alike(self.schedule, config.schedule):
            raise ValueError(
                f"the noise schedule is {config.schedule}, and that of {self.where} is {self.schedule}: give it by"
                " --config.schedule"
            )


def _alike(one: Schedule, other: Schedule) -> bool:
    times = np.linspace(0, 1, 101)
    return all(
        np.allclose(mine, theirs, rtol=1e-5, atol=1e-6)
        for mine, theirs in zip(one(times), other(times), strict=True)
    )


def read_backbone(directory: epath.PathLike, place: Place) -> Given:
    """Reads the backbone of a run (its newest checkpoint) or of a pipeline, or the directory of a backbone itself.

    `place` maps shapes to shardings, by which parameters are read: a device never holds more than its part.

    Raises:
      FileNotFoundError: there is no run and no pipeline, or the run has no checkpoint.
      ValueError: the network is no backbone, or its files are damaged.
    """
    path = epath.Path(directory)
    if (path / CHECKPOINTS).is_dir() and (path / CONFIG_FILE).is_file():
        return _of_run(path, place)
    return _of_pipeline(Path(directory), place)


def _of_run(path: epath.Path, place: Place) -> Given:
    config = from_json((path / CONFIG_FILE).read_text(), RunConfig)
    like = _shapes(config.backbone, place)
    field = "ema" if config.eval.weights == "ema" and config.train.ema else "params"
    abstract = State(None, None, params=like, ema=like, opt_state=None)
    state = Checkpoints(path / CHECKPOINTS).restore(abstract, only=(field,))
    params = getattr(state, field)
    return Given(config.backbone, params, str(path), config.schedule, config.prediction)


def _of_pipeline(path: Path, place: Place) -> Given:
    directory = backbone_directory(path)
    kind, backbone = described(directory)
    if not isinstance(backbone, tuple(BACKBONES.values())):
        raise ValueError(f"{directory} holds a {kind.module.__name__}, which is no backbone")
    like = _shapes(backbone, place)
    where = jax.tree.map(lambda leaf: leaf.sharding, like)
    params = weights.load(directory, like, kind.names(backbone), shardings=where)
    steps = directory.parent / "scheduler" / "scheduler_config.json"
    schedule, prediction = None, None
    if steps.is_file():
        schedule, prediction, _ = scheduler.from_diffusers(read_json(steps), steps)
    return Given(backbone, params, str(path), schedule, prediction)


def backbone_directory(path: Path) -> Path:
    """Finds the backbone in a pipeline's directory, or takes the directory itself. Raises FileNotFoundError."""
    for candidate in (*(path / name for name in NETWORKS), path):
        if (candidate / "config.json").is_file():
            return candidate
    raise FileNotFoundError(
        f"{path} is neither a run ({CONFIG_FILE} and {CHECKPOINTS}) nor a pipeline ({' or '.join(NETWORKS)}), nor the"
        " directory of a backbone"
    )


def _shapes(backbone: Backbone, place: Place) -> Params:
    shapes = jax.eval_shape(make_network(backbone).init, jax.random.key(0))
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        *(shapes, place(shapes)),
    )


def fitted(
    given: Given, backbone: Backbone, fresh: Params, differs: Sequence[Difference] = ()
) -> Params:
    """Returns the given parameters in the place of fresh ones, but for the differences that are allowed.

    Raises:
      ValueError: a parameter is missing, left over or of another shape, by name; or a setting differs that changes the
        network's function.
    """
    ours, theirs = flatten(fresh), flatten(given.params)
    result, wrong = {}, []
    for path, leaf in ours.items():
        parent = theirs.get(path)
        rule = next((row.rule for row in differs if fnmatch.fnmatch(path, row.parameter)), None)
        if parent is not None and parent.shape == leaf.shape:
            result[path] = parent
        elif rule is not None:
            result[path] = _by_rule(rule, path, leaf, parent)
        elif parent is None:
            wrong.append(f"it has no {path}")
        else:
            wrong.append(f"{path} has the shape {parent.shape} there and {leaf.shape} here")
    wrong += [f"it has {path}, and this backbone has not" for path in theirs if path not in ours]
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ValueError(
            f"{given.where} does not fit the backbone: {'; '.join(wrong[:SHOWN])}{more}"
        )
    _require_same_function(given, backbone, differs)
    return jax.tree.unflatten(jax.tree.structure(fresh), [result[path] for path in ours])


def _by_rule(rule: Any, path: str, fresh: jax.Array, parent: jax.Array | None) -> jax.Array:
    try:
        return jax.jit(rule, out_shardings=fresh.sharding)(fresh, parent)
    except ValueError as error:
        shape = None if parent is None else parent.shape
        raise ValueError(
            f"{path} has the shape {shape} there and {fresh.shape} here: {error}"
        ) from None


def _require_same_function(given: Given, backbone: Backbone, differs: Sequence[Difference]) -> None:
    """Raises ValueError for settings that no shape tells, such as the number of heads."""
    ours, theirs = (_written(each) for each in (backbone, given.backbone))
    free = {*FREE, *(row.setting for row in differs)}
    for name in ours:
        if name not in free and ours[name] != theirs.get(name):
            raise ValueError(
                f"{given.where} does not fit the backbone: {name} is {theirs.get(name)!r} there and {ours[name]!r} here"
            )


def _written(backbone: Backbone) -> dict[str, Any]:
    (kind,) = {id(kind): kind for kind in KINDS.values() if kind.config is type(backbone)}.values()
    return json.loads(json.dumps(kind.write(backbone)))


def copied(params: Params) -> Params:
    """Returns the same values in memory of their own."""
    return jax.tree.map(jnp.copy, params)


def pipeline_config(directory: epath.PathLike, base: RunConfig) -> RunConfig:
    """Returns `base` for a pipeline: its networks, schedule, prediction and size of images.

    Raises FileNotFoundError, ValueError: as `read_backbone`; or the scheduler is of another kind.
    """
    path = Path(directory)
    _, backbone = described(backbone_directory(path))
    _, autoencoder = described(path / "vae")
    steps = path / "scheduler" / "scheduler_config.json"
    schedule, prediction, spacing = scheduler.from_diffusers(read_json(steps), steps)
    sampling = dataclasses.replace(base.sampling, spacing=spacing)
    size = backbone.sample_size * autoencoder.downsampling
    return dataclasses.replace(
        base,
        pretrained=str(path.absolute()),
        initial=str(path.absolute()),
        backbone=backbone,
        schedule=schedule,
        prediction=prediction,
        sampling=sampling,
        data=dataclasses.replace(base.data, size=size),
    )
