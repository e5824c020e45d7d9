import io
import json
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from PIL import Image
from toy import ticks

from ldm_jax.parallel.mesh import MeshConfig, make_mesh
from ldm_jax.training import Tick, TrainingError, fit
from ldm_jax.training.hooks import (
    EXPLODED,
    RECENT,
    Guard,
    Late,
    Metrics,
    Profiler,
    Progress,
    duration,
)
from ldm_jax.training.loop import AHEAD
from ldm_jax.training.saving import Save, Saver


def test_scalars_come_back_when_their_step_is_over_and_all_come_back_at_the_end():
    late = Late()
    given = [[over.step for over in late.push(tick)] for tick in ticks(range(6))]
    assert given == [[]] * AHEAD + [[1], [2], [3], [4, 5, 6]]


def run_guard(directory, losses, **settings):
    guard = Guard(directory, lambda: 40, **settings)
    for tick in ticks(losses):
        guard(tick)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 5, 19])
def test_a_loss_that_is_not_finite_stops_the_run_with_its_batch_saved(tmp_path, bad, place):
    losses = [1.0] * place + [bad] + [1.0] * (19 - place)
    with pytest.raises(TrainingError) as caught:
        run_guard(tmp_path, losses)
    examples = 8 * (place + 1)
    path = tmp_path / f"bad_batch_{examples}.npz"
    message = str(caught.value)
    for part in (f"step {place + 1},", f"{examples} examples", "of 40 examples", str(path)):
        assert part in message
    expected = toy.batch(8 * place)
    with np.load(path) as batch:
        assert set(batch.files) == {"latents", "cond", "weight", "index"}
        for name in batch.files:
            np.testing.assert_array_equal(batch[name], getattr(expected, name))


def test_a_gradient_that_is_not_finite_stops_the_run_though_the_loss_is(tmp_path):
    guard = Guard(tmp_path, lambda: None)
    with pytest.raises(TrainingError, match=r"grad_norm became nan .* there is no checkpoint yet"):
        for tick in ticks([1.0] * 3, grad_norm=float("nan")):
            guard(tick)


def judged(steps, **settings):
    """The number of steps after which the guard stops a run with these losses; None if it does not."""
    guard = Guard("nowhere", lambda: None, **settings)
    guard._stop = lambda tick, fault: (_ for _ in ()).throw(TrainingError(tick.step))
    try:
        for step, loss in enumerate(steps, 1):
            guard._judge([Tick(step, 0, 0, False, None, {"loss": float(loss)}, None)])
    except TrainingError as stopped:
        return stopped.args[0]


def test_a_loss_that_explodes_stops_the_run_and_one_that_rises_does_not(tmp_path):
    usual = [1.0, 2.0, 3.0] * 20
    assert judged([*usual, *[19.0] * EXPLODED, 1.0]) is None
    assert judged([*usual, *[21.0] * (EXPLODED - 1), 1.0, 1.0]) is None
    assert judged([*usual, *[21.0] * EXPLODED, 1.0]) == 60 + EXPLODED
    assert judged([*usual, *[21.0] * EXPLODED, 1.0], factor=11.0) is None
    with pytest.raises(
        TrainingError, match=r"rose to 21 from a median of 2, and 12 of the last 16"
    ):
        run_guard(tmp_path, [*usual, *[21.0] * EXPLODED])


# Losses of a batch of one example, healthy and as heavy-tailed as they come: a share of them exceeds 10 medians.
HEAVY = {
    # eps prediction, which at low noise cannot do better than 1, where a typical loss is 0.03
    "eps": lambda random, size: np.where(
        random.random(size) < 0.07, 1.0, random.gamma(2.0, 0.015, size)
    ),
    "log-normal": lambda random, size: random.lognormal(0.0, 1.5, size),
    "Pareto without a mean": lambda random, size: 1 + random.pareto(1.0, size),
}


