"""The programs of a run as shapes, lowered and compiled for devices that are not here."""

import contextlib
import functools
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ldm_jax.models.flops import traced_flops
from ldm_jax.parallel import batch_sharding, check_rows, device_bytes, jit, replicated
from ldm_jax.planning.cost import Cost, OutOfMemory, Profile, cost, profile, wasteful
from ldm_jax.runs.pretrained import Pretrained, abstract_pretrained
from ldm_jax.runs.run import Run
from ldm_jax.types import Batch

_log = logging.getLogger(__name__)
PAUSE = 30.0  # seconds between words on a compilation
# Seconds of any compilation on two cores, and more for each product of matrices or convolution.
ANY, PRODUCT = 25.0, 0.52
SCHEDULE = 90.0  # the same without code


class Program(NamedTuple):
    """A jitted function and the shapes that it is called with, by name and placed."""

    name: str
    function: Callable[..., Any]
    arguments: dict[str, Any]
    mesh: Mesh
    flops: float  # that its images take, nothing counted that is computed again
    images: int  # in one run of it


class Compiled(NamedTuple):
    """What the compiler made of a program."""

    program: Program
    text: str
    cost: Cost

    @property
    def generated(self) -> bool:
        """Whether there is code, so that times are the compiler's; otherwise they are a roofline's."""
        return self.cost.memory.code > 0

    @property
    def profile(self) -> Profile:
        """Where its seconds go."""
        return profile(self.text, list(self.program.mesh.devices.flat))

    @property
    def warnings(self) -> list[str]:
        """What wastes the chips, a sentence each."""
        devices = list(self.program.mesh.devices.flat)
        return wasteful(self.text, devices, tuple(self.program.arguments.values()))


class Planned(Run):
    """A run whose frozen networks are shapes; nothing is read but their configs."""

    @functools.cached_property
    def frozen(self) -> Pretrained:
        """The frozen networks as shapes. Raises as `abstract_pretrained`."""
        return self._shapes[0]

    @property
    def origin(self) -> str:
        """Where the shapes of the frozen networks are from."""
        return self._shapes[1]

    @functools.cached_property
    def _shapes(self) -> tuple[Pretrained, str]:
        return abstract_pretrained(self.config, self.mesh)


def training(run: Run) -> Program:
    """Makes the step that `train` runs."""
    rows = run.config.train.batch
    check_rows(rows, run.mesh)
    stored = run.config.data.text_embeddings
    arguments = {
        "state": run.training.abstract,
        "frozen": {} if stored else {"text": run.frozen.text_params},
        "batch": batch(run),
    }
    flops = run.count.training_flops * rows
    return Program("training", run.jit_step(), arguments, run.mesh, flops, rows)


def batch(run: Run) -> Batch:
    """Makes the shapes of a training batch, placed on the mesh."""
    rows, places = run.config.train.batch, batch_sharding(run.mesh)

    def array(one: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *one.shape[1:]), one.dtype, sharding=places)

    return jax.tree.map(array, run.empty_batch())


def sampling(run: Run) -> Program:
    """Makes `config.sampling`, from tokens to images, for `sampling.batch` of them, which the mesh has to divide."""
    generate = run.generate()
    rows, places = run.config.sampling.batch, batch_sharding(run.mesh)
    check_rows(rows, run.mesh)
    length, whole = _text_tokens(run.frozen), replicated(run.mesh)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    frozen = {"text": run.frozen.text_params, "autoencoder": run.frozen.autoencoder.params}
    arguments = {
        "parameters": run.training.abstract.params,
        "frozen": frozen,
        "tokens": jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=places),
        "negative": jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=whole),
        "keys": jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=places),
        "guidance": jax.ShapeDtypeStruct((), jnp.float32, sharding=whole),
    }
    flops = run.count.total.flops * run.evaluations() * rows
    jitted = jit(generate, run.mesh, out_shardings=whole)
    return Program("sampling", jitted, arguments, run.mesh, flops, rows)


def encoding(run: Run) -> Program:
    """Makes the program that makes latents in `encode`, of `data.encode_batch` images."""
    rows, size = run.config.data.encode_batch, run.config.data.size
    check_rows(rows, run.mesh)

    def images(rows: int) -> jax.ShapeDtypeStruct:
        shape = (rows, size, size, run.frozen.autoencoder.config.in_channels)
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=batch_sharding(run.mesh))

    encode = run.frozen.encode_images
    arguments = {
        "frozen": {"autoencoder": run.frozen.autoencoder.params},
        "images": images(rows),
    }
    flops = traced_flops(encode, arguments["frozen"], images(1)) * rows
    return Program("encoding", jit(encode, run.mesh), arguments, run.mesh, flops, rows)


PROGRAMS = {"training": training, "sampling": sampling, "encoding": encoding}


def lowered(program: Program) -> Any:
    """The program for its mesh's devices, as `jax.jit(...).lower` gives it."""
    with jax.set_mesh(program.mesh):
        return program.function.__wrapped__.lower(*program.arguments.values())


def compiled(program: Program) -> Compiled:
    """Compiles, says beforehand about how long that takes, and every now and then that it still goes on.

    Raises:
      OutOfMemory: it does not fit the memory of a device.
      ValueError: as `parallel.cost.cost`.
    """
    traced = lowered(program)
    try:
        expected = ANY + PRODUCT * _products(traced.as_text())
        with progress(f"{program.name} (longer with parameters in parts)", expected):
            done = traced.compile()
    except jax.errors.JaxRuntimeError as error:
        if (found := OutOfMemory.read(error)) is None:
            raise
        raise found from error
    text = done.as_text()
    found = cost(text, done.memory_analysis(), list(program.mesh.devices.flat))
    return Compiled(program, text, found)


def held(program: Program) -> dict[str, int]:
    """Bytes of one device by what they are for; the fields of a training state one by one."""
    state = program.arguments.get("state")
    named = dict(program.arguments)
    if state is not None:
        fields = {
            "parameters": state.params,
            "moments": state.opt_state,
            "average": state.ema,
        }
        named = fields | {k: v for k, v in named.items() if k != "state"}
    return {name: device_bytes(tree) for name, tree in named.items()}


@contextlib.contextmanager
def progress(name: str, expected: float) -> Iterator[None]:
    """Says that a program is compiled, how long that takes, every now and then that it goes on, and its end."""
    over, begun = threading.Event(), time.monotonic()

    def say() -> None:
        while not over.wait(PAUSE):
            _log.info("Still compiling %s, %.0f s so far.", name, time.monotonic() - begun)

    _log.info("Compiling %s: about %.0f s on two cores.", name, expected)
    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        _log.info("Compiled %s in %.0f s.", name, time.monotonic() - begun)


def _products(text: str) -> int:
    """Products of matrices and convolutions in a program that is not compiled yet, those of a loop's body once."""
    return len(re.findall(r"stablehlo\.(?:dot_general|convolution)\b", text))


def _text_tokens(pretrained: Pretrained) -> int:
    """Ids of a caption, of all its tokenizers."""
    return sum(tokenizer.max_length for tokenizer in pretrained.text.tokenizers)
