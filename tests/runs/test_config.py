"""The real config of a run, whatever its fields are."""

import dataclasses
import importlib.util
import json
import math
from pathlib import Path

import pytest

from ldm_jax.diffusion import DPMpp
from ldm_jax.runs.config import (
    CHECKPOINTS,
    EMBEDDED,
    DataConfig,
    EvalConfig,
    NetworkDirectories,
    RunConfig,
    SamplingConfig,
    TrainConfig,
    absolute_location,
    claim,
)
from ldm_jax.settings.command_line import load_config, parse
from ldm_jax.settings.ranges import FLOAT32, intervals
from ldm_jax.settings.schema import (
    config_difference,
    decisive,
    from_config_dict,
    from_json,
    settings,
    to_config_dict,
    to_json,
    values,
    with_absolute_paths,
)
from ldm_jax.training.optimizer import OptimizerConfig

CONFIGS = sorted(
    path
    for path in (Path(__file__).parents[2] / "configs").glob("*.py")
    if path.stem != "released"  # which takes a pipeline's directory: tests/test_pipelines.py
)


def test_run_config_survives_config_dict_and_json():
    assert from_config_dict(to_config_dict(RunConfig()), RunConfig) == RunConfig()
    assert from_json(to_json(RunConfig()), RunConfig) == RunConfig()


def test_every_setting_has_a_line_of_help():
    assert [setting.path for setting in settings(RunConfig) if not setting.help] == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_file_makes_a_run_config_and_says_what_to_expect(path):
    from_config_dict(load_config(str(path)), RunConfig)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.__doc__


@pytest.mark.parametrize(
    ("section", "name", "value", "allowed"),
    [
        (TrainConfig, "log_every", 0, "at least 1"),
        (TrainConfig, "accumulate", 0, "at least 1"),
        (TrainConfig, "profile", (100,), "its number of values is 1; it is 0 or 2"),
        (TrainConfig, "profile", (9, 9), "two counts of examples"),
        (EvalConfig, "every", 0, "at least 1"),
        (SamplingConfig, "batch", 0, "at least 1"),
        (DataConfig, "items_per_shard", -1, "at least 1"),
    ],
)
def test_a_number_that_cannot_be_is_refused_by_name(section, name, value, allowed):
    with pytest.raises(ValueError, match=f"{name} is .*{allowed}"):
        section(**{name: value})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"guidance_interval": (0.2, 1.2)}, r"interval\[1\] is 1.2; it is from 0 to 1"),
        ({"guidance_interval": (0.5, 0.2)}, "0 <= low <= high <= 1, got 0.5 to 0.2"),
        ({"guidance_rescale": -0.5}, "rescale is -0.5; it is from 0 to 1"),
    ],
)
def test_impossible_guidance_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        SamplingConfig(**changes)


def test_an_interval_of_guidance_is_given_on_the_command_line():
    words = [
        f"--config={CONFIGS[0]}",
        "--workdir=here",
        "--config.sampling.guidance_interval=0.2,0.8",
    ]
    words += ["--config.sampling.sampler.name=dpmpp", "--config.sampling.sampler.dpmpp.order=1"]
    config = parse([*words, "--config.sampling.negative=a blur"], RunConfig).config
    assert config.sampling.guidance_interval == (0.2, 0.8)
    assert config.sampling.sampler == DPMpp(order=1)
    assert config.sampling.negative == "a blur"


