import itertools

import jax
import jax.numpy as jnp
import pytest

from ldm_jax.training import Stopwatch
from ldm_jax.training.goodput import STEPS


@pytest.fixture
def watch():
    """One on a clock that goes on by a second whenever it is looked at."""
    ticks = itertools.count()
    watch = Stopwatch("start", clock=lambda: next(ticks))
    yield watch
    watch.close()


def test_every_second_is_charged_once_and_to_the_innermost_part(watch):
    with watch(STEPS), watch("data"):
        pass
    assert str(watch) == "Goodput 40.0%: 2.0 s of 5.0 s in steps; start 2.0 s, data 1.0 s"
    assert sum(watch.seconds.values()) == 5


def test_a_program_that_is_compiled_in_a_step_is_counted(watch):
    with watch("first step"):
        jax.jit(lambda x: x * 3)(jnp.ones(7))
    assert watch.programs["recompiled"] == 0
    with watch(STEPS):
        jax.jit(lambda x: x * 3)(jnp.ones(9))
    assert watch.programs["recompiled"] > 0
