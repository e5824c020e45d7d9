"""The hooks that save a run: on time, and once more when it is told to stop. They belong to all processes of it."""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

import jax
from jax.experimental import multihost_utils

from ldm_jax.parallel.distributed import INTERRUPTED, PREEMPTED
from ldm_jax.training.checkpoints import Checkpoints
from ldm_jax.training.hooks import Guard
from ldm_jax.training.loop import Hook, Preempted, Tick
from ldm_jax.training.state import State

_log = logging.getLogger(__name__)


class Saver:
    """Saves states that the guard has judged, with the guard's window.

    `settle` are asked before each save, such as `metrics.settle`, so that no checkpoint is ahead of the metrics.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        guard: Guard | None = None,
        settle: Sequence[Callable[[], None]] = (),
    ) -> None:
        self._checkpoints, self._guard, self._settle = checkpoints, guard, settle

    def sure(self) -> bool:
        """Waits for the steps that still run, and returns False if the guard suspects that the loss explodes."""
        if self._guard is None:
            return True
        self._guard.settle()
        return not self._guard.doubtful

    def save(self, state: State, *, wait: bool = False) -> None:
        """Saves the state, which replaces no older checkpoint if the guard suspects that the loss explodes.

        Raises:
          OSError: it could not be written; without `wait` only what is known at once, else its whole writing.
        """
        sure = self.sure()
        for settle in self._settle:
            settle()
        with _told():
            self._checkpoints.wait()
        self._checkpoints.save(state, self._guard.losses if self._guard else (), replace=sure)
        if wait:
            self._checkpoints.wait()

    def close(self) -> None:
        """Waits for the last save, without the other processes."""
        with _told():
            self._checkpoints.close()


class Preemption(Hook):
    """Saves once more and ends the run when it is told to stop.

    A run is told by SIGTERM, which announces the end of a machine, by SIGHUP, the end of its terminal, and by Ctrl-C.
    A second Ctrl-C ends it at once. In a run of several processes any of them may be told, and JAX agrees with the
    others on the moment at which all save. This hook comes after `Save`. What takes long between two steps, such as an
    evaluation, calls `check` now and then, in all processes alike.

    Raises:
      Preempted: the state is saved. Its status is INTERRUPTED in a process that got Ctrl-C, else PREEMPTED.
      OSError: it could not be.
    """

    part = "checkpoints"

    def __init__(self, saver: Saver) -> None:
        self._saver, self._checked = saver, 0
        self._signals = Signals()

    def __call__(self, tick: Tick) -> None:
        if not tick.last:
            self.check(tick.state)

    def check(self, state: State) -> None:
        """Saves this state and ends the run, if it was told to stop. Raises as the hook."""
        if not self._reached():
            return
        _log.warning("Told to stop after %d examples: saving.", state.examples)
        self._saver.save(state, wait=True)
        _log.warning("Saved after %d examples; the same command continues.", state.examples)
        raise Preempted(INTERRUPTED if self._signals.interrupted else PREEMPTED)

    def close(self) -> None:
        self._signals.close()

    def _reached(self) -> bool:
        if jax.process_count() == 1:
            return self._signals.told
        self._checked += 1  # they agree on a number that none of them has come to
        return multihost_utils.reached_preemption_sync_point(self._checked)


class Signals:
    """Notes SIGTERM, SIGHUP and Ctrl-C; a second Ctrl-C ends the process at once, even while it compiles.

    A thread of its own counts Ctrl-C, as Python's handlers wait for the end of a call into XLA. A signal that the
    process was started to ignore, as by nohup, stays ignored.
    """

    def __init__(self) -> None:
        self.told = self.interrupted = False
        numbers = [signal.SIGHUP, signal.SIGINT]
        if jax.process_count() == 1:  # else JAX listens for SIGTERM, to tell the others
            numbers.append(signal.SIGTERM)
        numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write)
        threading.Thread(target=_count_interrupts, args=(read,), daemon=True).start()

    def close(self) -> None:
        """Gives the signals back to who had them before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._write)

    def _note(self, number: int, _: object) -> None:
        self.told = True
        self.interrupted = self.interrupted or number == signal.SIGINT
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)


def _count_interrupts(pipe: int) -> None:
    """Reads the numbers of signals, and ends the process at the second Ctrl-C."""
    interrupted = False
    with os.fdopen(pipe, "rb", buffering=0) as numbers:
        while number := numbers.read(1):
            if ord(number) != signal.SIGINT:
                continue
            if interrupted:
                print("Interrupted again: ends without saving.", file=sys.stderr, flush=True)
                os._exit(INTERRUPTED)
            interrupted = True
            _log.warning("Interrupted: saves after this step. Ctrl-C again ends without saving.")


class Save(Hook):
    """Saves the state at the end of every period of examples, and waits for the last save.

    A save waits for a later step while the guard suspects that the loss explodes. Training goes on after a save that
    failed, unless it was the last; this hook comes after those whose work must not be lost.
    """

    part = "checkpoints"

    def __init__(self, saver: Saver, period: int) -> None:
        self._saver, self._period, self._due = saver, period, False

    def __call__(self, tick: Tick) -> None:
        self._due = self._due or tick.ends(self._period)
        if self._due and (tick.last or self._saver.sure()):
            self._due = False
            with contextlib.nullcontext() if tick.last else _told():
                self._saver.save(tick.state, wait=tick.last)

    def close(self) -> None:
        self._saver.close()


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _log.error("%s Training goes on without it.", error)
