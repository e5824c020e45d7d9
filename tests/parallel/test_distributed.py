import argparse

import jax
import pytest

from ldm_jax.parallel import distributed

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@pytest.fixture
def started(monkeypatch):
    """What `jax.distributed` is started with; real processes are in test_processes.py."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
    monkeypatch.setattr(distributed, "_prepare_cpus", lambda: None)
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    return calls


def join(*words):
    parser = argparse.ArgumentParser()
    distributed.add_flags(parser)
    with distributed.joined(parser.parse_args(words)):
        pass


def test_alone_nothing_is_started(started):
    join()
    assert started == []


def test_flags_and_the_environment_say_the_same(started, monkeypatch):
    join("--coordinator=host:1234", "--num-processes=4", "--process-id=3", "--arrival-timeout=7")
    for name, value in zip(NAMES, ("host:1234", "4", "3"), strict=True):
        monkeypatch.setenv(name, value)
    join("--arrival-timeout=7")
    assert started[0] == started[1]
    assert started[0][0] == ("host:1234", 4, 3)
    assert started[0][1]["initialization_timeout"] > 7  # ends before JAX does, with a sentence
    assert started[0][1]["shutdown_timeout_seconds"] == 7


def test_jax_finds_a_slice_by_itself(started):
    join("--distributed")
    assert started[0][0] == ()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--num-processes=2",), "go together"),
        (("--coordinator=h:1", "--num-processes=2", "--process-id=2"), "process 2 of 2"),
        (("--coordinator=h", "--num-processes=2", "--process-id=0"), "is HOST:PORT; got 'h'"),
    ],
)
def test_what_cannot_be_is_said(started, words, sentence):
    with pytest.raises(ValueError, match=sentence):
        join(*words)
    assert started == []


def test_numbers_in_the_environment_are_numbers(started, monkeypatch):
    for name, value in zip(NAMES, ("host:1234", "four", "3"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="are numbers; got"):
        join()


def test_without_a_slice_it_says_what_to_give(started, monkeypatch):
    def nothing(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", nothing)
    with pytest.raises(ValueError, match=r"finds no TPU slice .* give --coordinator"):
        join("--distributed")


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (
            ValueError("UNKNOWN: Gloo AllGather failed: [pair.cc:547] Connection closed by peer"),
            True,
        ),
        (RuntimeError("UNKNOWN: Gloo context initialization failed: DEADLINE_EXCEEDED"), True),
        (FileNotFoundError(2, "No such file or directory", "/data/Gloomy failed"), False),
        (RuntimeError("RESOURCE_EXHAUSTED: out of memory"), False),
    ],
)
def test_a_lost_process_ends_the_others_with_a_status_that_is_started_again(
    started, monkeypatch, caplog, error, lost
):
    left = []
    monkeypatch.setattr(distributed, "_leave", left.append)
    monkeypatch.setattr(distributed.atexit, "register", lambda _: None)
    parser = argparse.ArgumentParser()
    distributed.add_flags(parser)
    with pytest.raises(type(error)), distributed.joined(parser.parse_args(["--distributed"])):
        raise error
    assert left == [distributed.ABORTED] * lost
    assert caplog.text.count("Another process was lost") == lost
