"""Real processes on this machine, as hosts of a slice: they train alike, and what befalls one of them is survived."""

import dataclasses
import os
import random
import resource
import shutil
import signal
import socket
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
from ldm_jax.files.ledger import read_records
from ldm_jax.files.lines import read_lines
from ldm_jax.parallel.distributed import ABORTED, INTERRUPTED, PREEMPTED
from ldm_jax.studies.records import SamplingRecord
from ldm_jax.training.checkpoints import Checkpoints

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Sharding info not provided"),
]
ROOT = Path(__file__).parent.parent
WATCHED = ROOT / "tests" / "watched_train.py"
EXAMPLES, BATCH, RECORDS = 80, 8, 32  # over two epochs
HEARTBEAT = 10  # seconds
CONFIG = dataclasses.replace(
    tiny.TINY,
    data=dataclasses.replace(tiny.TINY.data, source=f"scenes:simple?count={RECORDS}"),
    optimizer=dataclasses.replace(tiny.TINY.optimizer, eps=1e-3),  # or it amplifies rounding
    train=dataclasses.replace(
        tiny.TINY.train, examples=EXAMPLES, batch=BATCH, log_every=BATCH, save_every=2 * BATCH
    ),
    eval=dataclasses.replace(tiny.TINY.eval, every=EXAMPLES // 2),
)


class Job:
    """`python -m ldm_jax.train`, watched, as so many processes, each with so many CPU devices."""

    def __init__(
        self,
        workdir,
        processes,
        devices,
        *words,
        missing=0,
        wait=0,
        timeout=300,
        program=(WATCHED,),
    ):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        flags = f"--xla_force_host_platform_device_count={devices}"
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": f"{flags} --xla_backend_optimization_level=0",
            "WAIT": str(wait),
            "SAVE_TIMEOUT": str(timeout),
        }
        self.logs = [workdir / f"log{i}" for i in range(processes)]
        self.processes, self.writers = [], []
        for i in range(processes):
            command = [sys.executable, *program, f"--workdir={workdir}", *words]
            if processes > 1:
                command += [f"--coordinator={address}", f"--num-processes={processes}"]
                command += [f"--process-id={i}", f"--heartbeat-timeout={HEARTBEAT}"]
            # By a process of its own, which has room for what a process without any has to say.
            with self.logs[i].open("a") as log:
                writer = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log)
            self.writers.append(writer)
            with writer.stdin as log:
                self.processes.append(
                    subprocess.Popen(command, env=environment, stdout=log, stderr=log)
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()
        for writer in self.writers:
            writer.wait()

    def wait(self, seconds=240):
        """The exit statuses; none may take longer than so many seconds."""
        end = time.monotonic() + seconds
        try:
            everyone = [*self.processes, *self.writers]
            return [each.wait(end - time.monotonic()) for each in everyone][: len(self.processes)]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it hangs:\n{self.said()}") from None

    def until(self, condition, seconds=240):
        """Waits for the condition while all processes run."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.said()
            assert all(process.poll() is None for process in self.processes), self.said()
            time.sleep(0.005)

    def said(self):
        return "\n".join(log.read_text()[-3000:] for log in self.logs if log.exists())


def finished(workdir, processes=1, devices=4, *words, **options):
    with Job(workdir, processes, devices, *words, **options) as job:
        assert job.wait() == [0] * processes, job.said()
    return workdir


def mesh(data, fsdp=1, tensor=1):
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    return [f"--config.mesh.{axis}={size}" for axis, size in sizes.items()]


def order(workdir):
    """Of every step [number, digest] of its batch's examples; a step that was done twice has seen the same."""
    steps = {}
    for path in (workdir / "seen").iterdir():
        for line in read_lines(path):
            digests = steps.setdefault(line["examples"], {})
            for number, digest in line["rows"].values():
                assert digests.setdefault(number, digest) == digest
    assert {len(digests) for digests in steps.values()} == {BATCH}
    return {examples: sorted(digests.items()) for examples, digests in sorted(steps.items())}


def losses(workdir):
    """Of every step; the examples that it ends at are part of it."""
    return {
        row["examples"]: row["loss"]
        for row in read_lines(workdir / "metrics.jsonl")
        if "loss" in row
    }


def seen(workdir):
    """Examples of the last step that is surely over."""
    return max(losses(workdir), default=0)


def params(workdir):
    path, here = workdir / "checkpoints" / f"{EXAMPLES:012d}", jax.devices()[0]
    on_one = jax.sharding.SingleDeviceSharding(here)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_one),
        ocp.metadata(path).metadata,
    )
    tree = ocp.load(path, abstract)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def saving(workdir):
    return any("orbax-checkpoint-tmp" in path.name for path in (workdir / "checkpoints").glob("*"))


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    directory = tmp_path_factory.mktemp("encoded")
    tiny.run(encode, directory, tiny.given(directory, CONFIG))
    return directory