@pytest.mark.parametrize("draw", HEAVY.values(), ids=HEAVY)
def test_heavy_tailed_losses_raise_no_alarm_and_their_explosion_does_within_tens_of_steps(draw):
    random = np.random.default_rng(0)
    healthy = draw(random, 10_000)
    share = np.mean(healthy > 10 * np.median(healthy))
    assert (
        0.04 < share < 0.08
    )  # a guard that judges each loss alone stops this run 400 times and more
    assert math.comb(RECENT, EXPLODED) * share**EXPLODED < 2e-10  # a false alarm in 5e9 steps
    assert judged(healthy) is None
    for _ in range(20):
        before = draw(random, 128)
        for factor in (np.full(40, 9e4), np.geomspace(1, 6e4, 40)):  # at once, or from 0.7 to 45598
            assert judged([*before, *draw(random, 40) * factor]) <= 128 + 40


def test_false_alarms_are_as_frequent_as_independent_losses_make_them():
    """Where each of 16 steps is high with a chance of 60%, as alarms can be counted there: the binomial's tail."""
    random, runs = np.random.default_rng(0), 400
    tail = (
        math.comb(RECENT, n) * 0.6**n * 0.4 ** (RECENT - n) for n in range(EXPLODED, RECENT + 1)
    )
    chance = sum(tail)
    assert chance < math.comb(RECENT, EXPLODED) * 0.6**EXPLODED  # the bound that the guard states
    drawn = np.where(random.random((runs, RECENT)) < 0.6, 11.0, 1.0)
    alarms = sum(judged(steps, losses=[1.0] * 112) is not None for steps in drawn)
    assert alarms == pytest.approx(runs * chance, abs=4 * math.sqrt(runs * chance))


def test_a_run_that_continues_is_guarded_from_its_first_step(tmp_path):
    """As one that was not stopped: its checkpoint holds the losses; on other devices too."""
    run = toy.Run(tmp_path)
    guard = Guard(tmp_path, run.checkpoints.latest)
    run.go(400, [guard, Save(Saver(run.checkpoints, guard), 40)])
    meshes = [None, make_mesh(MeshConfig(data=2), jax.devices()[:2])]
    for mesh in meshes:
        again = toy.Run(tmp_path, mesh)
        losses = again.checkpoints.losses(400)
        assert losses == list(guard.losses) and len(losses) == 50
        assert judged([1e4] * 40, losses=losses) == EXPLODED
        assert judged([1e4] * 40) is None
    assert again.checkpoints.losses(0) == []


@pytest.mark.parametrize("period", [8, 40])
def test_an_explosion_replaces_no_checkpoint(tmp_path, period):
    """Resumed on data that is 300 times too large: after the stop the newest checkpoints are from before."""
    run = toy.Run(tmp_path, keep=2)
    guard = Guard(tmp_path, run.checkpoints.latest)
    run.go(400, [guard, Save(Saver(run.checkpoints, guard), 40)])

    def too_large():
        for batch in toy.batches(400):
            yield batch._replace(latents=300 * batch.latents)

    guard = Guard(tmp_path, run.checkpoints.latest, losses=run.checkpoints.losses(400))
    hooks = [guard, Save(Saver(run.checkpoints, guard), period)]
    with pytest.raises(TrainingError, match="last good checkpoint: of 400 examples"):
        fit(run.step, run.state(), too_large(), until=4000, hooks=hooks)
    assert sorted(int(path.name) for path in run.checkpoints.directory.iterdir()) == [360, 400]


def test_a_run_that_ends_in_doubt_is_saved_beside_the_older_checkpoints(tmp_path):
    run = toy.Run(tmp_path, keep=1)
    guard = Guard(tmp_path, run.checkpoints.latest)
    run.go(400, [guard, Save(Saver(run.checkpoints, guard), 400)])
    doubtful = Guard(tmp_path, run.checkpoints.latest, losses=[1.0] * 100 + [100.0])
    Saver(run.checkpoints, doubtful).save(run.state()._replace(examples=jnp.uint32(408)), wait=True)
    assert sorted(int(path.name) for path in run.checkpoints.directory.iterdir()) == [400, 408]


def test_the_first_losses_may_fall_steeply(tmp_path):
    run_guard(tmp_path, [1000.0, 100.0, 10.0, 1.0, 1.0, 100.0], window=128)


