"""The backbone of a run, checked against the frozen networks beside it."""

import dataclasses
from collections.abc import Sequence

from ldm_jax.models import BACKBONES, Backbone
from ldm_jax.models.networks import make_network
from ldm_jax.nn.functional import Functional
from ldm_jax.runs.config import RunConfig
from ldm_jax.runs.pretrained import Pretrained

# The setting behind a property of a backbone.
SET_BY = {"predicted_channels": "out_channels"}


def make_backbone(config: RunConfig, frozen: Pretrained) -> Functional:
    """Makes the network that is trained, in the precision of the run.

    Raises:
      ValueError: it does not fit the text encoder, the autoencoder or the size of the images.
    """
    backbone = dataclasses.replace(config.backbone, dtype=config.train.precision)
    channels = frozen.autoencoder.config.latent_channels
    fits = {
        "text_width": (backbone.text_width, frozen.text.width),
        "in_channels": (backbone.in_channels, channels),
        "predicted_channels": (backbone.predicted_channels, channels),
    }
    if backbone.pooled_width:
        fits["pooled_width"] = backbone.pooled_width, frozen.text.pooled_width
    if wrong := [(field, *pair) for field, pair in fits.items() if pair[0] != pair[1]]:
        raise ValueError(_misfit(backbone, wrong))
    side = config.data.size // frozen.autoencoder.config.downsampling
    if side % backbone.multiple:
        raise ValueError(
            f"data.size is {config.data.size}, which gives latents of {side} rows; this backbone takes a"
            f" multiple of {backbone.multiple}"
        )
    return make_network(backbone)


def _misfit(backbone: Backbone, wrong: Sequence[tuple[str, int, int]]) -> str:
    """Says which fields of a backbone do not fit, as (field, given, wanted), and the flags that set them right."""
    said = "; ".join(
        f"{field} is {given}, and the pretrained models have {wanted}"
        for field, given, wanted in wrong
    )
    (name,) = (name for name, kind in BACKBONES.items() if type(backbone) is kind)
    flags = " ".join(
        f"--config.backbone.{name}.{SET_BY.get(field, field)}={wanted}"
        for field, _, wanted in wrong
    )
    return f"the backbone's {said}: give {flags}, or --config.pretrained with others"
