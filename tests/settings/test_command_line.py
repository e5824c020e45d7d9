"""The command line, word for word: a small program of the test's own, in this process and as a real one."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ldm_jax.settings import command_line
from ldm_jax.settings.schema import CONFIG_FILE, to_json

PROGRAM = """
import argparse, dataclasses
from ldm_jax.settings.fields import choice, one_of, setting
from ldm_jax.settings.schema import to_config_dict
from ldm_jax.settings.command_line import UsageError, run_command

@dataclasses.dataclass(frozen=True)
class Euler:
    churn: float = 0.0  # noise added back

@dataclasses.dataclass(frozen=True)
class Multistep:
    order: int = 2  # of the solver

@dataclasses.dataclass(frozen=True)
class Train:
    batch: int = 256  # examples a step
    rate: float = 1e-3  # learning rate
    clip: float | None = None  # norm of the gradients
    widths: tuple[int, ...] = (64, 128)  # channels of each level
    words: tuple[str, ...] = ("a",)  # prompts
    remat: bool = False  # compute activations twice
    steps: int = setting(9, within="[1, inf)")  # of the optimiser

@dataclasses.dataclass(frozen=True)
class Run:
    sampler: object = choice({"euler": Euler, "multistep": Multistep}, Euler())  # how to sample
    prediction: str = one_of(("eps", "v"), "v")  # what is predicted
    train: Train = Train()

def main(flags):
    if flags.fail == "value":
        raise ValueError("latents have\\n   4 channels")
    if flags.fail == "file":
        open(flags.workdir / "absent")
    if flags.fail == "usage":
        raise UsageError("give a prompt")
    if flags.fail == "defect":
        {}["absent"]
    print(flags.config)

def add_flags(parser):
    parser.add_argument("--fail", metavar="KIND", help="how to fail")

if __name__ == "__main__":
    run_command(main, Run, description="A program of the tests.", add_flags=add_flags)
"""

CONFIG = """
from program import Run, to_config_dict

def get_config(batch="4"):
    config = to_config_dict(Run())
    config.train.batch = int(batch)
    return config
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    """The program's module, with its files in the current directory."""
    Path(tmp_path, "program.py").write_text(PROGRAM)
    Path(tmp_path, "config.py").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("program", None)
    yield __import__("program")
    sys.modules.pop("program", None)


def parse(program, *argv):
    words = ["--config=config.py", "--workdir=run", *argv]
    return command_line.parse(words, program.Run, add_flags=program.add_flags).config


def refusal(program, *argv):
    with pytest.raises(command_line.UsageError) as caught:
        command_line.parse(argv, program.Run, add_flags=program.add_flags)
    return str(caught.value)


@pytest.mark.parametrize(
    ("word", "path", "value"),
    [
        ("--config.train.batch=8", "batch", 8),
        ("--config.train.rate=1e-4", "rate", 1e-4),
        ("--config.train.rate=1", "rate", 1.0),
        ("--config.train.clip=2", "clip", 2.0),
        ("--config.train.clip=none", "clip", None),
        ("--config.train.widths=(1, 2)", "widths", (1, 2)),
        ("--config.train.widths=1,2,3", "widths", (1, 2, 3)),
        ("--config.train.widths=7", "widths", (7,)),
        ("--config.train.words=a cat,a dog", "words", ("a cat", "a dog")),
        ("--config.train.words=('a, b',)", "words", ("a, b",)),
        ("--config.train.remat=true", "remat", True),
    ],
)
def test_override_has_the_type_of_its_setting(program, word, path, value):
    found = getattr(parse(program, word).train, path)
    assert found == value
    assert type(found) is type(value)


def test_override_may_stand_apart_from_its_value(program):
    assert parse(program, "--config.train.batch", "8").train.batch == 8


def test_choice_takes_a_name_and_the_settings_of_its_row(program):
    words = ["--config.sampler.name=multistep", "--config.sampler.multistep.order=3"]
    assert parse(program, *words).sampler == program.Multistep(order=3)
    assert parse(program, *reversed(words)).sampler == program.Multistep(order=3)


def test_argument_after_the_colon_reaches_get_config(program):
    config = command_line.parse(["--config=config.py:9", "--workdir=run"], program.Run).config
    assert config.train.batch == 9


def test_without_config_the_run_goes_by_its_own(program, tmp_path):
    run = dataclasses.replace(program.Run(), prediction="eps")
    Path(tmp_path, CONFIG_FILE).write_text(to_json(run))
    words = [f"--workdir={tmp_path}", "--config.train.batch=8"]
    config = command_line.parse(words, program.Run).config
    assert config == dataclasses.replace(run, train=program.Train(batch=8))