@pytest.fixture
def fresh(encoded, tmp_path):
    """A directory with latents, and nothing trained."""
    (tmp_path / "latents").symlink_to(encoded / "latents")
    (tmp_path / "config.json").write_text((encoded / "config.json").read_text())
    return tmp_path


@pytest.fixture(scope="module")
def calm(encoded, tmp_path_factory):
    """One process with one device, undisturbed."""
    directory = tmp_path_factory.mktemp("calm")
    (directory / "latents").symlink_to(encoded / "latents")
    (directory / "config.json").write_text((encoded / "config.json").read_text())
    return finished(directory, 1, 1)


def assert_alike(workdir, calm, evaluated=(0, EXAMPLES // 2, EXAMPLES)):
    """The same examples, losses and end; but for rounding, as sums differ in their order."""
    found, expected = losses(workdir), losses(calm)
    assert list(found) == list(range(BATCH, EXAMPLES + 1, BATCH)) == list(expected)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=2e-4)
    ours, theirs = params(workdir), params(calm)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, rtol=1e-3, atol=1e-4, err_msg=name)
    scores, others = (
        {line["examples"]: line["scores"] for line in read_lines(path / "evaluations.jsonl")}
        for path in (workdir, calm)
    )
    assert set(evaluated) <= set(scores) <= set(others)
    for name, score in others[EXAMPLES].items():
        np.testing.assert_allclose(scores[EXAMPLES][name][0], score[0], atol=0.02, err_msg=name)
    assert order(workdir) == order(calm)


def test_no_example_is_skipped_or_repeated(calm):
    batches = order(calm)
    assert list(batches) == list(range(BATCH, EXAMPLES + 1, BATCH))
    examples = [example for batch in batches.values() for example in batch]
    assert [number for number, _ in examples] == list(range(EXAMPLES))
    records = [digest for _, digest in examples]
    epochs = [records[i : i + RECORDS] for i in range(0, EXAMPLES, RECORDS)]
    assert len(set(epochs[0])) == RECORDS
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
    assert len(set(epochs[2])) == EXAMPLES - 2 * RECORDS and set(epochs[2]) < set(epochs[0])


def test_processes_train_as_one_does(fresh, calm):
    """On all axes of the mesh; four of them do so below, where a run goes on."""
    finished(fresh, 2, 2, *mesh(1, 2, 2))
    assert_alike(fresh, calm)
    # All connections stand before there is anything to compile, as Gloo waits no longer than 30 s for one.
    _, found, after = (fresh / "log0").read_text().partition("Skipped metrics")
    assert found and "[Gloo]" not in after
    assert [row["recompiled"] for row in read_lines(fresh / "goodput.jsonl")] == [0]


def test_processes_score_as_one_does(calm, tmp_path):
    """Images of a model and given ones, of a number that no batch divides, against a reference."""
    program = ("-m", "ldm_jax.evaluate")
    scores = {}
    for processes, devices in ((1, 1), (2, 2)):
        workdir = tmp_path / str(processes)
        shutil.copytree(calm, workdir, ignore=shutil.ignore_patterns("log*", "compiled"))
        words = (
            "--config.eval.prompts=scenes:simple?count=13",
            "--config.eval.reference=scenes:simple?count=70&split=all&seed=5",
        )
        for more in ((), ("--images=scenes:simple?count=13",)):
            finished(workdir, processes, devices, *words, *more, program=program)
        scores[processes] = [line["scores"] for line in read_lines(workdir / "scores.jsonl")]
        assert len(list((workdir / "references").iterdir())) == 1
    assert len(scores[1]) == len(scores[2]) == 2
    for one, two in zip(scores[1], scores[2], strict=True):
        assert {"clip_score", "kid_clip", "cmmd"} < set(one) == set(two)
        for name, (value, *_) in one.items():
            scale = 100 if "x100" in name else 1
            assert two[name][0] == pytest.approx(value, rel=1e-6, abs=1e-6 * scale), name


def test_processes_make_a_study_as_one_does(tmp_path):
    """The same cells, of models that are trained alike; latents are made before."""
    found = {}
    for processes in (1, 2):
        workdir = tmp_path / str(processes)
        if processes > 1:
            shutil.copytree(tmp_path / "1" / "latents", workdir / "latents")
        workdir.mkdir(exist_ok=True)
        finished(workdir, processes, 1, program=(ROOT / "tests" / "watched_study.py",))
        records = read_records(SamplingRecord, workdir / "records.jsonl")
        found[processes] = {record.key: record for record in records}
    assert len(found[1]) == 6 and set(found[1]) == set(found[2])
    for key, record in found[1].items():
        ours, theirs = record.scores["clip_score"], found[2][key].scores["clip_score"]
        assert theirs[0] == pytest.approx(ours[0], abs=1e-2)


