"""What looks on while a run trains: progress, metrics, a guard, a profiler; `training.saving` has what saves it.

Scalars are fetched when their step is surely over, so that no hook makes the devices wait. In a run of several
processes the hooks that write for people (`Progress`, `Metrics`, `Profiler`) belong to the first, the guard to all.
"""

import collections
import io
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NotRequired, TypedDict

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from ldm_jax.files.durable import write_atomically
from ldm_jax.files.lines import append_line, read_lines
from ldm_jax.files.typed_json import write_json
from ldm_jax.parallel.chips import peak_flops
from ldm_jax.parallel.rules import leaf_name
from ldm_jax.training.loop import AHEAD, Hook, Tick, TrainingError, tolerated
from ldm_jax.types import Batch, Pixels

_log = logging.getLogger(__name__)

RECENT = 16  # newest losses that the guard judges
EXPLODED = 12  # high ones among them that are an explosion


class Late:
    """Gives steps back, with their scalars as floats, once they are surely over.

    The loop lets at most `AHEAD` steps run, so that what is older may be fetched without waiting.
    """

    def __init__(self) -> None:
        self._waiting: collections.deque[Tick] = collections.deque()

    def push(self, tick: Tick) -> list[Tick]:
        """Takes a step in and gives back those that are over; after the last step, all."""
        self._waiting.append(tick._replace(state=None))
        return self.flush(leave=0 if tick.last else AHEAD)

    def flush(self, leave: int = 0) -> list[Tick]:
        """Gives all but the newest `leave` steps back, and waits for those that still run."""
        over = []
        while len(self._waiting) > leave:
            tick = self._waiting.popleft()
            values = jax.device_get(tick.scalars)
            over.append(tick._replace(scalars={k: float(v) for k, v in values.items()}))
        return over