OVERRIDES = {
    "--config.sampler.multistep.order=3": "--config.sampler.multistep.order counts only where --config.sampler.name is "
    "'multistep', and it is 'euler'; add --config.sampler.name=multistep",
    "--config.train.steps=0": "--config.train.steps is 0; it is at least 1",
    "--config.train.rate=nan": "--config.train.rate is nan; it is finite",
    "--config.train.rate=1e400": "--config.train.rate is '1e400', which is inf; it is finite, and no larger than "
    "float32 holds (3.4e+38)",
    "--config.sampler.ordr=3": "--config.sampler has no 'ordr'; it has name, euler, multistep; there is "
    "--config.sampler.multistep.order",
    "--config.raet=3": "--config has no 'raet'; it has sampler, prediction, train; there is --config.train.rate",
    "--rate=3": "there is no --rate=3 here; --help lists what can be given; there is --config.train.rate",
    "--config.train.bach=8": "--config.train has no 'bach' (did you mean 'batch'?); it has batch, rate, clip, "
    "widths, words, remat, steps",
    "--config.batch=8": "--config has no 'batch'; it has sampler, prediction, train; there is "
    "--config.train.batch",
    "--config.train=8": "--config.train is a section; give one of its settings: batch, rate, clip, widths, "
    "words, remat, steps",
    "--config.train.rate.x=8": "--config.train.rate is one setting; there is no 'x' in it",
    "--config.train.batch=1.5": "--config.train.batch is '1.5'; it takes int",
    "--config.train.batch=none": "--config.train.batch is 'none'; it takes int",
    "--config.train.clip=x": "--config.train.clip is 'x'; it takes float or none",
    "--config.train.widths=1,x": "--config.train.widths is '1,x'; it takes tuple[int, ...]",
    "--config.train.remat=3": "--config.train.remat is '3'; it takes bool",
    "--config.sampler.name=eulr": "--config.sampler.name is 'eulr' (did you mean 'euler'?); allowed are euler, "
    "multistep",
    "--config.prediction=x0": "--config.prediction is 'x0'; allowed are eps, v",
    "--config.train.batch": "--config.train.batch needs a value: --config.train.batch=VALUE",
    "--promt=x": "there is no --promt=x here; --help lists what can be given",
}


@pytest.mark.parametrize("word", OVERRIDES)
def test_refused_word_is_answered_by_one_sentence(program, word):
    sentence = refusal(program, "--config=config.py", "--workdir=run", word)
    assert sentence == OVERRIDES[word]


FILES = {
    "config.train.bach = 3": "there is no key 'bach' (did you mean 'batch'?)",
    "config.nope.x = 3": "there is no key 'nope'",
    "int('x')": "invalid literal for int() with base 10: 'x'",
    "import absent_module": "No module named 'absent_module'",
}


@pytest.mark.parametrize("line", FILES)
def test_error_in_a_config_file_is_shown_with_its_line(program, line):
    Path("bad.py").write_text(CONFIG.replace("config.train.batch = int(batch)", line))
    sentence = refusal(program, "--config=bad.py", "--workdir=run")
    assert sentence == f"bad.py, line 6, {line}: {FILES[line]}"


def test_config_files_that_cannot_be_used(program):
    Path("syntax.py").write_text("x = = 3")
    Path("empty.py").write_text("")
    Path("other.py").write_text("def get_config():\n    return {}")
    sentences = {
        name: refusal(program, f"--config={name}", "--workdir=run")
        for name in ("absent.py", "syntax.py", "empty.py", "other.py", "other.py:x")
    }
    assert sentences == {
        "absent.py": "--config=absent.py: there is no file absent.py",
        "syntax.py": "syntax.py, line 1: invalid syntax",
        "empty.py": "--config=empty.py: empty.py defines no get_config()",
        "other.py": "--config=other.py: get_config() returned dict, not a ConfigDict",
        "other.py:x": "--config=other.py:x: get_config() of other.py takes no argument",
    }