def test_a_run_may_continue_with_a_library_that_has_more_settings(tmp_path):
    config = RunConfig()
    claim(config, tmp_path)
    (tmp_path / CHECKPOINTS).mkdir()
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["data"]["max_caption"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    claim(config, tmp_path)
    with pytest.raises(ValueError, match=r"holds another run: data.max_caption: 4000 -> 5"):
        claim(dataclasses.replace(config, data=DataConfig(max_caption=5)), tmp_path)


def test_a_stored_config_of_before_the_section_of_networks_is_read():
    content = json.loads(to_json(RunConfig()))
    content["eval"] |= {"clip": "/clips", "inception": None}
    del content["eval"]["networks"]
    read = from_json(json.dumps(content), RunConfig)
    assert read.eval.networks.clip == "/clips"
    assert dataclasses.replace(read, eval=RunConfig().eval) == RunConfig()


LEAVES = {setting.path: setting for setting in settings(RunConfig)}
REGISTRIES = {path.removesuffix(".name") for path in LEAVES if path.endswith(".name")}
NUMBERS = [path for path, setting in LEAVES.items() if "range" in setting.metadata]


def having(path, **values):
    """A config's dict with the section of a setting in it, its row chosen, and these values there."""
    tree = section = {}
    keys = path.split(".")[:-1]
    for depth, key in enumerate(keys):
        if ".".join(keys[:depth]) in REGISTRIES:
            section["name"] = key
        section = section.setdefault(key, {})
    section |= values
    return tree


def answer(path, value):
    """What is said to one setting's value; nothing where it is taken."""
    try:
        from_config_dict(having(path, **{path.rpartition(".")[2]: value}), RunConfig)
    except ValueError as error:
        return str(error)
    return ""


def as_value(setting, number):
    """The number, or so many of it as a tuple has to have."""
    kind = str(setting.kind)
    pair = "float, float" in kind or setting.metadata.get("count") == "0 or 2"
    return [number] * (1 + pair) if kind.startswith("tuple") else number


def numbers_about(setting):
    """The ends of a setting's range, and those just beyond them."""
    whole = "int" in str(setting.kind) or setting.kind is int
    kind = int if whole else float
    for part in intervals(setting.metadata["range"]):
        for end, out in ((part.low, -math.inf), (part.high, math.inf)):
            end = kind(end) if math.isfinite(end) else end
            if math.isfinite(end):
                beyond = end + int(math.copysign(1, out)) if whole else math.nextafter(end, out)
                yield from (end, beyond)
            elif not whole:
                yield from (math.copysign(FLOAT32, out), math.copysign(1e39, out), end)
    if not whole:
        yield math.nan


def test_every_number_of_the_config_states_its_range_and_every_setting_what_it_decides():
    bounded = ("int", "float")
    of_numbers = [
        path for path, s in LEAVES.items() if any(kind in str(s.kind) for kind in bounded)
    ]
    assert [path for path in of_numbers if path not in NUMBERS] == []
    assert [
        field.name for field in dataclasses.fields(RunConfig) if "decides" not in field.metadata
    ] == []
    assert {kind for setting in LEAVES.values() for kind in setting.decides} == {
        "parameters",
        "images",
        "scores",
    }


@pytest.mark.parametrize("path", NUMBERS)
def test_ends_of_a_range_are_taken_and_what_is_beyond_is_refused_in_one_sentence(path):
    setting = LEAVES[path]
    for number in numbers_about(setting):
        said = answer(path, as_value(setting, number))
        if any(number in part for part in intervals(setting.metadata["range"])):
            assert " is from " not in said and not said.startswith(f"config.{path}"), said
            continue
        assert said.startswith(f"config.{path}") and "; it is " in said and "\n" not in said, said
        if abs(number) == 1e39:  # which a class of the mathematics takes: it may compute in float64
            continue
        section = from_config_dict(having(path), RunConfig)
        for key in path.split(".")[:-1]:
            section = getattr(section, key, section)  # the row of a registry is the section itself
        value = as_value(setting, number)
        with pytest.raises(ValueError):  # as in Python
            type(section)(
                **{path.rpartition(".")[2]: tuple(value) if isinstance(value, list) else value}
            )


@pytest.mark.parametrize(
    "path", [path for path, s in LEAVES.items() if s.names and not path.endswith("name")]
)
def test_a_name_that_there_is_not_is_refused_by_the_class_too(path):
    value = "nonsense" if LEAVES[path].kind is str else ["nonsense"]
    assert answer(path, value).startswith(f"config.{path}")
    assert "allowed are" in answer(path, value)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (
            "eval.levels",
            [],
            "config.eval.levels is (); its number of values is 0; it is at least 1",
        ),
        ("backbone.unet.channels", [], "config.backbone.unet.channels is (); its number of values"),
        (
            "backbone.unet.channels",
            [-16],
            "config.backbone.unet.channels[0] is -16; it is at least 1",
        ),
        (
            "backbone.unet.remat",
            "nonsense",
            "config.backbone.unet.remat is 'nonsense' (did you mean 'none'?); allowed are",
        ),
        ("optimizer.learning_rate", 10**400, "config.optimizer.learning_rate is 1000"),
        (
            "train.examples",
            2**32 - 1,
            "config.train: examples is 4294967295, which batches of 64 end",
        ),
    ],
)
def test_what_cannot_be_is_answered_by_its_path(path, value, said):
    assert answer(path, value).startswith(said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("5", "config is 5; it is a section of settings"),
        ("null", "config is None; it is a section"),
        ('{"eval": 5}', "config.eval is 5; it is a section"),
        ('{"eval": {"networks": []}}', r"config.eval.networks is \[\]; it is a section"),
        ('{"backbone": {"name": "unet", "unet": 5}}', "config.backbone.unet is 5; it is a section"),
        ('{"backbone": {"unet": {}}}', "config.backbone.name is None"),
        ('{"train": {"ema": NaN}}', "config.train.ema is nan; it is at least 0"),
        ('{"train": {"ema": 1e999}}', "config.train.ema is inf; it is at least 0, and no larger"),
        ('{"seed": 1' + "0" * 5000 + "}", "digits"),
    ],
)
def test_json_of_another_kind_is_refused_in_a_sentence(text, said):
    with pytest.raises(ValueError, match=said):
        from_json(text, RunConfig)


