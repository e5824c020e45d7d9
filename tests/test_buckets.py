"""A run in a bucket, of which there are two here: both really are file systems behind `epath`, in memory.

TensorFlow's is reached as a bucket is, where TensorFlow is installed; that of fsspec refuses, as object stores do, to
let a file grow.
"""

import dataclasses
import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from etils import epath
from etils.epath import backend, gpath
from fsspec.implementations.memory import MemoryFileSystem

from ldm_jax import convert, encode, evaluate, report, sample, train
from ldm_jax.evals.journal import Journal
from ldm_jax.files.durable import alone_in, write_atomically
from ldm_jax.files.ledger import append_record, read_records
from ldm_jax.files.lines import append_line
from ldm_jax.runs import run
from ldm_jax.runs import train as training
from ldm_jax.runs.config import CHECKPOINTS, RunConfig, claim
from ldm_jax.runs.sample import write
from ldm_jax.settings.command_line import UsageError, parse
from ldm_jax.training import Tick, TrainingError
from ldm_jax.training.checkpoints import Checkpoints
from ldm_jax.training.hooks import Guard, Metrics, tensorboard
from ldm_jax.training.record import RunRecord
from ldm_jax.types import Batch, Estimate

IMAGES = np.zeros((3, 8, 8, 3), np.uint8)


class Objects(MemoryFileSystem):
    """Files in memory that are written whole."""

    protocol = "gs"
    cachable = False

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs:/"))

    def _open(self, path, mode="rb", **options):
        if mode not in ("rb", "wb"):
            raise NotImplementedError(f"no file of a bucket is opened as {mode!r}")
        return super()._open(path, mode, **options)


class Ram:
    """`tf.io.gfile` with buckets in memory."""

    def __init__(self, gfile):
        self._gfile = gfile

    def GFile(self, path, mode):
        path = in_ram(path)
        if "w" in mode and self._gfile.exists(path):  # else ram:// would add to it
            self._gfile.remove(path)
        return self._gfile.GFile(path, mode)

    def __getattr__(self, name):
        def call(*args, **options):
            return getattr(self._gfile, name)(*map(in_ram, args), **options)

        return call


def in_ram(argument):
    return argument.replace("gs://", "ram://") if isinstance(argument, str) else argument


@pytest.fixture(params=["fsspec", pytest.param("tensorflow", marks=pytest.mark.slow)])
def bucket(request, monkeypatch, tmp_path):
    """A path in an empty bucket."""
    if request.param == "fsspec":
        files = Objects(global_store=False)
        monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
        monkeypatch.setattr(type(backend.fsspec_backend), "fs", lambda *_: files)
    else:
        files = Ram(pytest.importorskip("tensorflow").io.gfile)
        monkeypatch.setattr(type(backend.tf_backend), "gfile", files)
    path = epath.Path(f"gs://{tmp_path.name}/run")
    path.mkdir(parents=True)
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_bucket_of_these_tests_is_none_of_this_machines_directories(bucket, tmp_path):
    (bucket / "a").write_text("here")
    assert str(bucket) == f"gs://{tmp_path.name}/run"
    assert [path.name for path in bucket.iterdir()] == ["a"]
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_a_bucket_cannot_grow():
    with pytest.raises(NotImplementedError, match="'ab'"):
        Objects(global_store=False).open("gs://bucket/a", "ab")


def test_lines_are_added(bucket):
    for number in range(3):
        append_line(bucket / "lines.jsonl", {"number": number})
    assert lines(bucket / "lines.jsonl") == [{"number": number} for number in range(3)]


def test_a_line_copied_unfinished_spoils_no_other(bucket):
    path = bucket / "lines.jsonl"
    path.write_text('{"number": 0}\n{"num')
    append_line(path, {"number": 1})
    assert path.read_text() == '{"number": 0}\n{"num\n{"number": 1}\n'


def test_a_record_comes_back_as_it_was(bucket):
    estimate = Estimate(0.31, 0.30, 0.32, 1000)
    record = RunRecord("", {}, "", "CPU x 1", 0, 1, 1.0, 8, 1.0, {"train": 0.1}, {"clip": estimate})
    append_record(bucket / "record.jsonl", record)
    assert read_records(RunRecord, bucket / "record.jsonl") == [record]


def test_a_file_is_replaced_and_leaves_nothing_beside(bucket):
    for data in (b"old", b"new"):
        write_atomically(bucket / "a.json", data)
    assert [path.name for path in bucket.iterdir()] == ["a.json"]
    assert (bucket / "a.json").read_bytes() == b"new"


def test_a_bucket_has_no_lock(bucket):
    with alone_in(bucket), alone_in(bucket):
        pass


def test_a_run_is_claimed_and_another_one_refused(bucket):
    claim(RunConfig(), bucket)
    claim(RunConfig(seed=1), bucket)  # training has not begun
    (bucket / CHECKPOINTS).mkdir()
    (bucket / CHECKPOINTS / "000000000008").mkdir()
    with pytest.raises(ValueError, match=r"gs://\S+/run holds another run: seed: 1 -> 2"):
        claim(RunConfig(seed=2), bucket)
    flags = parse([f"--workdir={bucket}"], RunConfig)
    assert (flags.workdir, flags.config.seed) == (bucket, 1)


def test_metrics_go_on_from_where_a_run_continues(bucket):
    for since, counts in ((0, (8, 16, 24)), (16, (24, 32))):
        metrics = Metrics(bucket, 8, Board(), since)
        for count in counts:
            metrics.write(count, {"loss": 1.0})
    assert [row["examples"] for row in lines(bucket / "metrics.jsonl")] == [8, 16, 24, 32]
    assert [path.name for path in bucket.iterdir()] == ["metrics.jsonl"]