@pytest.mark.parametrize("poisoned", [40, 48, 72])
def test_a_run_that_meets_nan_keeps_only_checkpoints_from_before(tmp_path, poisoned):
    """The batch that ends at `poisoned` examples is bad; the period of the saves is 40."""
    run = toy.Run(tmp_path)
    guard = Guard(tmp_path, run.checkpoints.latest)
    save = Save(Saver(run.checkpoints, guard), 40)

    def source():
        for batch in toy.batches(0):
            if batch.index[-1] + 1 == poisoned:
                batch.latents[3] = np.nan
            yield batch

    with pytest.raises(TrainingError, match=rf"loss became nan .* {poisoned} examples"):
        fit(run.step, run.state(), source(), until=400, hooks=[guard, save])
    assert run.checkpoints.latest() == (None if poisoned == 40 else 40)
    with np.load(tmp_path / f"bad_batch_{poisoned}.npz") as batch:
        assert batch["index"][-1] + 1 == poisoned
        assert np.isnan(batch["latents"][3]).all()


class Board:
    """Takes what a clu writer takes."""

    def __init__(self):
        self.scalars, self.images, self.texts, self.calls = {}, {}, {}, Counter()

    def write_scalars(self, step, scalars):
        self.scalars.setdefault(step, {}).update(scalars)

    def write_images(self, step, images):
        self.images[step] = images

    def write_texts(self, step, texts):
        self.texts[step] = texts

    def flush(self):
        self.calls["flush"] += 1

    def close(self):
        self.calls["close"] += 1