def begun(workdir, config, trained=64):
    """A run's directory with a checkpoint."""
    claim(config, workdir)
    (workdir / CHECKPOINTS / f"{trained:012d}").mkdir(parents=True)
    return (workdir / "config.json").read_bytes()


def of(**sections):
    """A config by sections of changes."""
    fields = {
        name: dataclasses.replace(getattr(RunConfig(), name), **changes)
        if isinstance(changes, dict)
        else changes
        for name, changes in sections.items()
    }
    return RunConfig(**fields)


FREE = [
    {"train": {"examples": 2_000_000}},
    {"train": {"explosion": 30.0, "log_every": 1, "keep": 9, "profile": (0, 64)}},
    {"backbone": {"remat": "full", "dtype": "bfloat16"}},
    {
        "eval": {
            "metrics": ("kid",),
            "reference": "scenes:full",
            "networks": NetworkDirectories("/clip"),
            "every": 7,
        }
    },
    {"data": {"records": "/latents", "workers": 9, "max_skipped": 1.0}},
    {"sampling": {"batch": 1}},
    {"mesh": {"fsdp": 8}},
]
FIXED = [
    {"seed": 1},
    {"train": {"batch": 32}},
    {"backbone": {"mid_depth": 0}},
    {"eval": {"prompts": "captions:8"}},
    {"data": {"size": 128}},
    {"sampling": {"guidance": 1.0}},
    {"optimizer": {"b1": 0.5}},
]


@pytest.mark.parametrize("changes", FREE, ids=str)
def test_a_run_that_has_begun_may_change_what_decides_neither_parameters_nor_images(
    tmp_path, changes
):
    begun(tmp_path, RunConfig())
    claim(of(**changes), tmp_path)
    assert from_json((tmp_path / "config.json").read_text(), RunConfig) == of(**changes)
    decides = decisive(RunConfig(), "parameters", "images")
    now = decisive(of(**changes), "parameters", "images")
    assert {path for path in now if now[path] != decides[path]} <= {"train.examples"}


@pytest.mark.parametrize("changes", FIXED, ids=str)
def test_what_decides_parameters_or_images_may_not_change(tmp_path, changes):
    text = begun(tmp_path, RunConfig())
    (difference,) = config_difference(text.decode(), to_json(of(**changes)))
    with pytest.raises(
        ValueError, match=rf"holds another run: {difference.path}: .*train\.keep.* may change"
    ):
        claim(of(**changes), tmp_path)
    assert (tmp_path / "config.json").read_bytes() == text


COSINE = {"optimizer": OptimizerConfig(schedule="cosine")}


