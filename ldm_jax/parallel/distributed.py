"""Several processes as one run: how they find each other, and how they part.

On TPU VMs, GKE, Slurm and Open MPI JAX finds out by itself who there is; elsewhere it is told, by flags or by the
environment. A process that never comes ends the others after `--arrival-timeout`. A process that is lost ends the
others: on CPUs as soon as they wait for it, elsewhere when JAX's coordination service has missed its heartbeats for
`--heartbeat-timeout` and aborts them. Both end with exit status ABORTED. Whoever started them starts all of them again,
and the run continues.
"""

import argparse
import atexit
import contextlib
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

PREEMPTED = (
    75  # exit status: stopped from outside, saved, to be continued (EX_TEMPFAIL of sysexits.h)
)
INTERRUPTED = 130  # exit status: Ctrl-C (128 + SIGINT), saved where training had begun
ABORTED = 134  # exit status: another process was lost (SIGABRT)

THREADS = 64  # of XLA on CPUs

_log = logging.getLogger(__name__)
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_FLAGS = ("--coordinator", "--num-processes", "--process-id")


class Place(NamedTuple):
    """Where the processes meet, how many they are, and which of them this one is."""

    coordinator: str
    num_processes: int
    process_id: int


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What a command that may run as several processes is told."""
    group = parser.add_argument_group("several processes")
    text = "join the other processes of a TPU slice, or of a job of Slurm or Open MPI"
    group.add_argument("--distributed", action="store_true", help=text)
    text = "elsewhere: where process 0 is reached (or in JAX_COORDINATOR_ADDRESS)"
    group.add_argument(_FLAGS[0], metavar="HOST:PORT", help=text)
    text = "how many processes there are (or in JAX_NUM_PROCESSES)"
    group.add_argument(_FLAGS[1], type=int, metavar="N", help=text)
    text = "which of them this is, from 0 (or in JAX_PROCESS_ID)"
    group.add_argument(_FLAGS[2], type=int, metavar="I", help=text)
    text = "how long to wait for all to arrive (default 300)"
    group.add_argument("--arrival-timeout", type=int, default=300, metavar="SECONDS", help=text)
    text = "silence after which a process counts as lost, and all others end (default 100)"
    group.add_argument("--heartbeat-timeout", type=int, default=100, metavar="SECONDS", help=text)


@contextlib.contextmanager
def joined(flags: argparse.Namespace) -> Iterator[None]:
    """Joins the other processes, if there are any; to be called before anything is computed.

    A process that ends with an error leaves at once, so that the others do not wait for it.

    Raises:
      ValueError: only a part of the three settings is given, they contradict each other, or `--distributed` finds no
        slice or job that this process is part of.
    """
    place = _place(flags, os.environ)
    if place is None and not flags.distributed:
        yield
        return
    with _at_most(flags.arrival_timeout):
        _initialize(place, flags)
    _log.info("Process %d of %d.", jax.process_index(), jax.process_count())
    try:
        yield
    except SystemExit:
        raise  # of all processes together, as after a preemption
    except BaseException as error:
        if lost(error):
            _log.error(
                "Another process was lost (%s); start all again, to continue from the last checkpoint.",
                " ".join(str(error).split()),
            )
            _leave(ABORTED)
        atexit.register(_leave)  # before JAX's own, which would wait for the others
        raise


def lost(error: BaseException) -> bool:
    """Returns whether an error says that another process is gone: of Gloo, which carries messages between CPUs."""
    return re.search(r"\bGloo \w.* failed", str(error)) is not None


def is_first() -> bool:
    """Whether this process writes what people read; in a run of several the others compute and save with it."""
    return jax.process_index() == 0


def machine() -> str:
    """What all processes compute on together: "TPU v5p x 8"."""
    return f"{jax.devices()[0].device_kind} x {jax.device_count()}"


def agreed(value: int) -> int:
    """What the first process says, for all; each calls this."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def agreed_numbers(values: Sequence[int], most: int) -> list[int]:
    """The first process's numbers, `most` at most, for all; each calls this, with as large a `most`."""
    sent = np.zeros(most + 1, np.int32)
    sent[: len(values) + 1] = len(values), *values
    count, *numbers = multihost_utils.broadcast_one_to_all(sent).tolist()
    return numbers[:count]


@contextlib.contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    """Ends this process if the block takes longer, with one sentence where JAX has a page."""

    def end() -> None:
        _log.error(
            "Not all processes arrived within --arrival-timeout=%d seconds; look at the logs of the others, and start"
            " all again.",
            seconds,
        )
        _leave(ABORTED)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _initialize(place: Place | None, flags: argparse.Namespace) -> None:
    _prepare_cpus()
    timeouts = {
        "initialization_timeout": flags.arrival_timeout + 60,  # after `_at_most`
        "heartbeat_timeout_seconds": flags.heartbeat_timeout,
        "shutdown_timeout_seconds": flags.arrival_timeout,
    }
    if place is not None:
        _log.info(
            "Process %d waits at %s until all %d are there, %d s at most.",
            *(place.process_id, place.coordinator, place.num_processes, flags.arrival_timeout),
        )
        jax.distributed.initialize(*place, **timeouts)
        return
    try:
        jax.distributed.initialize(**timeouts)
    except ValueError as error:
        raise ValueError(
            f"--distributed finds no TPU slice and no job that this process is part of ({error}); give"
            f" {', '.join(_FLAGS)}"
        ) from error


def _prepare_cpus() -> None:
    """Has XLA's CPU backend, which reads this when it starts, send one message after the other.

    Programs that run at the same time, and parts of one that do, would take each other's messages; and a device that
    waits for another holds a thread, of which there are else as many as cores.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    os.environ.setdefault("NPROC", str(THREADS))
    in_order = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {in_order}".strip()


def _place(flags: argparse.Namespace, environment: Mapping[str, str]) -> Place | None:
    given = (flags.coordinator, flags.num_processes, flags.process_id)
    if given == (None, None, None):
        given = tuple(environment.get(name) for name in _VARIABLES)
        if given[1:] == (None, None):
            return None  # an address alone may be meant for `--distributed`
    if None in given:
        raise ValueError(
            f"{', '.join(_FLAGS)} go together (or {', '.join(_VARIABLES)}); got {given}"
        )
    coordinator, num_processes, process_id = given
    try:
        place = Place(coordinator, int(num_processes), int(process_id))
    except ValueError:
        raise ValueError(f"{' and '.join(_VARIABLES[1:])} are numbers; got {given[1:]}") from None
    if not 0 <= place.process_id < place.num_processes:
        raise ValueError(
            f"process {place.process_id} of {place.num_processes}: they are counted from 0"
        )
    if not place.coordinator.rpartition(":")[2].isdigit():
        raise ValueError(f"the coordinator is HOST:PORT; got {place.coordinator!r}")
    return place


def _leave(status: int = 1) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
