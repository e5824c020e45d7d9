"""Encoding of a run's images and captions into latents."""

import functools
import logging
from collections.abc import Callable

import jax
import numpy as np

from ldm_jax.data import encoding, open_source
from ldm_jax.data.latents import Manifest
from ldm_jax.data.sources import Source, tally
from ldm_jax.evals.image_grids import RECONSTRUCTIONS, save_grid
from ldm_jax.evals.references import SourceImages
from ldm_jax.metrics.pairs import MOST_DECIBELS, psnr
from ldm_jax.metrics.resize import to_pixels
from ldm_jax.models import weights
from ldm_jax.parallel import jit, put_same, replicated
from ldm_jax.runs.config import claim
from ldm_jax.runs.run import Run
from ldm_jax.types import Cond, Images, Latent

SHOWN = 8  # images in it, each beside its reconstruction
# dB of the mean PSNR below which one is warned. The embedded autoencoder gives scenes back at 36 dB, photographs at
# 13 and noise at 8; that of Stable Diffusion gives photographs back at 25 to 30.
FAITHFUL = 20.0


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
    lines.append(reconstruct(run, open_source(data.source)))
    claim(run.config, run.workdir)
    return lines


def reconstruct(run: Run, source: Source) -> str:
    """Reconstructs the first batch and writes pairs of it into WORKDIR; returns the mean PSNR in words.

    Logs a warning where it is below `FAITHFUL`: no model that is trained on such latents can draw better images.
    """
    data, path = run.config.data, run.workdir / RECONSTRUCTIONS
    reader = SourceImages(source, size=data.size, batch=data.encode_batch, workers=data.workers)
    images = next(iter(reader))
    decode = jit(
        lambda frozen, x: run.frozen.decode(frozen, run.frozen.encode_images(frozen, x)),
        run.mesh,
        out_shardings=replicated(run.mesh),
    )
    filled = images[np.arange(data.encode_batch) % len(images)]  # one shape
    found = jax.device_get(decode(run.frozen.params, put_same(filled, run.mesh)))[: len(images)]
    decibels = np.minimum(psnr(np.clip(found, -1, 1), images), MOST_DECIBELS)
    text = f"{np.mean(decibels):.1f} dB"
    pairs = np.stack([images, found], 1)[:SHOWN].reshape(-1, *found.shape[1:])
    save_grid(path, np.asarray(to_pixels(pairs)))
    if np.mean(decibels) < FAITHFUL:
        logging.warning(
            "The autoencoder %r gives these images back at a PSNR of %s, below %g dB, and no sample can be better: look"
            " at %s, and give --config.pretrained=DIRECTORY with an autoencoder for such images.",
            *(run.config.pretrained, text, FAITHFUL, path),
        )
    return f"{path}: images beside their reconstructions, at a PSNR of {text} over the first {len(images)}"


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
