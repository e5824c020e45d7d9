"""Which layouts of a run may fit a slice, and which of them should be fast: by arithmetic, before anything is compiled.

A layout is the mesh, the parts that a batch is taken in, and what the backward pass computes again. Memory is exact for
what programs are given; what they keep between the passes, and what the largest block keeps while it is computed again,
is read off the derivative's residuals, of one example.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from ldm_jax.nn.stack import REMAT
from ldm_jax.parallel import MeshConfig, device_bytes
from ldm_jax.parallel.chips import chip, slice_of
from ldm_jax.planning.programs import Planned, held, training
from ldm_jax.runs.config import RunConfig
from ldm_jax.types import Cond

REACHED = 0.45  # of a chip's peak, by the products of a training step
HIDDEN = 0.7  # of the time of collectives
PARTS = (1, 2, 4, 8, 16)
ROOM = 0.77  # of a chip's memory: the rest takes the program itself, and parameters on their way to a layer
ALIKE = 0.02  # of a step's time: what differs by less is alike to this arithmetic
# Forward passes' worth of a training step, and how often it gathers the parameters.
PASSES = {"none": (3.0, 2), "dots": (3.2, 3), "full": (4.0, 3)}


class Layout(NamedTuple):
    """What `search` chooses."""

    data: int
    fsdp: int
    tensor: int
    accumulate: int
    remat: str

    def __str__(self) -> str:
        """As people read it."""
        mesh = f"data {self.data} x fsdp {self.fsdp} x tensor {self.tensor}"
        return f"{mesh}, batch in {self.accumulate}, remat {self.remat}"

    def applied(self, config: RunConfig) -> RunConfig:
        """The run with this layout."""
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        return dataclasses.replace(
            config,
            mesh=dataclasses.replace(config.mesh, **sizes),
            backbone=dataclasses.replace(config.backbone, remat=self.remat),
            train=dataclasses.replace(config.train, accumulate=self.accumulate),
        )

    @property
    def flags(self) -> str:
        """As the command line takes it."""
        values = {
            "mesh.data": self.data,
            "mesh.fsdp": self.fsdp,
            "mesh.tensor": self.tensor,
            "train.accumulate": self.accumulate,
            "backbone.NAME.remat": self.remat,
        }
        return " ".join(f"--config.{name}={value}" for name, value in values.items())


class Estimate(NamedTuple):
    """What arithmetic says of a layout: bytes of a device, and seconds of a step."""

    layout: Layout
    memory: int
    seconds: float
    fits: bool


def estimates(config: RunConfig, devices: Sequence[Any]) -> list[Estimate]:
    """Layouts whose batch divides, the fastest that fit first, then the others by what they need.

    Of those that are about as fast the one that needs least memory comes first: compilers take long over the last
    bytes. A batch is taken in no more parts than fit, since more of them save nothing but memory. `tensor` stays as the
    config has it. Raises as `abstract_pretrained`, and ValueError where no layout divides the batch.
    """
    kept = {remat: _kept(config, remat, devices[0]) for remat in REMAT}
    given = functools.cache(lambda fsdp: _given(config, fsdp, devices))
    found = [
        _estimate(layout, config, devices, given(layout.fsdp), kept[layout.remat])
        for layout in _layouts(config, devices)
    ]
    if not found:
        raise ValueError(
            f"no mesh of {len(devices)} devices divides a batch of {config.train.batch}; train.batch must be a"
            " multiple of the devices that share it"
        )
    found.sort(key=lambda x: x.layout.accumulate)
    fitting: dict[Any, Estimate] = {}
    for estimate in found:
        if estimate.fits:
            fitting.setdefault(estimate.layout._replace(accumulate=1), estimate)
    others = (estimate for estimate in found if not estimate.fits)
    fastest = sorted(fitting.values(), key=lambda x: (round(math.log(x.seconds) / ALIKE), x.memory))
    return fastest + sorted(others, key=lambda x: x.memory)


def _layouts(config: RunConfig, devices: Sequence[Any]) -> Iterator[Layout]:
    tensor, slices = config.mesh.tensor, len(set(map(slice_of, devices)))
    ways = len(devices) // tensor
    if config.train.batch % ways:
        return
    rows = config.train.batch // ways
    sizes = [fsdp for fsdp in (2**i for i in range(13)) if (ways // slices) % fsdp == 0]
    for fsdp, accumulate, remat in itertools.product(sizes, PARTS, REMAT):
        if rows % accumulate == 0:
            yield Layout(ways // fsdp, fsdp, tensor, accumulate, remat)


class _Given(NamedTuple):
    """What a training step is given on one mesh."""

    bytes: int  # of a device
    gradient: int  # the same, of one gradient
    params: int  # of all devices
    flops: float


def _given(config: RunConfig, fsdp: int, devices: Sequence[Any]) -> _Given:
    sizes = dataclasses.replace(config.mesh, data=-1, fsdp=fsdp)
    program = training(Planned(dataclasses.replace(config, mesh=sizes), devices=devices))
    params = program.arguments["state"].params
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return _Given(sum(held(program).values()), device_bytes(params), count, program.flops)


def _estimate(
    layout: Layout, config: RunConfig, devices: Sequence[Any], given: _Given, kept: int
) -> Estimate:
    row, slices = chip(devices[0].device_kind), len(set(map(slice_of, devices)))
    rows = config.train.batch / (layout.data * layout.fsdp)
    gradients = given.gradient * (2 if layout.accumulate > 1 else 1)
    memory = given.bytes + gradients + int(kept * rows / layout.accumulate)
    passes, gathers = PASSES[layout.remat]
    compute = given.flops * passes / 3 / len(devices) / (row.peak * REACHED)
    whole = 2 * given.params / layout.tensor  # bytes, in bfloat16
    within = whole * (layout.fsdp - 1) / layout.fsdp * (gathers + 1) * layout.accumulate
    summed = 2 * whole / layout.fsdp
    within += summed * (layout.data > slices)
    across = summed * row.chips / row.network if slices > 1 else 0.0
    sending = within / (2 * row.dims * row.link) + across
    seconds = compute + (1 - HIDDEN) * sending
    return Estimate(layout, memory, seconds, memory <= ROOM * row.hbm)


def _kept(config: RunConfig, remat: str, device: Any) -> int:
    """Bytes an example that the network keeps for the backward pass and in its midst."""
    alone = dataclasses.replace(
        config,
        mesh=MeshConfig(data=1),
        backbone=dataclasses.replace(config.backbone, remat=remat),
    )
    run = Planned(alone, devices=[device])
    one, two = (_residuals(run, rows) for rows in (1, 2))
    return two - one


def _residuals(run: Planned, rows: int) -> int:
    """Bytes that so many examples keep from the forward pass, and of the block that needs most while it is redone."""
    apply, text = run.network.apply, run.frozen.text
    shape = lambda *dims: jax.ShapeDtypeStruct((rows, *dims), jnp.float32)  # noqa: E731
    cond = Cond(
        shape(run.text_length, text.width),
        pooled=shape(text.pooled_width) if text.pooled_width else None,
        sizes=shape(6),
    )
    params = jax.eval_shape(run.network.init, jax.random.key(0))
    latents = shape(run.side, run.side, run.frozen.autoencoder.config.latent_channels)

    def forward(params: Any) -> Any:
        x, told, given = jax.tree.map(jnp.zeros_like, (latents, shape(), cond))
        return apply(params, x, told, apply(params, given, method="prepare"))

    with jax.set_mesh(run.mesh):
        traced = jax.make_jaxpr(forward)(params)
        return _between(core.jaxpr_as_fun(traced), *traced.in_avals) + _redone(traced.jaxpr)


def _between(forward: Callable[..., Any], *args: Any) -> int:
    """Bytes that `forward` keeps for its derivative, what it is given included."""
    leaves = jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(forward, *args)[1], *args))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def _redone(jaxpr: core.Jaxpr) -> int:
    """Bytes that the block which needs most keeps while it is computed again, beyond what it had kept."""
    blocks: dict[Any, int] = {}  # those that take and do the same need the same
    for equation in jaxpr.eqns:
        inner = list(core.jaxprs_in_params(equation.params))
        alike = (
            str(equation.primitive),
            *(str(each.aval) for each in equation.invars),
            *map(_length, inner),
        )
        if inner and alike not in blocks:
            again = _beyond(equation) if equation.primitive.name == "remat2" else 0
            blocks[alike] = again + max(map(_redone, inner))
    return max(blocks.values(), default=0)


def _beyond(equation: core.JaxprEqn) -> int:
    given = [variable.aval for variable in equation.invars]
    block = core.jaxpr_as_fun(core.ClosedJaxpr(equation.params["jaxpr"], ()))
    kept = functools.partial(equation.primitive.bind, **equation.params)
    return _between(block, *given) - _between(kept, *given)


def _length(jaxpr: core.Jaxpr) -> int:
    return len(jaxpr.eqns)
