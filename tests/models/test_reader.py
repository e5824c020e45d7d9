"""The reader of scenes: what its structure promises, with random weights."""

import json

import jax
import numpy as np
import pytest

from ldm_jax.models.reader import Reader, ReaderConfig
from ldm_jax.nn.functional import functional

CONFIG = ReaderConfig(size=16, channels=(8, 16), strides=(2, 1), asked=((3, 4), (1, 2)))
INIT, APPLY = functional(lambda rngs: Reader(CONFIG, rngs))
IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    return jax.jit(INIT)(jax.random.key(0))


def test_the_subjects_of_a_group_share_all_but_what_they_look_for(params):
    logits = APPLY(params, IMAGES)
    assert logits.shape == (2, 3 * 4 + 2)
    turned = {**params, "subjects": params["subjects"][np.array([2, 0, 1, 3])]}
    one, other = (
        np.split(np.asarray(x), [4, 8, 12], axis=1) for x in (logits, APPLY(turned, IMAGES))
    )
    for number, subject in enumerate((2, 0, 1, 3)):
        np.testing.assert_allclose(other[number], one[subject], rtol=1e-5, atol=1e-6)
    assert np.abs(one[0] - one[1]).max() > 1e-3


def test_an_image_is_read_alone(params):
    np.testing.assert_allclose(
        APPLY(params, IMAGES)[1:], APPLY(params, IMAGES[1:]), rtol=1e-5, atol=1e-6
    )


def test_its_config_survives_json():
    assert ReaderConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict()))) == CONFIG