def test_a_run_compiles_once(fresh, tmp_path_factory, monkeypatch):
    """Its programs are in its directory: where they are, the same run compiles nothing."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    again = tmp_path_factory.mktemp("again")
    for path in fresh.iterdir():
        (again / path.name).symlink_to(path)
    finished(fresh, 1, 1, "--config.train.examples=16")
    shutil.copytree(fresh / "compiled", again / "compiled")
    finished(again, 1, 1, "--config.train.examples=16")
    (first,), (second,) = (read_lines(path / "goodput.jsonl") for path in (fresh, again))
    assert first["compiled"] > 10
    assert (second["compiled"], second["cached"]) == (0, first["compiled"] + first["cached"])
    assert first["recompiled"] == second["recompiled"] == 0


def test_a_full_disk_costs_checkpoints_and_not_the_run(fresh, calm):
    """From the second evaluation to the third no process may write a file of more than some kilobytes."""
    last = lambda: Checkpoints(fresh / "checkpoints").latest()  # noqa: E731
    with Job(fresh, 2, 2, *mesh(2, 2), wait=10) as job:
        job.until(lambda: len(read_lines(fresh / "validations")) == 2)
        # Between two saves, or the first process may be in the middle of one that succeeds.
        job.until(lambda: last() == EXAMPLES // 2 - BATCH)
        full(job, True)
        job.until(lambda: len(read_lines(fresh / "validations")) == 3)
        assert last() == EXAMPLES // 2 - BATCH  # still there
        full(job, False)
        assert job.wait() == [0, 0], job.said()
    assert all("Training goes on without it" in log.read_text() for log in job.logs)
    assert_alike(fresh, calm, evaluated=(0, EXAMPLES))


def full(job, now):
    """Limits the size of a file; processes are told by an OSError, as of a full disk."""
    for process in job.processes:
        limit_files(process, 2**16 if now else resource.RLIM_INFINITY)


def limit_files(process, limit):
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def test_a_process_that_cannot_write_ends_all_before_training(fresh):
    """As where one of them has mounted the run's directory read-only."""
    with Job(fresh, 2, 2, *mesh(2, 2)) as job:
        limit_files(job.processes[1], 0)
        assert job.wait(120) == [1, 1], job.said()
    first, second = (log.read_text() for log in job.logs)
    assert "The run cannot be saved in" in first and "another process could not" in first
    assert f"The run cannot be saved in {fresh}" in second and "writable-1" in second
    assert not (fresh / "checkpoints").exists()  # any setting may still change


@pytest.mark.parametrize("limit", [0, 2**16])
def test_a_process_that_can_no_longer_write_costs_checkpoints_and_hangs_no_other(fresh, limit):
    """Nothing at all, which is found out before a save, or no large file, which Orbax finds out in its midst."""
    last = lambda: Checkpoints(fresh / "checkpoints").latest()  # noqa: E731
    with Job(fresh, 2, 2, *mesh(2, 2), timeout=15) as job:
        job.until(lambda: last() == 2 * BATCH)
        limit_files(job.processes[1], limit)
        assert job.wait(300) == [1, 1], job.said()  # as the last state is not saved
    for log in job.logs:
        assert "Training goes on without it" in log.read_text()
        assert f"could not be written to {fresh / 'checkpoints'}" in log.read_text()[-2000:]
    assert last() >= 2 * BATCH


def test_a_run_goes_on_with_other_processes_on_another_mesh(fresh, calm):
    """Killed at a random step on two, again on four, then ended on one: as if nothing had happened."""
    rng = random.Random(0)
    for processes, devices, sizes in [(2, 2, (2, 2)), (4, 1, (1, 4))]:
        stop = seen(fresh) + rng.randrange(2, 5) * BATCH
        with Job(fresh, processes, devices, *mesh(*sizes)) as job:
            job.until(lambda: seen(fresh) >= stop)  # noqa: B023
            job.processes[-1].kill()
            assert all(job.wait(12 * HEARTBEAT)), job.said()
    assert Checkpoints(fresh / "checkpoints").latest() >= 2 * BATCH
    finished(fresh, 1, 2, *mesh(1, 2))
    assert_alike(fresh, calm)


