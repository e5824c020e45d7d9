"""The papers' families against what the papers print."""

import dataclasses
import logging

import pytest
from specimens import num_params

from ldm_jax.models.sizes import SIZES, UNITS, backbone

# Millions of parameters that the printed architectures have, and the printed GMACs, computed by others.
A = {
    "39m": 38.8,
    "83m": 83.4,
    "145m": 144.8,
    "223m": 223.0,
    "318m": 318.0,
    "430m": 429.8,
    "558m": 558.3,
    "704m": 703.7,
    "866m": 865.9,
    "2b": 2191.7,
    "5b": 4900.2,
}
B = {
    "unet-sd2": (0.866, 86.3),
    "unet-sd2-c512": (2.192, 218.9),
    "unet-sdxl-c128": (0.424, 34.9),
    "unet-sdxl-c192": (0.902, 74.5),
    "unet-sdxl": (2.392, 198.3),
    "unet-sdxl-c384": (3.403, 282.4),
    "unet-sdxl-td2": (0.849, 98.0),
    "unet-sdxl-td4": (1.235, 123.1),
    "unet-sdxl-td12": (2.777, 223.4),
    "unet-sdxl-td14": (3.163, 248.4),
    "unet-sdxl-td4_4": (1.322, 143.0),
    "unet-sdxl-td4_8": (2.093, 193.1),
    "unet-sdxl-td4_12": (2.864, 243.2),
    "unet-sdxl-c384-td4_12": (4.073, 346.3),
    "pixart-alpha": (0.611, 139),
    "pixart-1152-d28": (0.607, 139),
    "pixart-1536-d28": (1.079, 247),
    "pixart-1024-d28": (0.478, 110),
    "pixart-1024-d56": (0.948, 220),
}
RELEASED = {
    "sd1.5": 859_520_964,
    "sd2.1": 865_910_724,
    "sdxl-1.0": 2_567_463_684,
    "pixart-xl-2-512": 610_856_096,
}


@pytest.mark.parametrize("name", A)
def test_a_has_the_parameters_of_the_printed_architecture_to_the_last_digit(name):
    size = SIZES[f"unet-{name}"]
    assert round(size.count().total.params / 1e6, 1) == A[name]
    if name != "39m":  # whose printed cost contradicts itself
        assert UNITS[size.unit](size.count()) == pytest.approx(size.cost, rel=0.03)


@pytest.mark.parametrize("name", B)
def test_b_has_the_printed_parameters_and_multiply_adds_to_the_last_digit(name):
    (params, gmacs), total = B[name], SIZES[name].count().total
    assert round(total.params / 1e9, 3) == params
    assert round(total.macs / 1e9, 1 if gmacs % 1 else None) == gmacs


@pytest.mark.parametrize("name", ["unet-if-xl-c512", "unet-if-xl"])
def test_if_xl_is_within_a_percent_of_what_is_printed(name):
    size = SIZES[name]
    count = size.count()
    assert count.total.params / 1e6 == pytest.approx(size.params, rel=0.01)
    assert count.total.macs / 1e9 == pytest.approx(size.cost, rel=0.01)
    attention = count.parts["self-attention"].macs + count.parts["cross-attention"].macs
    assert round(attention / 1e9) == {"unet-if-xl-c512": 23, "unet-if-xl": 42}[name]


@pytest.mark.parametrize("name", RELEASED)
def test_what_was_released_has_the_released_parameters(name):
    assert SIZES[name].count().total.params == RELEASED[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet-39m", "unet-if-xl-c512", "sdxl-1.0", "pixart-1024-d56"])
def test_the_networks_have_the_parameters_that_are_counted(name):
    assert num_params(SIZES[name].config) == SIZES[name].count().total.params


@pytest.mark.parametrize(
    ("name", "kind", "wanted"),
    [
        ("unet@params=300e6", "params", 300e6),
        ("unet-sdxl-td4_4@flops=1e11", "flops", 1e11),
        ("pixart@params=2e9", "params", 2e9),
        ("uvit@flops=5e11", "flops", 5e11),
    ],
)
def test_a_size_in_between_is_the_nearest_width_and_says_what_it_chose(name, kind, wanted, caplog):
    with caplog.at_level(logging.INFO):
        config = backbone(name)
    assert name in caplog.text and "M parameters" in caplog.text
    size = dataclasses.replace(SIZES["unet-866m"], config=config)

    def miss(width):
        fields = {"width": width} if hasattr(config, "width") else {"channels": channels(width)}
        other = dataclasses.replace(size, config=dataclasses.replace(config, **fields))
        return abs(getattr(other.count().total, kind) - wanted)

    def channels(width):
        return tuple(c * width // config.channels[0] for c in config.channels)

    chosen = config.width if hasattr(config, "width") else config.channels[0]
    assert miss(chosen) <= min(miss(chosen - 64), miss(chosen + 64))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("unet-867m", "there is no backbone 'unet-867m'; near to it are unet-866m"),
        ("unet@depth=3", "after the @ stands params=NUMBER or flops=NUMBER"),
        ("unet@params=many", "'many' is no number"),
        ("pixart@params=1e15", "the nearest that there is has params="),
    ],
)
def test_a_size_that_there_is_not_is_said(name, sentence):
    with pytest.raises(ValueError, match=sentence):
        backbone(name)
