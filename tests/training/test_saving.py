import os
import signal
import time

import pytest
import toy
from toy import ticks

from ldm_jax.training import Hook, Preempted, fit
from ldm_jax.training.checkpoints import Checkpoints
from ldm_jax.training.saving import Preemption, Save


class Failing(Checkpoints):
    """Checkpoints on a disk that is or is not full."""

    def __init__(self, full):
        super().__init__("nowhere")
        self.full, self.asked, self.waited = full, [], 0

    def save(self, state):
        self.asked.append(time.monotonic())
        if self.full:
            raise OSError("The disk is full.")

    def wait(self):
        self.waited += 1


def test_training_goes_on_after_a_save_that_failed_and_says_so(caplog):
    checkpoints = Failing(full=True)
    for tick in ticks([1.0] * 5, last=False):
        Save(checkpoints, 16)(tick)
    assert len(checkpoints.asked) == 2
    assert caplog.text.count("The disk is full. Training goes on without it.") == 2


def test_a_run_does_not_end_well_when_its_last_save_fails():
    checkpoints = Failing(full=True)
    with pytest.raises(OSError, match="The disk is full"):
        for tick in ticks([1.0] * 3):
            Save(checkpoints, 10**6)(tick)
    assert len(checkpoints.asked) == 1


def test_the_last_save_is_waited_for():
    checkpoints = Failing(full=False)
    for tick in ticks([1.0] * 3):
        Save(checkpoints, 10**6)(tick)
    assert (len(checkpoints.asked), checkpoints.waited) == (1, 2)


def test_told_to_stop_a_run_saves_and_says_with_which_status(tmp_path):
    run = toy.Run(tmp_path)
    settled = []

    class Told(Hook):
        """Another process sends SIGTERM in the fifth step."""

        def __call__(self, tick):
            if tick.step == 5:
                os.kill(os.getpid(), signal.SIGTERM)

        def close(self):
            pass

    before = signal.getsignal(signal.SIGTERM)
    preemption = Preemption(run.checkpoints, 75, settle=[lambda: settled.append(True)])
    with pytest.raises(Preempted) as stopped:
        fit(run.step, run.state(), toy.batches(0), until=400, hooks=[Told(), preemption])
    assert stopped.value.code == 75
    assert run.checkpoints.latest() == 5 * 8
    assert settled == [True]
    assert signal.getsignal(signal.SIGTERM) is before


def test_told_to_stop_after_the_last_step_a_run_ends_as_it_would(tmp_path):
    run = toy.Run(tmp_path)
    preemption = Preemption(run.checkpoints, 75)
    os.kill(os.getpid(), signal.SIGTERM)
    fit(run.step, run.state(), toy.batches(0), until=8, hooks=[preemption])


def test_told_to_stop_while_a_hook_takes_long_a_run_saves_the_state_of_that_step(tmp_path):
    run = toy.Run(tmp_path)
    preemption = Preemption(run.checkpoints, 75)

    class Long(Hook):
        """Told in its course, after the last step."""

        def __call__(self, tick):
            if tick.last:
                preemption.check(tick.state)
                os.kill(os.getpid(), signal.SIGTERM)
                preemption.check(tick.state)

        def close(self):
            pass

    with pytest.raises(Preempted):
        fit(run.step, run.state(), toy.batches(0), until=24, hooks=[Long(), preemption])
    assert run.checkpoints.latest() == 24
