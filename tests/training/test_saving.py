import os
import signal
import subprocess
import sys
import time

import pytest
import toy
from toy import ticks

from ldm_jax.training import Hook, Preempted, fit
from ldm_jax.training.checkpoints import Checkpoints
from ldm_jax.training.saving import Preemption, Save, Saver


class Failing(Checkpoints):
    """Checkpoints on a disk that is or is not full."""

    def __init__(self, full):
        super().__init__("nowhere")
        self.full, self.asked, self.waited = full, [], 0

    def save(self, state, losses=(), *, replace=True):
        self.asked.append(time.monotonic())
        if self.full:
            raise OSError("The disk is full.")

    def wait(self):
        self.waited += 1


def test_training_goes_on_after_a_save_that_failed_and_says_so(caplog):
    checkpoints = Failing(full=True)
    for tick in ticks([1.0] * 5, last=False):
        Save(Saver(checkpoints), 16)(tick)
    assert len(checkpoints.asked) == 2
    assert caplog.text.count("The disk is full. Training goes on without it.") == 2


def test_a_run_does_not_end_well_when_its_last_save_fails():
    checkpoints = Failing(full=True)
    with pytest.raises(OSError, match="The disk is full"):
        for tick in ticks([1.0] * 3):
            Save(Saver(checkpoints), 10**6)(tick)
    assert len(checkpoints.asked) == 1


def test_the_last_save_is_waited_for():
    checkpoints = Failing(full=False)
    for tick in ticks([1.0] * 3):
        Save(Saver(checkpoints), 10**6)(tick)
    assert (len(checkpoints.asked), checkpoints.waited) == (1, 2)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)]
)
def test_told_to_stop_a_run_saves_and_says_with_which_status(tmp_path, number, status):
    run = toy.Run(tmp_path)
    settled = []

    class Told(Hook):
        """Another process sends the signal in the fifth step."""

        def __call__(self, tick):
            if tick.step == 5:
                os.kill(os.getpid(), number)

        def close(self):
            pass

    before = signal.getsignal(number)
    preemption = Preemption(Saver(run.checkpoints, settle=[lambda: settled.append(True)]))
    with pytest.raises(Preempted) as stopped:
        fit(run.step, run.state(), toy.batches(0), until=400, hooks=[Told(), preemption])
    assert stopped.value.code == status
    assert run.checkpoints.latest() == 5 * 8
    assert settled == [True]
    assert signal.getsignal(number) is before


def test_a_signal_that_was_ignored_stays_ignored(tmp_path):
    """As SIGHUP under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run = toy.Run(tmp_path)
        preemption = Preemption(Saver(run.checkpoints))
        os.kill(os.getpid(), signal.SIGHUP)
        fit(run.step, run.state(), toy.batches(0), until=40, hooks=[preemption])
    finally:
        signal.signal(signal.SIGHUP, before)


TWICE = """
import hashlib, os
from ldm_jax.training.saving import Signals

signals = Signals()
os.write(1, b"ready")
hashlib.pbkdf2_hmac("sha256", b"", b"", 2**30)  # one call that Python's handlers wait for, as they do for the compiler
"""


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once_with_one_line():
    command = [sys.executable, "-c", TWICE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(5)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    lines = said.decode().splitlines()
    assert len(lines) == 2 and "Ctrl-C again ends without saving" in lines[0]
    assert lines[1] == "Interrupted again: ends without saving."


def test_told_to_stop_after_the_last_step_a_run_ends_as_it_would(tmp_path):
    run = toy.Run(tmp_path)
    preemption = Preemption(Saver(run.checkpoints))
    os.kill(os.getpid(), signal.SIGTERM)
    fit(run.step, run.state(), toy.batches(0), until=8, hooks=[preemption])


def test_told_to_stop_while_a_hook_takes_long_a_run_saves_the_state_of_that_step(tmp_path):
    run = toy.Run(tmp_path)
    preemption = Preemption(Saver(run.checkpoints))

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
