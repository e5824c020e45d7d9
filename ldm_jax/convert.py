"""A pipeline in diffusers' layout, from a run or from another such directory; a network that scores, from its files.

    python -m ldm_jax.convert --from=runs/demo --to=pipelines/demo
    python -m ldm_jax.convert --from=/data/stable-diffusion-2-1 --to=/data/sd21-half --dtype=float16
    python -m ldm_jax.convert --from=pt_inception-2015-12-05-6726825d.pth --to=/data/inception
    python -m ldm_jax.convert --from=alex.pth --from=alexnet-owt-7be5be79.pth --to=/data/lpips

From a run comes its newest checkpoint's backbone, with the frozen models that it was trained with and its schedule:
what `StableDiffusionPipeline.from_pretrained` opens (`StableDiffusionXLPipeline`, `PixArtAlphaPipeline`). From a
pipeline's directory every network is read, checked, and written anew in full or half precision, a file at a time;
their settings, tokenizers, the scheduler and whatever else is there are kept. Files are those of torch.save that the
authors of Inception for FID, LPIPS (its linear layers, and torchvision's network below them) and DINOv2 released; they
become the directory of a network. Torch is not needed, and no code that is in them is run.
"""

import argparse

from ldm_jax.models import weights
from ldm_jax.runs.config import WEIGHTS
from ldm_jax.runs.convert import convert
from ldm_jax.settings.command_line import any_path, run_command
from ldm_jax.settings.values import num_bytes


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    text = "directory of a run, in a bucket too, or of a pipeline with a model_index.json; or a file of a network that"
    text += " scores, once for each file that it is in"
    source = {"dest": "sources", "metavar": "SOURCE", "action": "append"}
    parser.add_argument("--from", **source, type=any_path, required=True, help=text)
    text = "directory of the pipeline or of the network, which there must not be yet"
    parser.add_argument("--to", type=any_path, required=True, help=text)
    text = "of the written weights (default float32)"
    parser.add_argument("--dtype", choices=weights.DTYPES, default="float32", help=text)
    text = "bytes above which weights are divided into several files, such as 2e9 (default 10e9, which is diffusers')"
    parser.add_argument(
        "--max-shard-size", type=num_bytes, default=weights.MAX_SHARD_SIZE, help=text
    )
    text = "which parameters of a run: the average or the trained ones (default: as eval.weights of the run)"
    parser.add_argument("--weights", choices=WEIGHTS, help=text)


def main(flags: argparse.Namespace) -> None:
    """Writes the directory, and lists what is in it."""
    names = convert(
        flags.sources,
        flags.to,
        dtype=flags.dtype,
        max_shard_size=flags.max_shard_size,
        which=flags.weights,
    )
    print(f"{flags.to}: {', '.join(names)}")


if __name__ == "__main__":
    run_command(main, description=__doc__, add_flags=add_flags, in_workdir=False)
