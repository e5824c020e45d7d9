"""What a roofline says of programs for TPUs beside the compiler's cycles, by kind of operation; on any machine.

    python benchmarks/roofline.py [--programs=pixart-v5p,unet-v5e]

Each training step is compiled whole, which takes two to ten minutes on two cores. Both times are of what a device
computes, without kernels and communication, which are the same in both. Needs jax[tpu].
"""

import argparse

import jax

from ldm_jax.parallel.chips import chip
from ldm_jax.planning import programs
from ldm_jax.planning.aot import topology
from ldm_jax.planning.cost import profile
from ldm_jax.planning.roofline import timed
from ldm_jax.runs.config import RunConfig
from ldm_jax.settings.command_line import parse

CONFIG = "--config=configs/text_to_image.py"
PIXART = (f"{CONFIG}:pixart-alpha", "--config.data.text_embeddings=true")
UNET = "--config.backbone.unet"
UNET_866M = (f"{CONFIG}:unet-866m", f"{UNET}.remat=none", "--config.train.batch=32")
SMALL = (
    *(f"{CONFIG}:unet-sd2", f"{UNET}.channels=320,640", f"{UNET}.transformer_depth=1,1"),
    *(f"{UNET}.num_res_blocks=1", f"{UNET}.remat=dots"),
)
FSDP = "--config.mesh.fsdp=16"
# Name, slice and how many of them, flags. The numbers of `planning.roofline` are fitted to the first three.
PROGRAMS = {
    "pixart-v5p": ("v5p:2x2x1", 1, (*PIXART, "--config.train.batch=64")),
    "unet-v5e": ("v5e:16x16", 1, SMALL),
    "pixart-v5e-fsdp": ("v5e:16x16", 1, (*PIXART, FSDP)),
    "unet-v5e-fsdp": ("v5e:16x16", 1, (*SMALL, FSDP)),
    "unet-866m-v5p": ("v5p:2x2x1", 1, UNET_866M),
    "pixart-v6e-fsdp": ("v6e:8x16", 2, (*PIXART, FSDP)),
}
KINDS = ("convolution", "dot", "elementwise", "reduction", "copy")
HEADER = "program           compiler ms  roofline ms  ratio"


def kinds(text, devices):
    """Milliseconds of each of KINDS."""
    found = profile(text, devices).kinds
    return [found.get(kind, 0.0) * 1e3 for kind in KINDS]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", default=",".join(PROGRAMS), help="which of them")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    print(HEADER, *(f"{kind:>11}" for kind in KINDS))
    for name in arguments.programs.split(","):
        slice_, slices, words = PROGRAMS[name]
        config = parse(words, RunConfig, in_workdir=False).config
        devices = topology(slice_, slices)
        program = programs.training(programs.Planned(config, devices=devices))
        text = programs.lowered(program).compile().as_text()
        whole, early = (
            kinds(text, devices),
            kinds(timed(text, chip(devices[0].device_kind)), devices),
        )
        print(
            f"{name:17} {sum(whole):11.1f} {sum(early):12.1f} {sum(early) / sum(whole):6.2f}",
            *(f"{b / a if a else 0:11.2f}" for a, b in zip(whole, early, strict=True)),
            flush=True,
        )


if __name__ == "__main__":
    main()
