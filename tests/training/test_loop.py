import itertools

import numpy as np
import pytest

from ldm_jax.parallel import MeshConfig, make_mesh
from ldm_jax.training import Every, Hook, State, fit, prefetch
from ldm_jax.training.loop import AHEAD
from ldm_jax.types import Batch


class Ticks(Hook):
    def __init__(self):
        self.seen, self.closed = [], 0

    def __call__(self, tick):
        self.seen.append(tick)

    def close(self):
        self.closed += 1


class Scalar:
    """Stands for a number on a device: it notes when the host waits for it."""

    def __init__(self, name, events):
        self.name, self.events = name, events

    def block_until_ready(self):
        self.events.append(("wait", self.name))


def batches(size, count=None):
    row = np.zeros((size, 1, 1, 1), np.float32)
    one = Batch(row, np.zeros((size, 1), np.int32), row[:, 0, 0, 0], np.zeros(size, np.uint32))
    return itertools.repeat(one) if count is None else itertools.repeat(one, count)


def state(step=0, examples=0):
    return State(np.int32(step), np.uint32(examples), {}, {}, ())


def counting(events):
    def step(state, batch):
        events.append(("step", int(state.step)))
        scalars = {"loss": Scalar(int(state.step), events)}
        return state._replace(
            step=state.step + 1, examples=state.examples + np.uint32(len(batch.weight))
        ), scalars

    return step


@pytest.mark.parametrize(("until", "steps"), [(32, 4), (33, 5), (40, 5), (0, 0)])
def test_a_run_ends_with_the_first_batch_that_reaches_its_end(until, steps):
    assert int(fit(counting([]), state(), batches(8), until=until).step) == steps


def test_ticks_count_steps_and_examples_from_where_the_state_stands():
    ticks = Ticks()
    fit(counting([]), state(5, 40), batches(8), until=64, hooks=[ticks])
    assert [(t.step, t.before, t.examples, t.last) for t in ticks.seen] == [
        (6, 40, 48, False),
        (7, 48, 56, False),
        (8, 56, 64, True),
    ]


@pytest.mark.parametrize("stops", [(80,), (8, 80), (24, 32, 80), tuple(range(8, 88, 8))])
def test_periods_end_at_the_same_examples_however_often_a_run_is_resumed(stops):
    ended, here = [], state()
    for stop in stops:
        ticks = Ticks()
        here = fit(counting([]), here, batches(8), until=stop, hooks=[Every(20, ticks)])
        ended += [tick.examples for tick in ticks.seen if tick.examples not in stops[:-1]]
    expected = [24, 40, 64, 80]  # the first to reach 20, 40, 60, 80
    assert ended == [examples for examples in expected if examples not in stops[:-1]]


def test_the_last_step_ends_every_period():
    ticks = Ticks()
    fit(counting([]), state(), batches(8), until=24, hooks=[Every(10**9, ticks)])
    assert [tick.examples for tick in ticks.seen] == [24]


def test_the_host_waits_for_a_step_only_when_two_more_are_under_way():
    events = []
    fit(counting(events), state(), batches(8), until=80)
    for i, (kind, name) in enumerate(events):
        if kind == "wait":
            assert events[:i].count(("step", name + AHEAD)) == 1
            assert events[:i].count(("step", name + AHEAD + 1)) == 0
    assert sum(kind == "wait" for kind, _ in events) == 10 - AHEAD


def test_every_hook_is_closed_after_an_exception_too():
    ticks, other = Ticks(), Ticks()

    class Stop(Hook):
        def __call__(self, tick):
            if tick.step == 2:
                raise KeyboardInterrupt

        def close(self):
            raise OSError("cannot close")

    with pytest.raises(OSError, match="cannot close") as caught:
        fit(counting([]), state(), batches(8), until=80, hooks=[ticks, Stop(), Every(1, other)])
    assert isinstance(caught.value.__context__, KeyboardInterrupt)
    assert (len(ticks.seen), ticks.closed, other.closed) == (2, 1, 1)


def test_batches_that_end_too_early_are_an_error_and_not_a_short_run():
    with pytest.raises(ValueError, match="ended after 24 of 80 examples"):
        fit(counting([]), state(), batches(8, 3), until=80)


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_prefetch_keeps_the_order_and_asks_so_many_batches_ahead(ahead):
    asked = []

    def source():
        for i in range(6):
            asked.append(i)
            yield {"x": np.full((8, 2), i)}

    given = prefetch(source(), make_mesh(MeshConfig()), ahead)
    for i in range(6):
        assert np.unique(next(given)["x"]) == i
        assert asked == list(range(min(6, i + 1 + ahead)))
    assert list(given) == []
