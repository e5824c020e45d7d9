"""The real config of a run, whatever its fields are."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest

from ldm_jax.diffusion import DPMpp
from ldm_jax.runs.config import (
    CHECKPOINTS,
    DataConfig,
    EvalConfig,
    RunConfig,
    SamplingConfig,
    TrainConfig,
    claim,
)
from ldm_jax.settings.command_line import load_config, parse
from ldm_jax.settings.schema import from_config_dict, from_json, settings, to_config_dict, to_json

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))


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
        (TrainConfig, "profile", (100,), "two counts of examples"),
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
        ({"guidance_interval": (0.2, 1.2)}, "0 <= low <= high <= 1, got 0.2 to 1.2"),
        ({"guidance_interval": (0.5, 0.2)}, "0 <= low <= high <= 1, got 0.5 to 0.2"),
        ({"guidance_rescale": -0.5}, r"a share in \[0, 1\], got -0.5"),
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
