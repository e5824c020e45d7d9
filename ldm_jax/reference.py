"""Features of a set of images, for scores of sets to compare with: what FID calls reference statistics.

    python -m ldm_jax.reference --config=configs/demo.py --images=folder:/photos --output=references/photos.npz
    python -m ldm_jax.evaluate --workdir=runs/photos --config.eval.reference=references/photos.npz

Every scoring network that the config names, or that lies beside its pretrained models, looks at every image: the middle
square at data.size pixels. The file says of what it is made, and is refused for images of another size, or by another
network. `--config.eval.reference=folder:/photos` makes such a file within the run when it is first needed.
"""

import argparse

from ldm_jax.parallel import distributed
from ldm_jax.runs.config import RunConfig, absolute_location
from ldm_jax.runs.run import Run
from ldm_jax.runs.scoring import write_reference
from ldm_jax.settings.command_line import UsageError, any_path, in_words, run_command


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    distributed.add_flags(parser)
    text = "the images, as data.source: folder:PATH, tars:GLOB, tfds:NAME or scenes:PRESET"
    parser.add_argument(
        "--images", required=True, type=in_words(absolute_location), metavar="SOURCE", help=text
    )
    text = "the file, FILE.npz, on a disk or gs://BUCKET/..."
    parser.add_argument("--output", required=True, type=any_path, metavar="FILE", help=text)


def main(flags: argparse.Namespace) -> None:
    """Makes the file."""
    if flags.config is None:
        raise UsageError("a reference takes --config=FILE, which names the networks and the size")
    if flags.output.suffix != ".npz":
        raise UsageError(f"--output is {flags.output}; a reference is a file of the kind .npz")
    with distributed.joined(flags):
        print(write_reference(Run(flags.config), flags.images, flags.output))


if __name__ == "__main__":
    run_command(main, RunConfig, description=__doc__, add_flags=add_flags, in_workdir=False)
