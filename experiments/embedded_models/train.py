"""Trains the embedded models and measures them on held-out scenes.

python experiments/embedded_models/train.py                       # all of them, in order
python experiments/embedded_models/train.py --only=autoencoder    # one
python experiments/embedded_models/train.py --measure             # only the figures
"""

import os

# Two virtual devices keep two cores busy where one device keeps one and a half.
os.environ.setdefault(
    "XLA_FLAGS", f"--xla_force_host_platform_device_count={min(8, os.cpu_count() or 1)}"
)

import argparse
import importlib
import json
from pathlib import Path

from ldm_jax.models import scheduler
from ldm_jax.runs.config import RunConfig

ASSETS = Path(__file__).parents[2] / "ldm_jax" / "assets" / "scenes"
STEPS = {"autoencoder": 10_000, "reader": 4_000, "text_encoder": 4_000, "clip": 5_000}


def main() -> None:
    """Trains what was asked for, and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=STEPS, help="train and measure one network")
    parser.add_argument("--measure", action="store_true", help="measure what stands, train nothing")
    parser.add_argument("--steps", type=int, help="instead of the network's own number")
    parser.add_argument(
        "--assets", type=Path, default=ASSETS, help="the directory to write and to read"
    )
    arguments = parser.parse_args()
    write_scheduler(arguments.assets)
    for name in [arguments.only] if arguments.only else STEPS:
        module = importlib.import_module(name)
        if not arguments.measure:
            module.train(arguments.assets, arguments.steps or STEPS[name])
        print(json.dumps(module.measure(arguments.assets), indent=2), flush=True)


def write_scheduler(assets: Path) -> None:
    """The noise schedule that runs with these models have unless they say otherwise."""
    run = RunConfig()
    config = scheduler.to_diffusers(run.schedule, run.prediction, run.sampling.spacing)
    path = assets / "scheduler" / "scheduler_config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