@pytest.mark.parametrize(
    ("config", "examples", "said"),
    [
        ({}, 32, "train.examples is 32, and the run in .* has trained 64 examples"),
        ({}, 64, ""),
        ({}, 2_000_000, ""),
        (COSINE, 32, "has trained 64 examples"),
        (
            COSINE,
            2_000_000,
            "was begun with 1000000: its rate ends with the run .*'cosine'.* would jump",
        ),
        (COSINE, 500_000, "would jump"),
        (COSINE, 1_000_000, ""),
    ],
)
def test_a_run_may_be_made_longer_where_its_rate_does_not_jump(tmp_path, config, examples, said):
    text = begun(tmp_path, of(**config))
    new = of(**config, train={"examples": examples})
    if said:
        with pytest.raises(ValueError, match=said):
            claim(new, tmp_path)
        assert (tmp_path / "config.json").read_bytes() == text
    else:
        claim(new, tmp_path)


def test_a_finished_run_whose_last_batch_went_beyond_its_length_may_be_asked_for_again(tmp_path):
    config = of(train={"examples": 100, "batch": 64})
    begun(tmp_path, config, trained=128)
    claim(config, tmp_path)


def test_a_run_without_a_checkpoint_may_have_any_length(tmp_path):
    claim(of(**COSINE), tmp_path)
    (tmp_path / CHECKPOINTS).mkdir()
    claim(of(**COSINE, train={"examples": 5}), tmp_path)


PATHS = {
    "pretrained": "sd",
    "data.source": "folder:photos?caption=a//b",
    "data.validation": "tars:{0..3}.tar",
    "data.records": "~/latents",
    "eval.prompts": "file:prompts.txt?count=3&seed=1",
    "eval.reference": "set.npz",
    "eval.networks.clip": "./x/../clip",
    "eval.networks.inception": "gs://bucket/i",
    "eval.networks.dinov2": "/d",
}


def test_paths_of_the_command_line_mean_the_same_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    words = [f"--config={CONFIGS[0]}", "--workdir=~/run"]
    flags = parse([*words, *(f"--config.{path}={text}" for path, text in PATHS.items())], RunConfig)
    found = values(flags.config)
    assert {path: found[path] for path in PATHS} == {
        "pretrained": f"{tmp_path}/sd",
        "data.source": f"folder:{tmp_path}/photos?caption=a//b",
        "data.validation": f"tars:{tmp_path}/{{0..3}}.tar",
        "data.records": "/home/me/latents",
        "eval.prompts": f"file:{tmp_path}/prompts.txt?count=3&seed=1",
        "eval.reference": f"{tmp_path}/set.npz",
        "eval.networks.clip": f"{tmp_path}/clip",
        "eval.networks.inception": "gs://bucket/i",
        "eval.networks.dinov2": "/d",
    }
    assert str(flags.workdir) == "/home/me/run"
    assert with_absolute_paths(flags.config) == flags.config


@pytest.mark.parametrize(
    ("text", "absolute"),
    [
        ("tfds:coco?data_dir=sets&split=train", "tfds:coco?data_dir=/here/sets&split=train"),
        ("folder:../photos/", "folder:/photos"),
        ("folder:/photos", "folder:/photos"),
        ("folder:~/photos", "folder:/home/me/photos"),
        ("tars:?x=1", "tars:?x=1"),
        ("coco:a:b.json", "coco:/here/a:b.json"),
        ("photos", "photos"),
        ("gs://bucket/set.npz", "gs://bucket/set.npz"),
    ],
)
def test_a_location_is_the_same_place_from_any_directory(monkeypatch, text, absolute):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr("os.getcwd", lambda: "/here")
    assert absolute_location(text) == absolute


def test_what_is_no_path_stays_as_it_is():
    config = of(
        pretrained=EMBEDDED,
        data={"validation": "scenes:full?seed=3"},
        eval={"prompts": "captions:9"},
    )
    assert with_absolute_paths(config) == config


def test_a_run_begun_with_a_relative_path_goes_on_with_the_same_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begun(tmp_path, of(pretrained="sd"))
    claim(of(pretrained=str(tmp_path / "sd")), tmp_path)
    with pytest.raises(ValueError, match="pretrained"):
        claim(of(pretrained=str(tmp_path / "other")), tmp_path)
