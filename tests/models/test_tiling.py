import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import repeat

from ldm_jax.models.tiling import decode_tiled

RNG = np.random.default_rng(0)


def enlarged(latents):
    """A decoder that looks at each place alone."""
    return jnp.sin(repeat(latents[..., :3], "B H W C -> B (H h) (W w) C", h=4, w=4))


@pytest.mark.parametrize(("tile", "overlap"), [(8, 0), (8, 2), (8, 7), (16, 4), (64, 8)])
@pytest.mark.parametrize("sides", [(8, 8), (21, 13), (8, 40)])
def test_tiles_put_together_are_the_whole_for_a_decoder_that_is_local(tile, overlap, sides):
    latents = RNG.normal(size=(2, *sides, 4)).astype("f")
    whole = jax.jit(
        lambda latents: decode_tiled(enlarged, latents, tile=tile, overlap=overlap, factor=4)
    )(latents)
    np.testing.assert_allclose(whole, enlarged(latents), atol=1e-6)


def test_each_tile_is_decoded_with_its_own_surroundings_and_fades_into_the_next():
    """A decoder that paints a tile in the mean of its latents: the overlap goes from one to the other."""

    def painted(latents):
        mean = jnp.mean(latents, axis=(1, 2), keepdims=True)
        return jnp.broadcast_to(mean, (*latents.shape[:3], 3))

    latents = np.zeros((1, 4, 12, 1), "f")
    latents[:, :, 8:] = 1
    row = decode_tiled(painted, latents, tile=8, overlap=4, factor=1)[0, 0, :, 0]
    np.testing.assert_allclose(row[:4], 0, atol=1e-6)
    np.testing.assert_allclose(row[8:], 0.5, atol=1e-6)
    assert np.all(np.diff(row[3:9]) > 0)


@pytest.mark.parametrize("overlap", [-1, 8])
def test_an_overlap_that_cannot_be_is_refused(overlap):
    with pytest.raises(ValueError, match="tiles of 8 cannot overlap by"):
        decode_tiled(enlarged, np.zeros((1, 9, 9, 4)), tile=8, overlap=overlap, factor=4)
