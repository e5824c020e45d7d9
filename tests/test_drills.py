"""Kills at any moment: a run that was killed ends as one that was not, bit for bit."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from orbax.checkpoint import v1 as ocp

from ldm_jax import encode
from ldm_jax.training.checkpoints import Checkpoints

ROOT = Path(__file__).parent.parent
KILLS = 6
EXAMPLES = 640


def start(workdir: Path) -> subprocess.Popen:
    """`python -m ldm_jax.train` as a user starts it."""
    command = [sys.executable, "-m", "ldm_jax.train", f"--workdir={workdir}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (workdir / "log").open("a") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def saving(workdir: Path) -> bool:
    return any("orbax-checkpoint-tmp" in path.name for path in (workdir / "checkpoints").glob("*"))


def seen(workdir: Path) -> int:
    return Checkpoints(workdir / "checkpoints").latest() or 0


def kill_when(process: subprocess.Popen, condition) -> bool:
    """Kills the process once the condition holds; False if it ended before."""
    while process.poll() is None:
        if condition():
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.002)
    return False


def arrays(workdir: Path) -> dict[str, np.ndarray]:
    """Everything in the last checkpoint, read without the library that wrote it."""
    tree = ocp.load(workdir / "checkpoints" / f"{EXAMPLES:012d}")
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def told(workdir: Path) -> tuple[list[dict], dict[int, dict]]:
    """What a run leaves to read, but for its speed; the last evaluation of a count of examples holds."""
    metrics = lines(workdir / "metrics.jsonl")
    for row in metrics:
        row.pop("examples_per_second", None)
    return metrics, {row["examples"]: row for row in lines(workdir / "evaluations.jsonl")}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_run_killed_at_any_moment_ends_bit_identical_to_an_undisturbed_one(tmp_path):
    train = dataclasses.replace(tiny.TINY.train, examples=EXAMPLES, save_every=32, log_every=48)
    evaluation = dataclasses.replace(tiny.TINY.eval, every=320)
    config = dataclasses.replace(tiny.TINY, train=train, eval=evaluation)
    calm, stormy = tmp_path / "calm", tmp_path / "stormy"
    tiny.run(encode, calm, tiny.given(tmp_path, config))
    stormy.mkdir()
    for name in ("config.json", "latents"):  # the config is rewritten, the latents are not
        (stormy / name).symlink_to(calm / name)
    assert start(calm).wait() == 0, (calm / "log").read_text()

    random.seed(0)
    killed = during_save = 0
    while killed < KILLS:
        process, before = start(stormy), seen(stormy)
        if killed % 3 == 0:  # as soon as a save is under way
            hit = kill_when(process, lambda: saving(stormy))
            during_save += hit
        elif killed % 3 == 1:  # anywhere after some progress
            later = time.monotonic() + random.uniform(0.0, 0.5)
            hit = kill_when(
                process,
                lambda: seen(stormy) > before and time.monotonic() > later,  # noqa: B023
            )
        else:  # at any moment, the start included
            later = time.monotonic() + random.uniform(1.0, 12.0)
            hit = kill_when(process, lambda: time.monotonic() > later)  # noqa: B023
        assert hit, f"the run ended before its kill {killed + 1}:\n{(stormy / 'log').read_text()}"
        killed += 1
    assert start(stormy).wait() == 0, (stormy / "log").read_text()

    assert during_save >= 1
    undisturbed, disturbed = arrays(calm), arrays(stormy)
    assert undisturbed.keys() == disturbed.keys()
    assert told(stormy) == told(calm)
    for name, array in undisturbed.items():
        np.testing.assert_array_equal(disturbed[name], array, err_msg=name)