@pytest.mark.parametrize(
    ("processes", "moment"),
    [
        *((1, "while it saves"), (2, "in a step"), (2, "while it evaluates")),
    ],
)
def test_sigterm_leaves_a_checkpoint_and_the_run_goes_on(fresh, calm, processes, moment):
    evaluating = moment == "while it evaluates"
    with Job(fresh, processes, 2, *mesh(-1, 2), wait=2 * evaluating) as job:
        if evaluating:  # after the untrained network
            job.until(lambda: len(read_lines(fresh / "validations")) == 2)
        else:
            job.until(lambda: seen(fresh) >= 3 * BATCH)
        if moment == "while it saves":
            job.until(lambda: saving(fresh))
        job.processes[-1].send_signal(signal.SIGTERM)  # one is told, and all stop
        assert job.wait(120) == [PREEMPTED] * processes, job.said()
    examples = Checkpoints(fresh / "checkpoints").latest()
    assert f"Saved after {examples} examples; the same command continues" in job.said()
    assert max(losses(fresh)) == examples
    if evaluating:
        assert examples == EXAMPLES // 2
        assert [line["examples"] for line in read_lines(fresh / "evaluations.jsonl")] == [0]
    finished(fresh, 1, 2, *mesh(-1, 2))
    assert_alike(fresh, calm)


@pytest.mark.parametrize(
    ("number", "statuses"),
    [(signal.SIGHUP, [PREEMPTED, PREEMPTED]), (signal.SIGINT, [PREEMPTED, INTERRUPTED])],
)
def test_a_closed_terminal_and_ctrl_c_save_as_sigterm_does(fresh, number, statuses):
    with Job(fresh, 2, 2, *mesh(2, 2)) as job:
        job.until(lambda: seen(fresh) >= 3 * BATCH)
        job.processes[-1].send_signal(number)
        assert job.wait(120) == statuses, job.said()
    examples = Checkpoints(fresh / "checkpoints").latest()
    assert f"Saved after {examples} examples; the same command continues" in job.said()


def test_ctrl_c_twice_ends_at_once_without_a_stack(fresh):
    with Job(fresh, 1, 2, *mesh(1, 2)) as job:
        job.until(lambda: seen(fresh) >= BATCH)
        for _ in range(2):
            job.processes[0].send_signal(signal.SIGINT)
            time.sleep(0.2)
        assert job.wait(30) == [INTERRUPTED], job.said()
    assert job.said().endswith("Interrupted again: ends without saving.\n")


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_takes_the_others_with_it(fresh, killed):
    with Job(fresh, 2, 2, *mesh(2, 2)) as job:
        job.until(lambda: seen(fresh) >= 2 * BATCH)
        job.processes[killed].kill()
        statuses = job.wait(12 * HEARTBEAT)
    assert statuses[killed] == -signal.SIGKILL
    assert statuses[1 - killed] in (ABORTED, -signal.SIGABRT), job.said()
    log = job.logs[1 - killed].read_text()
    assert "Another process was lost" in log or "another task died" in log
    assert "Traceback" not in log and "goes on without" not in log


@pytest.mark.parametrize("missing", [0, 1])
def test_a_process_that_never_arrives_is_waited_for_in_vain_for_so_long(fresh, missing):
    with Job(fresh, 2, 2, *mesh(2, 2), "--arrival-timeout=10") as job:
        job.processes[missing].kill()
        assert job.wait(90)[1 - missing] == ABORTED, job.said()
    first, last = job.logs[1 - missing].read_text().splitlines()
    assert "until all 2 are there, 10 s at most" in first
    assert "Not all processes arrived within --arrival-timeout=10 seconds" in last


def test_damage_to_the_newest_checkpoint_is_met_by_all_processes_alike(fresh, calm):
    """Though only one of them reads the file: all take the checkpoint before, and say so."""
    with Job(fresh, 2, 2, *mesh(2, 2)) as job:
        job.until(lambda: (Checkpoints(fresh / "checkpoints").latest() or 0) >= 4 * BATCH)
        for process in job.processes:
            process.kill()
    newest = Checkpoints(fresh / "checkpoints").latest()
    path = max((fresh / "checkpoints" / f"{newest:012d}").rglob("d/*"), key=os.path.getsize)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    finished(fresh, 2, 2, *mesh(2, 2))
    log = (fresh / "log0").read_text()
    assert f"{newest:012d} is damaged and not used" in log
    assert_alike(fresh, calm)


def test_another_config_is_refused(fresh, calm):
    """By the first process at least: when it ends, JAX aborts another one that has not come so far."""
    (fresh / "checkpoints").symlink_to(calm / "checkpoints")
    with Job(fresh, 2, 2, *mesh(2, 2), "--config.train.batch=16") as job:
        first, second = job.wait(120)
        assert first == 1 and second in (1, -signal.SIGABRT), job.said()
    assert "holds another run: train.batch" in job.said()
