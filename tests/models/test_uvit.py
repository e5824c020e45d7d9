import dataclasses
import runpy
import warnings

import jax
import numpy as np
import pytest
from specimens import SMALL, answer, drawn, error, inputs, num_params, opened, outputs_of

from ldm_jax.models.uvit import Block
from ldm_jax.models.uvit_config import UViTConfig
from ldm_jax.nn.functional import functional
from ldm_jax.nn.stack import Stack
from ldm_jax.types import Cond

TINY = SMALL["uvit"]


@pytest.fixture(scope="module", params=["committed", "live"])
def answers_in_torch(request, goldens, tmp_path_factory):
    """The committed directory; and where torch is installed, a new one."""
    if request.param == "committed":
        return goldens / "uvit"
    directory = tmp_path_factory.mktemp("live")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torch")
        runpy.run_path(str(goldens / "make_uvit_goldens.py"))["write"](directory, seed=1)
    return directory / "uvit"


def sequence():
    """Tokens as they enter the blocks, and which of them are seen."""
    x = np.random.default_rng(2).normal(size=(2, 9, TINY.width)).astype("f")
    return x, np.arange(9)[None] != np.array([[3], [4]])


def test_it_answers_as_the_paper_written_in_torch_does(answers_in_torch):
    expected = outputs_of(answers_in_torch)
    _, params, apply = opened(answers_in_torch)

    def given(latents, mask):
        cond = Cond(expected["tokens"], mask)
        return answer(apply, params, expected[latents], expected["told"], cond)

    masked = given("latents", expected["mask"])
    assert error(masked, expected["unmasked"]) > 1e-3
    assert error(masked, expected["masked"]) < 1e-5
    assert error(given("latents", None), expected["unmasked"]) < 1e-5
    assert error(given("others", expected["mask"]), expected["resized"]) < 1e-5


def test_the_time_is_seen_also_where_no_token_of_the_text_is():
    params, apply = drawn(TINY)
    x, told, cond = inputs(TINY)
    nothing = cond._replace(mask=np.zeros_like(cond.mask))
    now, later = (answer(apply, params, x, t, nothing) for t in (told, told + 1))
    assert error(now, later) > 1e-3


def test_where_nothing_is_taken_from_the_first_half_it_is_a_plain_transformer():
    params, apply = drawn(TINY)
    x, mask = sequence()
    half, width = TINY.depth // 2, TINY.width
    own = np.concatenate([np.eye(width), np.zeros((width, width))]).astype("f")
    join = {"kernel": np.stack([own] * half), "bias": np.zeros((half, width), "f")}
    out = {**params["out_blocks"]["block"], "join": join}
    given = apply({**params, "out_blocks": {"block": out}}, x, mask, method="blocks")
    parts = (
        params["in_blocks"]["block"],
        jax.tree.map(lambda leaf: leaf[None], params["mid_block"]),
        {name: leaf for name, leaf in out.items() if name != "join"},
    )
    blocks = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    _, plain = functional(lambda rngs: Stack(lambda rngs: Block(TINY, rngs), TINY.depth + 1, rngs))
    expected = plain({"block": blocks}, x, mask)
    np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-5)
    assert error(apply(params, x, mask, method="blocks"), expected) > 1e-2


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        # Bao et al. 2022, on MS-COCO: U-ViT-S and its deeper variant.
        ({"width": 512, "depth": 12, "num_heads": 8, "text_width": 768}, "45M"),
        ({"width": 512, "depth": 16, "num_heads": 8, "text_width": 768}, "58M"),
        # Li et al. 2024 (arXiv:2412.12391).
        ({}, "2.3B"),
    ],
)
def test_published_configs_have_the_published_number_of_parameters(fields, count):
    number = num_params(UViTConfig(**fields))
    assert count == (f"{number / 1e9:.1f}B" if number > 1e9 else f"{number / 1e6:.0f}M")


def test_a_config_of_another_class_is_refused():
    with pytest.raises(ValueError, match="_class_name='UNet2DConditionModel' is not supported"):
        UViTConfig.from_dict({**TINY.to_dict(), "_class_name": "UNet2DConditionModel"})


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"depth": 5}, "depth is 5; it is even and at least 2"),
        ({"depth": 0}, "depth is 0; it is at least 2"),
        ({"patch_size": 0}, "patch_size is 0; it is at least 1"),
        ({"num_heads": 3}, "width 16 is not a multiple of num_heads 3"),
        ({"patch_size": 3}, "sample_size 8 is not a multiple of patch_size 3"),
    ],
)
def test_impossible_configs_are_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(TINY, **fields)


def test_inputs_that_do_not_fit_are_refused():
    params, apply = drawn(TINY)
    x, told, cond = inputs(TINY)
    with pytest.raises(ValueError, match="latents of 3 x 6 cannot be cut into patches of 2 x 2"):
        answer(apply, params, x[:, :3], told, cond)
    with pytest.raises(ValueError, match="10 tokens a caption; this U-ViT has 9 positions"):
        answer(apply, params, x, told, Cond(np.tile(cond.tokens, (1, 2, 1))))
