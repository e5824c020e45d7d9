"""PSNR, SSIM and LPIPS of pairs against closed forms, and SSIM against SciPy's filter in double precision."""

import jax
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from ldm_jax.metrics.extractors import LPIPSFeatures, PairFeatures
from ldm_jax.metrics.pairs import psnr, ssim
from ldm_jax.models.lpips import LPIPS, LPIPSConfig
from ldm_jax.nn.functional import functional

JITTED = {"psnr": jax.jit(psnr), "ssim": jax.jit(ssim)}


def draw_pair(shape=(3, 20, 27, 3), amount=0.3):
    rng = np.random.default_rng(0)
    first, noise = rng.uniform(-1, 1, (2, *shape))
    return first.astype("f"), ((1 - amount) * first + amount * noise).astype("f")


@pytest.fixture(scope="module")
def scores():
    init, apply = functional(lambda rngs: LPIPS(LPIPSConfig("alex", divisor=32), rngs))

    def features(params, images, references):
        of_pairs = PairFeatures().features(None, images, references)
        return of_pairs | LPIPSFeatures(apply).features(params, images, references)

    return jax.jit(features), init(jax.random.key(0))


@pytest.mark.parametrize("offset", [0.5, 0.02, -2.0])
def test_psnr_of_a_constant_offset_is_that_of_its_square(offset):
    images = np.full((2, 5, 4, 3), -0.25 if offset > -1 else 1.0, "f")
    given = JITTED["psnr"](images + np.float32(offset), images)
    np.testing.assert_allclose(given, 20 * np.log10(2 / abs(offset)), atol=1e-4)


def test_psnr_falls_by_20_decibels_for_ten_times_the_error():
    images, references = draw_pair()
    near = images + (references - images) / 10
    np.testing.assert_allclose(psnr(images, near) - psnr(images, references), 20, atol=1e-3)


def test_psnr_of_equal_images_is_infinite_and_their_similarity_one():
    images, _ = draw_pair()
    np.testing.assert_array_equal(JITTED["psnr"](images, images), np.inf)
    np.testing.assert_allclose(JITTED["ssim"](images, images), 1, rtol=1e-6)


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.6), (-1, 1), (0, 0.01)])
def test_ssim_of_constants_is_the_luminance_term(a, b):
    shape = (1, 12, 14, 3)
    c_1 = (0.01 * 2) ** 2
    expected = (2 * a * b + c_1) / (a**2 + b**2 + c_1)
    given = JITTED["ssim"](np.full(shape, a, "f"), np.full(shape, b, "f"))
    np.testing.assert_allclose(given, expected, atol=1e-4)


@pytest.mark.parametrize("amount", [1.0, 0.3, 0.01])
@pytest.mark.parametrize("smooth", [0.0, 4.0])
def test_ssim_is_that_of_scipys_filter_in_double_precision(amount, smooth):
    images, references = (
        gaussian_filter(x, (0, smooth, smooth, 0)) for x in draw_pair(amount=amount)
    )
    expected = [reference_ssim(*pair) for pair in zip(images, references, strict=True)]
    np.testing.assert_allclose(JITTED["ssim"](images, references), expected, atol=2e-5)


def reference_ssim(x, y):
    """Equation 13 of the paper, with the covariance as a mean of products about the means' filter."""
    x, y = x.astype(np.float64), y.astype(np.float64)

    def mean(z):
        return gaussian_filter(z, 1.5, radius=5, axes=(0, 1))[5:-5, 5:-5]

    c_1, c_2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    mu_x, mu_y = mean(x), mean(y)
    cov = [[mean(a * b) - mean(a) * mean(b) for a in (x, y)] for b in (x, y)]
    above = (2 * mu_x * mu_y + c_1) * (2 * cov[0][1] + c_2)
    below = (mu_x**2 + mu_y**2 + c_1) * (cov[0][0] + cov[1][1] + c_2)
    return (above / below).mean()


def test_scores_are_symmetric_and_of_every_pair_alone(scores):
    features, params = scores
    images, references = draw_pair((8, 31, 33, 3))
    given = features(params, images, references)
    back = features(params, references, images)
    alone = features(params, images[1:2], references[1:2])
    for name, values in given.items():
        assert values.shape == (8,) and values.dtype == np.float32, name
        np.testing.assert_allclose(values, back[name], rtol=1e-5)
        np.testing.assert_allclose(values[1:2], alone[name], rtol=1e-5)


def test_images_that_are_equal_have_no_lpips(scores):
    features, params = scores
    images, _ = draw_pair((8, 31, 33, 3))
    np.testing.assert_array_equal(features(params, images, images)["lpips"], 0)


def test_scores_do_not_depend_on_how_a_mesh_divides_the_batch(scores):
    features, params = scores
    images, references = draw_pair((8, 31, 33, 3))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    divided = jax.sharding.NamedSharding(mesh, jax.P("data"))
    expected = features(params, images, references)
    given = features(params, *jax.device_put((images, references), divided))
    for name, values in given.items():
        assert values.sharding.is_equivalent_to(divided, 1), name
        np.testing.assert_allclose(values, expected[name], rtol=1e-5)


@pytest.mark.parametrize("score", [psnr, ssim])
def test_images_of_different_shapes_are_refused(score):
    with pytest.raises(ValueError, match=r"images are \(1, 12, 12, 3\) and their references"):
        score(np.zeros((1, 12, 12, 3), "f"), np.zeros((1, 12, 13, 3), "f"))


def test_images_smaller_than_the_window_are_refused():
    images = np.zeros((1, 10, 12, 3), "f")
    with pytest.raises(ValueError, match=r"images are \(10, 12\) pixels; SSIM's window takes 11"):
        ssim(images, images)
