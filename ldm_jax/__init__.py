"""Text-to-image latent diffusion in JAX."""

import os
import signal
import sys


def end_interrupted(*_: object) -> None:
    """Ends the process with one line: the handler of Ctrl-C while a command imports its modules, and after its end."""
    os.write(2, b"interrupted\n")
    os._exit(130)


# `python -m ldm_jax.COMMAND` imports this module first. A program that imports the library keeps its own handler.
_after = sys.orig_argv[sys.orig_argv.index("-m") + 1 :] if "-m" in sys.orig_argv else []
if [name.partition(".")[0] for name in _after[:1]] == [__name__] and signal.getsignal(
    signal.SIGINT
) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end_interrupted)
