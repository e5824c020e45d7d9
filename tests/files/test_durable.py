"""Files appear whole or not at all, in a directory of one writer and one set of settings."""

import errno
import os
import resource
import subprocess
import sys

import numpy as np
import pytest

from ldm_jax.evals.image_grids import save_grid
from ldm_jax.files.durable import alone_in, claim, explained_disk_errors, write_atomically
from ldm_jax.files.lines import append_line


@pytest.mark.parametrize("name", ["prompts.json", "metrics.jsonl", "samples/a.png"])
def test_a_full_disk_is_met_with_the_path_of_the_file(tmp_path, name):
    """In writing, where the system's error has no path; a limit of the size of files is met as a full disk is."""
    path = tmp_path / name
    noise = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    writers = {
        ".json": lambda: write_atomically(path, bytes(2000)),
        ".jsonl": lambda: append_line(path, "x" * 2000),
        ".png": lambda: save_grid(path, noise, 1),
    }
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError) as caught:
            writers[path.suffix]()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(path) in str(caught.value)


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomically(path, b"old")

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    monkeypatch.undo()
    write_atomically(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert path.read_bytes() == b"new"


def test_a_directory_keeps_its_first_settings(tmp_path):
    settings = {"size": 64, "source": {"count": 3, "split": "train"}}
    claim(tmp_path, settings)
    claim(tmp_path, settings)
    other = {"size": 64, "source": {"count": 4, "split": "train", "seed": 1}}
    with pytest.raises(ValueError) as error:
        claim(tmp_path, other)
    message = str(error.value)
    assert "source.count was 3, now 4" in message
    assert "source.seed was None, now 1" in message
    assert "size" not in message
    assert "split" not in message


def test_a_tuple_is_the_list_that_json_makes_of_it(tmp_path):
    for _ in range(2):
        claim(tmp_path, {"names": ("a", "b")})


def test_a_second_writer_is_refused_until_the_first_has_gone(tmp_path):
    code = f"""if True:
        import pathlib, sys
        from ldm_jax.files.durable import alone_in
        with alone_in(pathlib.Path({str(tmp_path)!r})):
            print("inside", flush=True)
            sys.stdin.read()
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) as other:
        assert other.stdout.readline() == "inside\n"
        with pytest.raises(ValueError, match="another process is writing to"), alone_in(tmp_path):
            pass
        other.kill()
        other.wait()
        with alone_in(tmp_path):
            pass


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("write() failed: No space left on device; writing x; at byte 0"),
    ],
)
def test_a_full_disk_is_one_sentence(tmp_path, error):
    with (
        pytest.raises(OSError, match=f"^no space left on the disk of {tmp_path}: [^\n]*$"),
        explained_disk_errors(tmp_path),
    ):
        raise error


def test_other_errors_pass_unchanged(tmp_path):
    error = RuntimeError("something else")
    with pytest.raises(RuntimeError) as raised, explained_disk_errors(tmp_path):
        raise error
    assert raised.value is error
