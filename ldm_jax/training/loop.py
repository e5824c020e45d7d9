"""The training loop: what happens between two steps, on the host."""

import collections
import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax
from jax.sharding import Mesh

from ldm_jax.parallel.mesh import put_batch
from ldm_jax.training.goodput import STEPS, Stopwatch
from ldm_jax.training.state import State
from ldm_jax.training.step import Scalars
from ldm_jax.types import Batch

_log = logging.getLogger(__name__)

# The host is at most this many steps before the devices: enough for them never to be idle.
AHEAD = 2


class TrainingError(FloatingPointError):
    """A run that must not go on; the message is one sentence for its owner."""


class Preempted(SystemExit):
    """A run that was stopped from outside, is saved, and is to be continued; ends the process with this status."""


@contextlib.contextmanager
def tolerated(what: str) -> Iterator[None]:
    """Logs an error of writing something that a run can do without, such as a full disk, and lets the run go on."""
    try:
        yield
    except Exception as error:  # buckets raise many kinds
        _log.error("%s could not be written (%s). The run goes on without it.", what, error)


class Tick(NamedTuple):
    """What hooks are shown after each step.

    `before` and `examples` were seen before and after it, and `last` says that training is over.
    `scalars` and `state` are still being computed: reading them waits. The next step takes the
    buffers of the state, so a hook must not keep it.
    """

    step: int
    before: int
    examples: int
    last: bool
    state: State | None
    scalars: Scalars | dict[str, float]
    batch: Batch

    def ends(self, period: int) -> bool:
        """Whether this is the last step or the first to reach a multiple of `period` examples.

        This hangs on the examples alone, so that a run that was resumed does the same as one that
        was not.
        """
        return self.last or self.examples // period > self.before // period


@runtime_checkable
class Hook(Protocol):
    """Something that looks on. Hooks run in order after each step; an exception stops the run."""

    part: str = "hooks"  # what its time is charged to

    def begin(self, state: State) -> None:
        """Called once before the first step, with the state that training goes on from."""

    def __call__(self, tick: Tick) -> None: ...

    def close(self) -> None:
        """Called once at the end of `fit`, after an exception too."""


class Every(Hook):
    """Calls a hook on the steps at which a period of so many examples ends."""

    def __init__(self, period: int, hook: Hook) -> None:
        self.period, self.hook, self.part = period, hook, hook.part

    def begin(self, state: State) -> None:
        self.hook.begin(state)

    def __call__(self, tick: Tick) -> None:
        if tick.ends(self.period):
            self.hook(tick)

    def close(self) -> None:
        self.hook.close()


def fit(
    step: Callable[[State, Batch], tuple[State, Scalars]],
    state: State,
    batches: Iterable[Batch],
    *,
    until: int,
    hooks: Sequence[Hook] = (),
    watch: Stopwatch | None = None,
) -> State:
    """Trains until at least `until` examples are seen, from wherever the state stands.

    `batches` must begin at the position `state.examples`; `prefetch` brings them to the devices in
    time. The host waits for a step only to stay at most `AHEAD` steps before the devices. `watch` is
    told what the time goes to: data, the first step (which compiles), steps, and each hook's `part`.

    Raises:
      ValueError: the batches end before `until`.
    """
    number, examples = int(state.step), int(state.examples)
    running: collections.deque[Scalars] = collections.deque()
    source, part = iter(batches), "first step"
    with contextlib.ExitStack() as closing:
        if watch is None:
            watch = closing.enter_context(contextlib.closing(Stopwatch("start")))
        for hook in reversed(hooks):
            closing.callback(hook.close)
        for hook in hooks:
            with watch(hook.part):
                hook.begin(state)
        while examples < until:
            with watch("data"):
                batch = next(source, None)
            if batch is None:
                raise ValueError(f"The batches ended after {examples} of {until} examples.")
            with watch(part):
                state, scalars = step(state, batch)
                running.append(scalars)
                if len(running) > AHEAD:
                    jax.block_until_ready(running.popleft())
            number, before, examples = number + 1, examples, examples + len(batch.weight)
            part = STEPS
            tick = Tick(number, before, examples, examples >= until, state, scalars, batch)
            for hook in hooks:
                with watch(hook.part):
                    hook(tick)
    return state


def prefetch(batches: Iterable[Batch], mesh: Mesh, ahead: int = 1) -> Iterator[Batch]:
    """Sends batches of host arrays to the mesh, each `ahead` steps before it is asked for."""
    waiting: collections.deque[Batch] = collections.deque()
    for batch in batches:
        waiting.append(put_batch(batch, mesh))
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting
