"""The config machinery, on small dataclasses of its own."""

import dataclasses
import json
import math
import re

import pytest
from ml_collections import config_dict

from ldm_jax.settings.fields import choice, one_of
from ldm_jax.settings.schema import (
    check_name,
    config_difference,
    conform,
    from_config_dict,
    from_json,
    settings,
    to_config_dict,
    to_json,
)


@dataclasses.dataclass(frozen=True)
class Euler:
    churn: float = 0.0  # noise added back


@dataclasses.dataclass(frozen=True)
class Multistep:
    order: int = 2  # of the solver
    inner: object = choice({"euler": Euler}, Euler())  # the first step's

    def __post_init__(self):
        if self.order not in (1, 2, 3):
            raise ValueError(f"order is {self.order}; it takes 1, 2 or 3")


SAMPLERS = {"euler": Euler, "multistep": Multistep}


@dataclasses.dataclass(frozen=True)
class Network:
    channels: tuple[int, ...] = (32, 64)
    # what stands above a field
    # is its help too
    axes: tuple[tuple[str, str | None], ...] = (("batch", "data"), ("embed", None))
    clip: float | None = None  # norm


@dataclasses.dataclass(frozen=True)
class Run:
    network: Network = Network()
    sampler: object = choice(SAMPLERS, Euler())  # how to sample
    prediction: str = one_of(("eps", "v"), "v")  # what is predicted
    rate: float = 1e-3
    steps: int = 10
    remat: bool = False


@dataclasses.dataclass(frozen=True)
class Loose:
    rate: float = 0.1
    kind: str = one_of(("a", "b"), "a")


OTHER = Run(
    network=Network(channels=(1, 2, 3), axes=(), clip=0.5),
    sampler=Multistep(order=3, inner=Euler(churn=0.25)),
    prediction="eps",
    rate=math.pi,
    steps=7,
    remat=True,
)


@pytest.mark.parametrize("run", [Run(), OTHER])
def test_config_dict_and_back_is_the_same_config(run):
    assert from_config_dict(to_config_dict(run), Run) == run


@pytest.mark.parametrize("run", [Run(), OTHER])
def test_json_and_back_is_the_same_config(run):
    assert from_json(to_json(run), Run) == run


def test_int_for_a_float_does_not_make_the_setting_an_int():
    config = to_config_dict(Loose(rate=1))
    config.rate = 0.5
    assert from_config_dict(config, Loose) == Loose(rate=0.5)


@pytest.mark.parametrize("wrong", [{"rate": "x"}, {"kind": "c"}])
def test_wrong_value_in_a_dataclass_is_named(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=rf"^Loose\.{name} is '"):
        to_config_dict(Loose(**wrong))


def test_config_dict_rejects_unknown_keys_and_other_types():
    config = to_config_dict(Run())
    with pytest.raises(AttributeError):
        config.network.chanels = (1,)
    with pytest.raises(TypeError):
        config.steps = "many"


def test_every_row_of_a_registry_has_a_section_and_the_named_one_counts():
    config = to_config_dict(Run())
    config.sampler.multistep.order = 3
    assert from_config_dict(config, Run) == Run()
    config.sampler.name = "multistep"
    assert from_config_dict(config, Run) == Run(sampler=Multistep(order=3))


def test_optional_setting_takes_a_value_and_none_again():
    config = to_config_dict(OTHER)
    config.network.clip = None
    assert from_config_dict(config, Run).network.clip is None
    config.network.clip = 2
    assert from_config_dict(config, Run).network.clip == 2.0


def test_config_dict_of_a_field_file_can_be_copied_and_updated():
    config = config_dict.ConfigDict(to_config_dict(Run()))
    config.update_from_flattened_dict({"sampler.name": "multistep", "network.channels": (5,)})
    assert from_config_dict(config, Run).network.channels == (5,)


@pytest.mark.parametrize(
    ("given", "names", "nearest"),
    [
        ("dpm++", ("ddim", "ddpm", "dpmpp", "euler"), "dpmpp"),
        ("ddp", ("ddim", "ddpm", "dpmpp", "euler"), "ddpm"),
        ("eular", ("ddim", "euler_ancestral", "euler"), "euler"),
        ("uniet", ("pixart", "unet", "uvit"), "unet"),
    ],
)
def test_the_nearest_name_starts_as_the_one_that_was_given(given, names, nearest):
    with pytest.raises(ValueError, match=rf"'{re.escape(given)}' \(did you mean '{nearest}'\?\)"):
        check_name(given, names, "sampler.name")


REFUSED = {
    "wrong type": ({"steps": 1.5}, "config.steps is 1.5; it takes int"),
    "truth is no number": ({"steps": True}, "config.steps is True; it takes int"),
    "element": (
        {"network": {"channels": [1, "x"]}},
        "config.network.channels[1] is 'x'; it takes int",
    ),
    "length": (
        {"network": {"axes": [["batch"]]}},
        "config.network.axes[0] is ('batch',); it takes 2 values, tuple[str, str | None]",
    ),
    "unknown key": (
        {"network": {"chanels": [1]}},
        "config.network has no 'chanels' (did you mean 'channels'?); it has channels, axes, clip",
    ),
    "name": (
        {"prediction": "x"},
        "config.prediction is 'x'; allowed are eps, v",
    ),
    "row": (
        {"sampler": {"name": "eulr"}},
        "config.sampler.name is 'eulr' (did you mean 'euler'?); allowed are euler, multistep",
    ),
    "section": ({"network": 3}, "config.network is 3; it is a section of settings"),
    "the class's own check": (
        {"sampler": {"name": "multistep", "multistep": {"order": 9}}},
        "config.sampler.multistep: order is 9; it takes 1, 2 or 3",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusal_says_where_what_and_what_is_allowed(case):
    given, sentence = REFUSED[case]
    with pytest.raises(ValueError) as caught:
        from_config_dict(given, Run)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (3, float, 3.0),
        ([1, 2], tuple[float, ...], (1.0, 2.0)),
        (None, int | None, None),
        ("x", int | str, "x"),
        ((), tuple[int, ...], ()),
    ],
)
def test_conform_gives_the_declared_type(value, kind, expected):
    result = conform(value, kind, "here")
    assert result == expected
    assert type(result) is type(expected)


def test_absent_settings_take_their_defaults():
    assert from_json("{}", Run) == Run()


def test_json_holds_only_the_chosen_row():
    assert json.loads(to_json(Run()))["sampler"] == {"name": "euler", "euler": {"churn": 0.0}}


def test_difference_names_each_setting_that_differs_once():
    old = Run()
    new = dataclasses.replace(old, steps=20, network=Network(channels=(32,)))
    lines = [str(d) for d in config_difference(to_json(old), to_json(new))]
    assert lines == ["network.channels: [32, 64] -> [32]", "steps: 10 -> 20"]
    assert config_difference(to_json(new), to_json(new)) == []


def test_difference_of_another_row_is_its_name_alone():
    new = dataclasses.replace(Run(), sampler=Multistep())
    lines = [str(d) for d in config_difference(to_json(Run()), to_json(new))]
    assert lines == ['sampler.name: "euler" -> "multistep"']


def test_difference_shows_settings_that_one_side_lacks():
    difference = config_difference('{"a": {"b": 1}}', '{"a": {"c": 2}}')
    assert [str(d) for d in difference] == ["a.b: 1 -> absent", "a.c: absent -> 2"]


def test_settings_list_every_leaf_with_its_comment():
    found = {setting.path: setting for setting in settings(Run)}
    assert list(found) == [
        "network.channels",
        "network.axes",
        "network.clip",
        "sampler.name",
        "sampler.euler.churn",
        "sampler.multistep.order",
        "sampler.multistep.inner.name",
        "sampler.multistep.inner.euler.churn",
        "prediction",
        "rate",
        "steps",
        "remat",
    ]
    assert found["network.axes"].help == "what stands above a field is its help too"
    assert found["network.clip"].help == "norm"
    assert found["network.channels"].help == ""
    assert found["sampler.name"].names == ("euler", "multistep")
    assert found["prediction"].names == ("eps", "v")


def test_inherited_fields_keep_the_comment_of_the_class_that_has_it():
    @dataclasses.dataclass(frozen=True)
    class Child(Euler):
        more: int = 1  # its own

    assert [s.help for s in settings(Child)] == ["noise added back", "its own"]


def test_docstring_helps_where_there_is_no_comment():
    @dataclasses.dataclass(frozen=True)
    class Documented:
        """Something (eq. 3). Here `first` and
        `second` are halves; `third` is
        a rest.

        Attributes:
          fourth: what is listed.
        """

        first: int = 1
        second: int = 2  # a comment comes first
        third: int = 3
        fourth: int = 4
        fifth: int = 5

    assert [setting.help for setting in settings(Documented)] == [
        "Here `first` and `second` are halves",
        "a comment comes first",
        "`third` is a rest",
        "what is listed",
        "",
    ]
