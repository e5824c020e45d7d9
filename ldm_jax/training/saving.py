"""The hooks that save a run: on time, and once more when it is told to stop. They belong to all processes of it."""

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence

import jax
from jax.experimental import multihost_utils

from ldm_jax.training.checkpoints import Checkpoints
from ldm_jax.training.loop import Hook, Preempted, Tick
from ldm_jax.training.state import State

_log = logging.getLogger(__name__)


class Preemption(Hook):
    """Saves once more and ends the run when it is told to stop: by SIGTERM, which announces the end of a machine.

    In a run of several processes any of them may be told, and JAX agrees with the others on the moment at which all
    save. `settle` are asked first, as those of `Save`, after which this hook comes. What takes long between two steps,
    such as an evaluation, calls `check` now and then, in all processes alike.

    Raises:
      Preempted: the state is saved.
      OSError: it could not be.
    """

    part = "checkpoints"

    def __init__(
        self, checkpoints: Checkpoints, status: int, settle: Sequence[Callable[[], None]] = ()
    ) -> None:
        self._checkpoints, self._status, self._settle = checkpoints, status, settle
        self._told, self._before, self._checked = threading.Event(), None, 0
        if jax.process_count() == 1:  # else JAX listens
            self._before = signal.signal(signal.SIGTERM, lambda *_: self._told.set())

    def __call__(self, tick: Tick) -> None:
        if not tick.last:
            self.check(tick.state)

    def check(self, state: State) -> None:
        """Saves this state and ends the run, if it was told to stop. Raises as the hook."""
        if not self._reached():
            return
        _log.warning("Told to stop after %d examples: saving.", state.examples)
        for settle in self._settle:
            settle()
        with _told():
            self._checkpoints.wait()
        self._checkpoints.save(state)
        self._checkpoints.wait()
        _log.warning("Saved after %d examples; the same command continues.", state.examples)
        raise Preempted(self._status)

    def close(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _reached(self) -> bool:
        if jax.process_count() == 1:
            return self._told.is_set()
        self._checked += 1  # they agree on a number that none of them has come to
        return multihost_utils.reached_preemption_sync_point(self._checked)


class Save(Hook):
    """Saves the state at the end of every period of examples, and waits for the last save.

    `settle` are asked first, such as `guard.settle` and `metrics.settle`: no state is saved that
    the guard would refuse, and no checkpoint is ahead of the metrics. Training goes on after a save
    that failed, unless it was the last; this hook comes after those whose work must not be lost.
    """

    part = "checkpoints"

    def __init__(
        self, checkpoints: Checkpoints, period: int, settle: Sequence[Callable[[], None]] = ()
    ) -> None:
        self._checkpoints, self._period, self._settle = checkpoints, period, settle

    def __call__(self, tick: Tick) -> None:
        if not tick.ends(self._period):
            return
        for settle in self._settle:
            settle()
        with _told():
            self._checkpoints.wait()
        with contextlib.nullcontext() if tick.last else _told():
            self._checkpoints.save(tick.state)
        if tick.last:
            self._checkpoints.wait()

    def close(self) -> None:
        with _told():
            self._checkpoints.close()


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _log.error("%s Training goes on without it.", error)