class Guard(Hook):
    """Stops a run when a scalar is not finite or the loss explodes, and saves the batch.

    A loss is high if it exceeds `factor` times the median of the losses in the window before the newest `RECENT`.
    An explosion is `EXPLODED` high losses among the newest `RECENT`. One high loss proves nothing: under eps
    prediction a batch of one example at a low noise level exceeds 10 medians. If losses are independent and high with
    probability p, a step raises a false alarm with a probability below C(16, 12) p^12: 4e-13 for p = 0.05.

    A quarter of the window must be seen before a loss is judged. `losses` are the newest ones of the run that
    continues, from its checkpoint, so that the guard is awake at its first step. `last_good` tells which checkpoint
    there is, e.g. `Checkpoints.latest`; the batch goes to `directory`.

    Raises:
      TrainingError: with the step, the last good checkpoint and the path of the batch.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        last_good: Callable[[], int | None],
        *,
        factor: float = 10.0,
        window: int = 128,
        losses: Sequence[float] = (),
    ) -> None:
        self._directory, self._last_good = epath.Path(directory), last_good
        self._factor, self._least = factor, window // 4
        self._losses = collections.deque(losses, maxlen=window)
        self._late = Late()

    def __call__(self, tick: Tick) -> None:
        self._judge(self._late.push(tick))

    def settle(self) -> None:
        """Waits for the steps that still run and judges them: to be asked before a save."""
        self._judge(self._late.flush())

    @property
    def losses(self) -> tuple[float, ...]:
        """The window, oldest loss first: what a checkpoint stores for the guard of the run that continues."""
        return tuple(self._losses)

    @property
    def doubtful(self) -> bool:
        """True if the newest loss is high, or a quarter of the newest `RECENT` are: an explosion may have begun."""
        _, high = self._high()
        return high[-1:] == [True] or sum(high) >= RECENT // 4

    def _judge(self, ticks: Sequence[Tick]) -> None:
        for tick in ticks:
            for name in ("loss", *tick.scalars):
                if not math.isfinite(tick.scalars[name]):
                    self._stop(tick, f"{name} became {tick.scalars[name]}")
            self._losses.append(tick.scalars["loss"])
            usual, high = self._high()
            if sum(high) >= EXPLODED:
                self._stop(
                    tick,
                    f"the loss rose to {self._losses[-1]:.4g} from a median of {usual:.4g}, and {sum(high)} of the last"
                    f" {RECENT} losses exceed train.explosion={self._factor:g} medians",
                )

    def _high(self) -> tuple[float, list[bool]]:
        """Returns the median, and which of the newest losses are high: none before a quarter of the window is seen."""
        before, newest = self.losses[:-RECENT], self.losses[-RECENT:]
        if not before or len(self._losses) < self._least:
            return math.nan, []
        usual = statistics.median(before)
        return usual, [loss > self._factor * usual for loss in newest]

    def _stop(self, tick: Tick, fault: str) -> None:
        raise TrainingError(
            f"Training stopped because {fault} at step {tick.step}, after {tick.examples} "
            f"examples; last good checkpoint: {self._good()}; {self._keep_batch(tick)}."
        )

    def _keep_batch(self, tick: Tick) -> str:
        path = self._directory / f"bad_batch_{tick.examples}.npz"
        try:
            _save_batch(path, tick.batch)
        except OSError as error:  # which must not hide why the run stops
            return f"the batch could not be saved as {path} ({error})"
        return f"the batch is saved as {path}"

    def _good(self) -> str:
        try:
            good = self._last_good()
        except OSError as error:  # of a save under way, which must not hide why the run stops
            return f"unknown ({error})"
        return "there is no checkpoint yet" if good is None else f"of {good} examples"


class MetricsLine(TypedDict):
    """A line of metrics.jsonl, with scalars of any other name."""

    examples: int
    loss: NotRequired[float]
    examples_per_second: NotRequired[float]


class Metrics(Hook):
    """Writes the mean of every scalar since the last line, as a line of JSON and to TensorBoard.

    A line ends with every period, and with every save, so that a run which continues from there writes the same lines.

    `directory/metrics.jsonl` has one object a line, with the examples seen. Lines beyond `since`,
    the examples seen when this run starts, are left from a run that got further than its last
    checkpoint, and are dropped, as they will be written again; a run that starts afresh drops all.
    `board` is a clu `MetricWriter`, e.g. of `tensorboard`; its steps are examples.
    """

    def __init__(self, directory: epath.PathLike, period: int, board: Any, since: int = 0) -> None:
        self._path, self._period, self._board = epath.Path(directory), period, board
        self._path.mkdir(parents=True, exist_ok=True)
        self._path /= "metrics.jsonl"
        lines = [line for line in read_lines(self._path, MetricsLine) if line["examples"] <= since]
        text = "".join(write_json(line) + "\n" for line in lines) if since else ""
        write_atomically(self._path, text.encode())  # a kill here loses no line
        self._late = Late()
        self._sums: collections.Counter[str] = collections.Counter()
        self._steps = 0
        self._mark: tuple[float, int] | None = None
        self._ends: collections.deque[float] = collections.deque()

    def __call__(self, tick: Tick) -> None:
        if self._mark is None:
            self._mark = time.monotonic(), tick.examples
            self._overview(tick)
        elif tick.ends(self._period):
            self._ends.append(time.monotonic())  # several periods may be written at one time
        self._add(self._late.push(tick))

    def settle(self) -> None:
        """Ends a line with the newest step, which it waits for: to be asked before a save."""
        self._add(self._late.flush())
        if self._steps:
            if self._newest.examples > self._mark[1]:
                self._ends.append(time.monotonic())
            self._end(self._newest)

    def write(self, examples: int, scalars: dict[str, float | int]) -> None:
        """Writes scalars of any other origin, such as scores."""
        with tolerated(f"A line of metrics, after {examples} examples,"):
            append_line(self._path, {"examples": examples, **scalars})
            self._board.write_scalars(examples, scalars)
            self._board.flush()

    def write_images(self, examples: int, images: dict[str, Pixels]) -> None:
        """Shows images on the board."""
        with tolerated(f"Samples for TensorBoard, after {examples} examples,"):
            self._board.write_images(examples, images)

    def close(self) -> None:
        with tolerated("The end of TensorBoard's file"):
            self._board.close()

    def _add(self, ticks: Sequence[Tick]) -> None:
        for tick in ticks:
            self._sums.update(tick.scalars)
            self._steps += 1
            self._newest = tick
            if tick.ends(self._period):
                self._end(tick)

    def _end(self, tick: Tick) -> None:
        means = {name: total / self._steps for name, total in self._sums.items()}
        self.write(tick.examples, {"step": tick.step, **means, **self._speed(tick)})
        self._sums.clear()
        self._steps = 0

    def _speed(self, tick: Tick) -> dict[str, float]:
        """Counts from the end of the first step, and so leaves its compilation out."""
        then, before = self._mark
        if tick.examples == before:  # the first step ended a period
            return {}
        self._mark = self._ends.popleft(), tick.examples
        return {"examples_per_second": (tick.examples - before) / (self._mark[0] - then)}

    def _overview(self, tick: Tick) -> None:
        from clu import parameter_overview

        table = parameter_overview.get_parameter_overview(tick.state.params, include_stats=False)
        _log.info("Parameters:\n%s", table)
        self._board.write_texts(tick.examples, {"parameters": f"```\n{table}\n```"})


def tensorboard(directory: epath.PathLike) -> Any:
    """A clu writer of TensorBoard files. It imports tensorflow: seconds, and 600 MB of memory."""
    from clu import metric_writers

    return metric_writers.SummaryWriter(str(directory))


class Progress(Hook):
    """One line on how far the run is: in place on a terminal, now and then a new one elsewhere.

    With `flops_per_example`, of a whole training step, it shows the share of the peak that is used,
    where the peak of the devices is known.
    """

    def __init__(
        self,
        total: int,
        flops_per_example: float | None = None,
        stream: io.TextIOBase | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._stream, self._clock = total, stream or sys.stderr, clock
        self._in_place = self._stream.isatty()
        self._pause = 0.5 if self._in_place else 30.0
        peak = (peak_flops(jax.devices()[0].device_kind) or 0.0) * jax.device_count()
        self._share = flops_per_example / peak if flops_per_example and peak else None
        self._losses: collections.deque[float] = collections.deque(maxlen=64)
        self._marks: collections.deque[tuple[float, int]] = collections.deque(maxlen=32)
        self._late = Late()

    def __call__(self, tick: Tick) -> None:
        self._losses.extend(over.scalars["loss"] for over in self._late.push(tick))
        now = self._clock()
        if not self._marks or tick.last or now - self._marks[-1][0] >= self._pause:
            self._marks.append((now, tick.examples))
            self._print(tick)

    def close(self) -> None:
        if self._in_place and self._marks:
            print(file=self._stream)

    def _print(self, tick: Tick) -> None:
        parts = [f"{tick.examples / self._total:4.0%}  {tick.examples}/{self._total} examples"]
        if self._losses:
            parts.append(f"loss {statistics.fmean(self._losses):.4f}")
        parts += self._pace(tick)
        start, end = ("\r\x1b[K", "") if self._in_place else ("", "\n")
        print(start + "  ".join(parts), end=end, file=self._stream, flush=True)

    def _pace(self, tick: Tick) -> Iterator[str]:
        (then, before), (now, _) = self._marks[0], self._marks[-1]
        if now == then:
            return
        rate = (tick.examples - before) / (now - then)
        yield f"{rate:.1f} examples/s"
        if self._share is not None:
            yield f"MFU {rate * self._share:.1%}"
        yield f"{duration(max(0, self._total - tick.examples) / rate)} left"


class Profiler(Hook):
    """Traces the steps between two counts of examples into `directory`, for TensorBoard."""

    def __init__(self, directory: epath.PathLike, start: int, stop: int) -> None:
        if not 0 <= start < stop:
            raise ValueError(f"A profile goes from fewer examples to more, got {start} to {stop}.")
        self._directory, self._start, self._stop = directory, start, stop
        self._tracing = False

    def __call__(self, tick: Tick) -> None:
        if self._tracing and (tick.examples >= self._stop or tick.last):
            jax.block_until_ready(tick.scalars)
            self.close()
        elif not self._tracing and tick.before <= self._start < tick.examples and not tick.last:
            jax.profiler.start_trace(str(self._directory))
            self._tracing = True

    def close(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()


def duration(seconds: float | int) -> str:
    """Seconds as people say them: `2 h 05 min`, `3 min 20 s`, `8 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _save_batch(path: epath.Path, batch: Batch) -> None:
    """Writes the whole batch, of all processes, with a name for each array."""
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    arrays = {
        leaf_name(name): multihost_utils.process_allgather(leaf, tiled=True)
        for name, leaf in leaves
    }
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        archive = io.BytesIO()  # as files in buckets cannot seek
        np.savez(archive, **arrays)
        write_atomically(path, archive.getvalue())
