"""`python -m ldm_jax.train`, and beside it a note of every example that a step has seen and of every validation.

WORKDIR/seen/PROCESS.jsonl    {"examples": after the step, "rows": {row of the batch: [number, digest of its latents]}}
WORKDIR/validations           a line for each that begins; then it waits for WAIT seconds, an environment variable
"""

import os
import time
import zlib

import jax
import numpy as np

from ldm_jax import train
from ldm_jax.files.lines import append_line
from ldm_jax.parallel import distributed
from ldm_jax.runs import train as training
from ldm_jax.runs.config import RunConfig
from ldm_jax.settings.command_line import run_command
from ldm_jax.training import Hook

WAIT = float(os.environ.get("WAIT", "0"))
trained, fit, make_evaluated = train.train, training.fit, training.make_evaluated
places = []


class Seen(Hook):
    """Notes the rows that this process's devices hold."""

    def __init__(self, directory):
        directory.mkdir(exist_ok=True)
        self.path = directory / f"{jax.process_index()}.jsonl"

    def __call__(self, tick):
        rows = {}
        batch = tick.batch
        shards = (x.addressable_shards for x in (batch.index, batch.latents))
        for index, latents in zip(*shards, strict=True):
            first = index.index[0].start or 0
            rows |= {
                first + i: [int(number), zlib.crc32(np.asarray(latents.data)[i].tobytes())]
                for i, number in enumerate(np.asarray(index.data))
            }
        append_line(self.path, {"examples": tick.examples, "rows": rows})

    def close(self):
        pass


def watched_train(run, watch):
    places.append(run.workdir)
    trained(run, watch)


def watched_fit(*args, hooks, **options):
    return fit(*args, hooks=[Seen(places[0] / "seen"), *hooks], **options)


def watched_evaluated(*args):
    evaluated = make_evaluated(*args)

    def validate(*given):
        if distributed.is_first():
            append_line(places[0] / "validations", {})
        time.sleep(WAIT)
        return evaluated.validate(*given)

    return evaluated._replace(validate=validate)


train.train = watched_train
training.fit, training.make_evaluated = watched_fit, watched_evaluated
if __name__ == "__main__":
    run_command(train.main, RunConfig, description=train.__doc__, add_flags=distributed.add_flags)
