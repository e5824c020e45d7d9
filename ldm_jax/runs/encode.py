"""Encoding of a run's images and captions into latents."""

import functools
from collections.abc import Callable

import jax

from ldm_jax.data import encoding, open_source
from ldm_jax.data.latents import Manifest
from ldm_jax.data.sources import tally
from ldm_jax.models import weights
from ldm_jax.parallel import jit, put_same
from ldm_jax.runs.config import claim
from ldm_jax.runs.run import Run
from ldm_jax.types import Cond, Images, Latent


def encode(run: Run) -> list[str]:
    """Encodes the training source, and that of the validation loss where it has its own; returns a summary of each.

    The config goes into the working directory last, once the latents have accepted what they are made with.
    """
    data = run.config.data
    sources = {"train": data.source, "validation": data.validation}
    directories = {part: run.records(part) for part in sources}
    write = functools.partial(
        encoding.encode,
        encoder=make_image_encoder(run),
        autoencoder=run.autoencoder,
        size=data.size,
        batch=data.encode_batch,
        workers=data.workers,
        items_per_shard=data.items_per_shard,
        limits=encoding.Limits(data.min_side, data.max_caption, data.max_skipped),
        text=make_text_encoder(run) if data.text_embeddings else None,
    )
    lines = []
    for part, source in sources.items():
        if source is not None:
            manifest = write(open_source(source), directory=directories[part])
            lines.append(f"{directories[part]}: {_summary(manifest)}")
    claim(run.config, run.workdir)
    return lines


def make_image_encoder(run: Run) -> Callable[[Images], Latent]:
    """Makes the function from images to latents, jitted on the mesh."""
    to_latents = jit(run.frozen.encode_images, run.mesh)

    def encoder(images: Images) -> Latent:
        return to_latents(run.frozen.params, put_same(images, run.mesh))

    return encoder


def make_text_encoder(run: Run) -> encoding.TextEncoder:
    """Makes the function from captions to embeddings on the host, with the fingerprint of its networks."""
    to_cond = jit(run.frozen.encode, run.mesh)

    def embed(captions: list[str]) -> Cond:
        return jax.device_get(to_cond(run.frozen.params, run.frozen.text(captions)))

    return encoding.TextEncoder(embed, weights.fingerprint(run.frozen.text_params))


def _summary(manifest: Manifest) -> str:
    left_out = f", left out: {tally(manifest.left_out)}" if manifest.left_out else ""
    std = ", ".join(f"{value:.2f}" for value in manifest.latent_std)
    return (
        f"{manifest.written} records of {manifest.read} items, skipped: {tally(manifest.skipped)}{left_out}; "
        f"latents {'x'.join(map(str, manifest.latent_shape))}, std {std}"
    )