def test_a_file_may_leave_settings_to_their_defaults(program, tmp_path, capsys):
    path = tmp_path / "partial.py"
    path.write_text(
        "from ml_collections import ConfigDict\n\n\n"
        "def get_config():\n    return ConfigDict({'train': {'rate': 0.5}})\n"
    )
    words = [
        f"--config={path}",
        f"--workdir={tmp_path}",
        "--config.train.batch=8",
        "--config.train.clip=2.0",
    ]
    config = command_line.parse(words, program.Run).config
    assert config == program.Run(train=program.Train(rate=0.5, batch=8, clip=2.0))
    with pytest.raises(SystemExit):
        command_line.parse(["--config", str(path), "--help"], program.Run)
    assert "--config.train.rate=0.5" in capsys.readouterr().out


def test_home_is_the_home_directory_in_flags_that_are_paths(program, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = command_line.parse(["--config=~/config.py:9", "--workdir=~/run"], program.Run)
    assert (flags.config.train.batch, str(flags.workdir)) == (9, f"{tmp_path}/run")
    assert "no home directory here" in refusal(
        program, "--config=config.py", "--workdir=~nobody0/run"
    )


def test_missing_flags_are_named(program):
    assert "--workdir" in refusal(program, "--config=config.py")
    expected = "--config is missing, and run has no config.json to go by"
    assert refusal(program, "--workdir=run") == expected


def test_stored_config_that_does_not_fit_is_named(program):
    Path(CONFIG_FILE).write_text('{"train": {"batches": 3}}')
    assert refusal(program, "--workdir=.").startswith("config.json: config.train has no 'batches'")


def test_command_without_a_config_refuses_settings():
    with pytest.raises(command_line.UsageError, match=r"there is no --config\.a here"):
        command_line.parse(["--workdir=run", "--config.a=1"])


def run(*argv):
    root = Path(command_line.__file__).parents[2]
    command = [sys.executable, "program.py", "--workdir=.", *argv]
    environment = {"PYTHONPATH": str(root), "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_process_succeeds_silently_on_standard_error(program):
    done = run("--config=config.py")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{parse(program)}\n"


@pytest.mark.parametrize(
    ("word", "code", "sentence"),
    [
        ("--config.prediction=x0", 2, "--config.prediction is 'x0'; allowed are eps, v"),
        ("--fail=usage", 2, "give a prompt"),
        ("--fail=value", 1, "latents have 4 channels"),
        ("--fail=file", 1, "No such file or directory: absent"),
    ],
)
def test_process_says_a_users_error_in_one_line(program, word, code, sentence):
    done = run("--config=config.py", word)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr == f"program.py: {sentence}\n"


@pytest.mark.parametrize("words", [["--fail=defect"], ["--fail=value", "--traceback"]])
def test_process_shows_the_stack_of_a_defect_or_on_request(program, words):
    done = run("--config=config.py", *words)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")


def test_help_lists_flags_and_every_setting_with_value_help_and_type(program):
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    words = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "A program of the tests." in words
    assert "--fail KIND how to fail" in words
    assert "--config.sampler.name=euler how to sample [euler | multistep]" in words
    assert "--config.sampler.multistep.order=2 of the solver [int]" in words
    assert "--config.train.clip=None norm of the gradients [float or none]" in words
    listed = [word for word in words if word.startswith("--config.") and "=" in word]
    assert "--config.train.steps=9 of the optimiser [int, at least 1]" in words
    assert len(listed) == 11


def test_help_shows_the_values_of_a_given_file(program):
    assert "--config.train.batch=4 " in run("--help", "--config=config.py").stdout


@pytest.mark.slow
def test_what_tensorflow_says_of_a_bucket_is_one_line(monkeypatch, capsys):
    tensorflow = pytest.importorskip("tensorflow")
    monkeypatch.setattr(sys, "argv", ["program", "--workdir=run"])
    with pytest.raises(SystemExit, match="1"):
        command_line.run_command(
            lambda _: tensorflow.io.gfile.listdir("ram://absent"), description=""
        )
    assert re.search(r": Could not find directory ram://absent\n$", capsys.readouterr().err)


INTERRUPTED = """
import atexit, os, signal
import ldm_jax
from ldm_jax.settings.command_line import run_command

atexit.register(os.kill, os.getpid(), signal.SIGINT)  # after the command, when Python tidies up

def main(flags):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        print("tidied")

signal.signal(signal.SIGINT, ldm_jax.end_interrupted)  # as for `python -m ldm_jax.COMMAND`
run_command(main, description="", in_workdir=False)
"""


def test_ctrl_c_lets_a_command_tidy_up_and_shows_no_stack_even_after_it():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "tidied\n")
    assert done.stderr.splitlines() == ["-c: interrupted", "interrupted"]