class Board:
    """Takes what a clu writer takes."""

    def write_scalars(self, step, scalars):
        pass


def test_a_batch_that_stops_a_run_is_kept(bucket):
    batch = Batch(np.ones((8, 2, 2, 4)), np.ones((8, 3), int), np.ones(8), np.arange(8))
    tick = Tick(1, 0, 8, True, None, {"loss": jnp.float32("nan")}, batch)
    with pytest.raises(TrainingError, match=f"the batch is saved as {bucket}/bad_batch_8.npz"):
        Guard(bucket, lambda: None)(tick)
    with np.load(io.BytesIO((bucket / "bad_batch_8.npz").read_bytes())) as kept:
        np.testing.assert_array_equal(kept["index"], batch.index)


def test_an_evaluation_is_journalled_and_reported(bucket):
    scores = {"clip_score": Estimate(0.5, 0.4, 0.6, 8)}
    Journal(bucket, shown=2).add(32, "ema", IMAGES, scores, {"0.5": 0.5})
    report.main(parse([f"--workdir={bucket}"], add_flags=report.add_flags))
    (row,) = lines(bucket / "evaluations.jsonl")
    assert (bucket / row["samples"]).read_bytes().startswith(b"\x89PNG")
    assert "data:image/png" in (bucket / "report.html").read_text()


def test_samples_of_an_earlier_call_go_and_nobody_elses(bucket):
    (bucket / "00007-00.png").write_bytes(b"")
    write(bucket, IMAGES[:1], ["x"], seeds=1)
    assert (bucket / "00007-00.png").exists()
    (bucket / "00007-00.png").unlink()
    (bucket / "other.png").write_bytes(b"")
    for prompts in (["a", "b"], ["c"]):
        write(bucket, IMAGES[: len(prompts)], prompts, seeds=1)
    names = sorted(path.name for path in bucket.iterdir())
    assert names == ["00000-00.png", "grid.png", "images.json", "other.png"]


@pytest.mark.parametrize(("command", "where"), [(encode, "workdir"), (train, "records")])
def test_latents_in_a_bucket_are_refused_with_what_helps(bucket, tmp_path, command, where):
    words = [f"--config.data.records={bucket}/latents"] if where == "records" else []
    workdir = tmp_path / "run" if where == "records" else bucket
    with pytest.raises(ValueError, match=r"^latents cannot be in gs://\S+/latents, .*mounted"):
        tiny.run(command, workdir, tiny.given(tmp_path), *words)


def test_a_file_system_that_is_no_bucket_is_refused():
    with pytest.raises(UsageError, match=r"'ftp://host/run' is neither on a disk nor gs://"):
        parse(["--workdir=ftp://host/run"])


def test_a_run_that_becomes_a_pipeline_may_be_in_a_bucket(bucket, tmp_path):
    claim(tiny.TINY, bucket)
    words = [f"--from={bucket}", f"--to={tmp_path / 'pipeline'}"]
    with pytest.raises(FileNotFoundError, match=r"no sound checkpoint in gs://\S+/run/checkpoints"):
        convert.main(parse(words, add_flags=convert.add_flags, in_workdir=False))


def test_a_pipeline_is_neither_read_from_a_bucket_nor_written_to_one(bucket, tmp_path):
    for source, to in ((tmp_path, bucket / "pipeline"), (bucket, tmp_path / "pipeline")):
        words = [f"--from={source}", f"--to={to}"]
        with pytest.raises(ValueError, match="a disk"):
            convert.main(parse(words, add_flags=convert.add_flags, in_workdir=False))


@pytest.mark.slow
@pytest.mark.parametrize("bucket", ["tensorflow"], indirect=True)
def test_a_run_trains_continues_and_is_evaluated_sampled_and_reported(
    bucket, tmp_path, monkeypatch
):
    """Arrays and TensorBoard's files, which Orbax and TensorFlow write by other ways than `epath`, lie elsewhere."""

    def checkpoints(directory, **options):
        epath.Path(directory).mkdir(exist_ok=True)
        return Checkpoints(tmp_path / CHECKPOINTS, **options)

    monkeypatch.setattr(run, "Checkpoints", checkpoints)
    monkeypatch.setattr(training, "tensorboard", lambda _: tensorboard(tmp_path / "board"))
    short = dataclasses.replace(tiny.TINY.train, examples=32)
    config = dataclasses.replace(tiny.TINY, train=short)
    latents = f"--config.data.records={tmp_path / 'latents'}"
    tiny.run(encode, bucket, tiny.given(tmp_path, config), latents)
    tiny.run(train, bucket)
    tiny.run(train, bucket, "--config.train.examples=64")
    assert [row["examples"] for row in lines(bucket / "metrics.jsonl") if "loss" in row] == [
        *(16, 32, 48, 64)
    ]
    assert [row["examples"] for row in lines(bucket / "evaluations.jsonl")] == [0, 32, 64]
    assert [row["examples"] for row in lines(bucket / "record.jsonl")] == [32, 64]
    assert [row["from"] for row in lines(bucket / "goodput.jsonl")] == [0, 32]
    tiny.run(evaluate, bucket)
    assert lines(bucket / "scores.jsonl")[0]["model"]["examples"] == 64
    tiny.run(sample, bucket, "--prompt=a red circle", add_flags=sample.add_flags)
    assert {path.name for path in (bucket / "images").iterdir()} >= {"00000-00.png", "grid.png"}
    report.main(parse([f"--workdir={bucket}"], add_flags=report.add_flags))
    assert "faithfulness" in (bucket / "report.html").read_text()
