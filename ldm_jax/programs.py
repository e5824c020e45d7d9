"""The programs of a run as shapes, lowered and compiled for devices that are not here."""

import contextlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ldm_jax import build
from ldm_jax.config import RunConfig
from ldm_jax.models.flops import count, traced_flops
from ldm_jax.nn.functional import Functional
from ldm_jax.parallel import batch_sharding, check_rows, device_bytes, jit, replicated
from ldm_jax.parallel.cost import Cost, OutOfMemory, Profile, cost, profile, wasteful
from ldm_jax.pretrained import Pretrained, abstract_pretrained
from ldm_jax.training import jit_step
from ldm_jax.types import Batch, Cond

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


class Parts(NamedTuple):
    """What programs are made of."""

    network: Functional
    pretrained: Pretrained
    origin: str  # of the frozen networks' shapes
    side: int  # rows and columns of the latents


def parts(config: RunConfig, mesh: Mesh) -> Parts:
    """The networks of a run as shapes. Raises as `abstract_pretrained` and `build.make_backbone`."""
    pretrained, origin = abstract_pretrained(config, mesh)
    network = build.make_backbone(config, pretrained)
    side = config.data.size // pretrained.autoencoder.config.downsampling
    return Parts(network, pretrained, origin, side)


def training(config: RunConfig, mesh: Mesh) -> Program:
    """The step that `train` runs."""
    network, pretrained, _, side = parts(config, mesh)
    made = build.make_training(config, network, pretrained, mesh)
    rows, places = config.train.batch, batch_sharding(mesh)
    check_rows(rows, mesh)

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=places)

    tokens = array(jnp.int32, _text_tokens(pretrained))
    text, frozen = tokens, {"text": pretrained.text_params}
    if config.data.text_embeddings:
        text, frozen = _embedded(pretrained, tokens, places), {}
    channels = pretrained.autoencoder.config.latent_channels
    batch = Batch(
        latents=array(jnp.float32, side, side, channels),
        text=text,
        weight=array(jnp.float32),
        index=array(jnp.uint32),
    )
    flops = count(config.backbone, side, _length(pretrained)).training_flops * rows
    step = jit_step(made.step, made.abstract, mesh)
    arguments = {"state": made.abstract, "frozen": frozen, "batch": batch}
    return Program("training", step, arguments, mesh, flops, rows)


def sampling(config: RunConfig, mesh: Mesh) -> Program:
    """`config.sampling`, from tokens to images, for `sampling.batch` of them, which the mesh has to divide."""
    network, pretrained, _, side = parts(config, mesh)
    generate = build.make_sampling(config, network, pretrained)
    rows, places = config.sampling.batch, batch_sharding(mesh)
    check_rows(rows, mesh)
    length = _text_tokens(pretrained)
    whole = replicated(mesh)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    frozen = {"text": pretrained.text_params, "autoencoder": pretrained.autoencoder.params}
    arguments = {
        "parameters": build.make_training(config, network, pretrained, mesh).abstract.params,
        "frozen": frozen,
        "tokens": jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=places),
        "negative": jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=whole),
        "keys": jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=places),
        "guidance": jax.ShapeDtypeStruct((), jnp.float32, sharding=whole),
    }
    forward = count(config.backbone, side, _length(pretrained)).total.flops
    flops = forward * build.evaluations(config) * rows
    jitted = jit(generate, mesh, out_shardings=whole)
    return Program("sampling", jitted, arguments, mesh, flops, rows)


def encoding(config: RunConfig, mesh: Mesh) -> Program:
    """What makes latents in `encode`, of `data.encode_batch` images."""
    pretrained, _ = abstract_pretrained(config, mesh)
    rows, size = config.data.encode_batch, config.data.size
    check_rows(rows, mesh)

    def images(rows: int) -> jax.ShapeDtypeStruct:
        shape = (rows, size, size, pretrained.autoencoder.config.in_channels)
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=batch_sharding(mesh))

    arguments = {
        "frozen": {"autoencoder": pretrained.autoencoder.params},
        "images": images(rows),
    }
    flops = traced_flops(pretrained.encode_images, arguments["frozen"], images(1)) * rows
    return Program("encoding", jit(pretrained.encode_images, mesh), arguments, mesh, flops, rows)


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


def _length(pretrained: Pretrained) -> int:
    """Text tokens that a backbone reads."""
    return pretrained.text.tokenizers[0].max_length


def _text_tokens(pretrained: Pretrained) -> int:
    """Ids of a caption, of all its tokenizers."""
    return sum(tokenizer.max_length for tokenizer in pretrained.text.tokenizers)


def _embedded(pretrained: Pretrained, tokens: jax.ShapeDtypeStruct, places: Any) -> Cond:
    cond = jax.eval_shape(pretrained.encode, {"text": pretrained.text_params}, tokens)
    # The loader gives all but the mask as float32.
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, bool if x.dtype == bool else jnp.float32, sharding=places
        ),
        cond,
    )