def rows(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_the_means_over_each_period_of_examples(tmp_path):
    board = Board()
    metrics = Metrics(tmp_path, 24, board)
    for tick in ticks([1.0, 2.0, 6.0, 4.0, 5.0, 9.0, 7.0], grad_norm=2.0):
        metrics(tick)
    metrics.close()
    found = rows(tmp_path)
    assert [row["examples"] for row in found] == [24, 48, 56]
    assert [row["step"] for row in found] == [3, 6, 7]
    assert [row["loss"] for row in found] == [3.0, 6.0, 7.0]
    assert {row["grad_norm"] for row in found} == {2.0}
    assert all(row["examples_per_second"] > 0 for row in found)
    assert {step: row["loss"] for step, row in board.scalars.items()} == {24: 3.0, 48: 6.0, 56: 7.0}
    assert "w" in board.texts[8]["parameters"]
    assert "(2, 3)" in board.texts[8]["parameters"]
    assert board.calls["close"] == 1


def test_metrics_of_a_period_are_written_before_a_save_asks_for_it(tmp_path):
    metrics = Metrics(tmp_path, 24, Board())
    for tick in ticks([1.0] * 3, last=False):
        metrics(tick)
    assert rows(tmp_path) == []
    metrics.settle()
    assert [row["examples"] for row in rows(tmp_path)] == [24]


def test_a_run_that_continues_from_a_save_writes_the_lines_of_one_that_did_not_stop(tmp_path):
    """The save at 40 examples falls into the second period of 24."""

    def losses(directory):
        return [(row["examples"], row["loss"]) for row in rows(directory)]

    steps = list(ticks([1.0, 2.0, 6.0, 4.0, 5.0, 9.0, 7.0]))
    for stop in (7, 5):
        metrics = Metrics(tmp_path / str(stop), 24, Board())
        for tick in steps[:stop]:
            metrics(tick)
            if tick.examples == 40:
                metrics.settle()
    again = Metrics(tmp_path / "5", 24, Board(), since=40)
    for tick in steps[5:]:
        again(tick)
    assert losses(tmp_path / "5") == losses(tmp_path / "7")
    assert losses(tmp_path / "7") == [(24, 3.0), (40, 4.5), (48, 9.0), (56, 7.0)]


def test_a_save_that_failed_does_not_hide_why_the_run_stops(tmp_path):
    def last_good():
        raise OSError("the disk is full")

    with pytest.raises(TrainingError, match=r"loss became nan .* unknown \(the disk is full\)"):
        for tick in ticks([float("nan")]):
            Guard(tmp_path, last_good)(tick)


def test_metrics_of_steps_that_a_resumed_run_takes_again_are_dropped(tmp_path):
    metrics = Metrics(tmp_path, 8, Board())
    for tick in ticks([1.0] * 6):
        metrics(tick)
    metrics.write(32, {"clip_score": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"examples": 56, "lo')  # killed in the middle of a line
    Metrics(tmp_path, 8, Board(), since=32)
    assert [row["examples"] for row in rows(tmp_path)] == [8, 16, 24, 32, 32]
    Metrics(tmp_path, 8, Board(), since=0).write(0, {"clip_score": 0.1})
    assert rows(tmp_path) == [{"examples": 0, "clip_score": 0.1}]


@pytest.mark.slow
def test_tensorboard_can_read_what_is_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from ldm_jax.training.hooks import tensorboard

    metrics = Metrics(tmp_path, 8, tensorboard(tmp_path))
    for tick in ticks([3.0, 5.0]):
        metrics(tick)
    metrics.write_images(16, {"samples": np.full((2, 4, 4, 3), 200, np.uint8)})
    metrics.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {"loss", "samples", "parameters"} <= set(events.Tags()["tensors"])
    assert [event.step for event in events.Tensors("loss")] == [8, 16]
    (samples,) = events.Tensors("samples")
    with Image.open(io.BytesIO(samples.tensor_proto.string_val[2])) as image:
        np.testing.assert_array_equal(image, np.full((4, 4, 3), 200))


class Stream(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


def progress(seconds, terminal, losses=20, **settings):
    """What is printed of steps that take so many seconds each, by a clock that is ours."""
    stream, clock = Stream(terminal), iter(np.arange(0.0, 1e6, seconds))
    hook = Progress(400, stream=stream, clock=lambda: next(clock), **settings)
    for tick in ticks([2.0] * losses, before=160, last=False):
        hook(tick)
    hook.close()
    return stream.getvalue()


def test_progress_on_a_terminal_is_one_line_in_place():
    text = progress(1.0, terminal=True)
    assert text.count("\n") == 1 and text.endswith("\n")
    last = text.split("\r")[-1]
    # 8 examples a second from 168 to 320 of 400: 80 are left.
    for part in ("80%", "320/400 examples", "loss 2.0000", "8.0 examples/s", "10 s left"):
        assert part in last
    assert "MFU" not in last


def test_progress_elsewhere_is_a_line_now_and_then():
    lines = progress(10.0, terminal=False).splitlines()
    assert [re.search(r"(\d+)/400", line)[1] for line in lines] == ["168"] + [
        str(168 + 24 * i) for i in range(1, 7)
    ]
    assert "\r" not in "".join(lines)


def test_progress_says_which_share_of_the_peak_is_used_where_it_is_known(monkeypatch):
    monkeypatch.setattr("ldm_jax.training.hooks.peak_flops", lambda kind: 1000.0)
    text = progress(1.0, terminal=True, flops_per_example=500.0)
    # 8 examples/s of 500 FLOP on 8 devices of 1000 FLOP/s.
    assert f"MFU {8 * 500 / (1000 * jax.device_count()):.1%}" in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.4, "8 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (0, "0 s")]
)
def test_durations_read_as_people_say_them(seconds, text):
    assert duration(seconds) == text


def test_the_profiler_traces_the_steps_between_two_counts_and_stops_with_the_run(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: calls.append(path))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))

    def steps_traced(start, stop, count):
        calls.clear()
        profiler, traced = Profiler("there", start, stop), []
        for tick in ticks([1.0] * count):
            profiler(tick)
            if calls and calls[-1] == "there":
                traced.append(tick.examples)
        profiler.close()
        return traced, list(calls)

    assert steps_traced(16, 32, 8) == ([24], ["there", "stop"])
    assert steps_traced(0, 24, 8) == ([8, 16], ["there", "stop"])
    assert steps_traced(16, 1000, 8) == ([24, 32, 40, 48, 56], ["there", "stop"])
    assert steps_traced(1000, 2000, 8) == ([], [])
