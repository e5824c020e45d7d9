"""Turns images and captions into latents and captions, once, for training to read.

    python -m ldm_jax.encode --config=configs/demo.py --workdir=runs/demo
    python -m ldm_jax.encode --config=configs/photos.py --config.data.source=folder:/photos --workdir=runs/photos

The latents go to WORKDIR/latents (or data.records) with a manifest that lists what was skipped and why, and the config
to WORKDIR, where the other commands find it. Killed at any moment, the same command continues where it stopped.
"""

import argparse
import functools

import jax

from ldm_jax.data import open_source
from ldm_jax.data.encoding import Limits, TextEncoder, encode
from ldm_jax.data.latents import Manifest
from ldm_jax.data.sources import tally
from ldm_jax.models import weights
from ldm_jax.parallel import jit, make_mesh, put_same
from ldm_jax.runs import build
from ldm_jax.runs.config import RunConfig, claim
from ldm_jax.runs.pretrained import load_pretrained
from ldm_jax.settings.command_line import run_command
from ldm_jax.types import Cond, Images, Latent


def main(flags: argparse.Namespace) -> None:
    """Encodes the training source, and that of the validation loss where it has its own."""
    config: RunConfig = flags.config
    data = config.data
    sources = {"train": data.source, "validation": data.validation}
    directories = {part: build.records(config, flags.workdir, part) for part in sources}
    mesh = make_mesh(config.mesh)
    pretrained = load_pretrained(config, mesh)
    frozen = pretrained.params
    to_latents = jit(pretrained.encode_images, mesh)
    to_cond = jit(pretrained.encode, mesh)

    def encoder(images: Images) -> Latent:
        return to_latents(frozen, put_same(images, mesh))

    def embed(captions: list[str]) -> Cond:
        return jax.device_get(to_cond(frozen, pretrained.text(captions)))

    text = TextEncoder(embed, weights.fingerprint(pretrained.text_params))
    run = functools.partial(
        encode,
        encoder=encoder,
        autoencoder=build.autoencoder_of(pretrained),
        size=data.size,
        batch=data.encode_batch,
        workers=data.workers,
        items_per_shard=data.items_per_shard,
        limits=Limits(data.min_side, data.max_caption, data.max_skipped),
        text=text if data.text_embeddings else None,
    )
    for part, source in sources.items():
        if source is not None:
            manifest = run(open_source(source), directory=directories[part])
            print(f"{directories[part]}: {_summary(manifest)}")
    claim(config, flags.workdir)  # now that the latents have accepted what they are made with


def _summary(manifest: Manifest) -> str:
    left_out = f", left out: {tally(manifest.left_out)}" if manifest.left_out else ""
    std = ", ".join(f"{value:.2f}" for value in manifest.latent_std)
    return (
        f"{manifest.written} records of {manifest.read} items, skipped: {tally(manifest.skipped)}{left_out}; "
        f"latents {'x'.join(map(str, manifest.latent_shape))}, std {std}"
    )


if __name__ == "__main__":
    run_command(main, RunConfig, description=__doc__)
