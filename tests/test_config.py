"""The real config of a run, whatever its fields are."""

import importlib.util
from pathlib import Path

import pytest

from ldm_jax.config import RunConfig
from ldm_jax.configuration import from_config_dict, from_json, settings, to_config_dict, to_json
from ldm_jax.flags import load_config

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


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
