"""JSON files that hold something else than they should: every field of every network, and all that lists files."""

import json

import pytest

from ldm_jax.models import weights
from ldm_jax.models.json_files import read_json, typed
from ldm_jax.models.networks import described

NETWORKS = (
    *(
        "kl",
        "unet_sd1",
        "unet_sdxl",
        "unet_if",
        "unet_tiny",
        "pixart",
        "pixart_sized",
        "uvit",
        "t5",
    ),
    *("clip_both", "clip_text", "clip_text_projected", "dinov2/mlp", "lpips/alex"),
)
# Valid JSON of every kind; `[[]]` and the like are not hashed, compared or iterated by accident.
VALUES = (
    5,
    0,
    -1,
    1.5,
    10**30,
    float("nan"),
    True,
    None,
    "x",
    [],
    [0],
    [[1]],
    [None],
    {},
    {"a": 1},
)
OWN = {
    "Inception": {"divisor": 8},
    "Reader": {"size": 8, "channels": [2], "strides": [1], "asked": [[1, 2]], "dtype": "float32"},
}


def variants(values, others=VALUES):
    """The content of a config.json with one value replaced, at either level, and with one left out."""
    yield from others
    for name, content in values.items():
        yield {other: values[other] for other in values if other != name}
        yield from ({**values, name: value} for value in others)
        if isinstance(content, dict):
            inner = (
                change for change in variants(content, VALUES[::4]) if isinstance(change, dict)
            )
            yield from ({**values, name: change} for change in inner)


def check_every_variant(values, directory):
    """A network is described or refused in one line that names the file. Returns how many were refused."""
    refused = 0
    for variant in variants(values):
        (directory / "config.json").write_text(json.dumps(variant))
        try:
            described(directory)
        except ValueError as error:
            assert "\n" not in str(error) and str(directory / "config.json") in str(error)
            refused += 1
    return refused


@pytest.mark.parametrize("name", NETWORKS)
def test_any_value_in_a_config_is_read_or_refused_in_one_line(goldens, tmp_path, name):
    values = json.loads((goldens / name / "config.json").read_text())
    assert check_every_variant(values, tmp_path) > len(VALUES)


@pytest.mark.parametrize("name", OWN)
def test_any_value_in_a_config_of_ours_is_read_or_refused_in_one_line(tmp_path, name):
    assert check_every_variant({"_class_name": name, **OWN[name]}, tmp_path) > len(VALUES)


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("unet_sd1", {"sample_size": [60, 80]}, r"sample_size is \[60, 80\]; it takes int or none"),
        (
            "unet_sd1",
            {"attention_head_dim": None},
            "attention_head_dim is None; it takes int or tu",
        ),
        ("unet_sd1", {"attention_head_dim": [8]}, r"attention_head_dim is \[8\].* has 2 levels"),
        ("unet_sd1", {"norm_num_groups": None}, "norm_num_groups is None; it takes int"),
        (
            "unet_sd1",
            {"block_out_channels": [8, 0]},
            r"block_out_channels\[1\] is 0; it must be ab",
        ),
        ("unet_sd1", {"block_out_channels": []}, "block_out_channels is empty; it takes at least"),
        (
            "unet_sdxl",
            {"addition_time_embed_dim": None},
            "takes an addition_time_embed_dim and a pr",
        ),
        ("unet_sdxl", {"projection_class_embeddings_input_dim": 24}, "more than 6 times as much"),
        ("kl", {"sample_size": [512, 512]}, r"sample_size is \[512, 512\]; it takes int"),
        ("kl", {"scaling_factor": "1"}, "scaling_factor is '1'; it takes float"),
        ("t5", {"d_model": "32"}, "d_model is '32'; it takes int"),
        (
            "clip_text",
            {"architectures": "CLIP"},
            "architectures is 'CLIP'; it takes tuple.* or none",
        ),
        ("uvit", {"rope": True}, "a U-ViT has no 'rope'; it has _class_name, in_channels"),
    ],
)
def test_the_sentence_names_the_file_the_field_and_what_it_takes(
    goldens, tmp_path, name, changes, sentence
):
    values = json.loads((goldens / name / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, **changes}))
    with pytest.raises(ValueError, match=rf"config\.json: .*{sentence}"):
        described(tmp_path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[" * 100_000, "is not JSON"),
        ('{"a": 1' + "0" * 5000 + "}", "is not JSON"),
        ("\xff", "is not JSON"),
        ("null", r"holds null; it must be an object, \{\.\.\.\}"),
        ("[1]", "holds list"),
        ("5", "holds int"),
    ],
)
def test_a_file_that_holds_no_object_is_refused_by_its_name(tmp_path, content, sentence):
    (tmp_path / "a.json").write_text(content, "latin-1")
    with pytest.raises(ValueError, match=rf"a\.json {sentence}"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("content", [5, None, [], {"weight_map": []}, {"weight_map": {"a": 5}}])
def test_an_index_of_another_kind_is_refused_by_its_name(tmp_path, content):
    name = "model.safetensors.index.json"
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=name):
        weights.lazy(tmp_path, {}, weights.Names())


def test_whole_numbers_may_stand_for_others_and_lists_for_tuples():
    fields = {"rate": (float, 0.5), "sides": (tuple[int, ...], (1,)), "name": (str, "a")}
    assert typed({"rate": 2, "sides": [3, 4], "other": None}, fields) == {
        "rate": 2.0,
        "sides": (3, 4),
        "name": "a",
    }
