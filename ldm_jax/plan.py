"""What backbones cost, before anything is spent.

    python -m ldm_jax.plan --table

prints every backbone of `ldm_jax.models.sizes`: its parameters and the cost of a forward pass for one image, counted
layer by layer, beside what its paper prints of them. The cost is in the paper's unit at its size of latents: A's GFLOPs
have two for every multiply-add, those between queries, keys and values included; B's GMACs are without these.
"""

import argparse
from collections.abc import Iterator

from ldm_jax.flags import UsageError, run_command
from ldm_jax.models.sizes import SIZES, UNITS

HEADER = ("backbone", "source", "M params", "printed", "", "forward", "", "printed", "", "")
ROW = "{:<22} {:<11} {:>9} {:>8} {:>7} {:>9} {:<6} {:>8} {:>7}  {}"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    parser.add_argument("--table", action="store_true", help="print the backbones and their costs")


def main(flags: argparse.Namespace) -> None:
    """Prints the table."""
    if not flags.table:
        raise UsageError("nothing to do; --table prints the backbones and their costs")
    print("\n".join(table()))


def table() -> Iterator[str]:
    """The backbones, one a line, under a heading."""
    yield ROW.format(*HEADER).rstrip()
    for name, size in SIZES.items():
        count = size.count()
        params, printed_params, params_differ = _beside(count.total.params / 1e6, size.params)
        cost, printed_cost, cost_differs = _beside(UNITS[size.unit](count), size.cost)
        yield ROW.format(
            *(name, size.source, params, printed_params, params_differ),
            *(cost, size.unit, printed_cost, cost_differs, size.note),
        ).rstrip()


def _beside(counted: float, printed: int | float) -> tuple[str, str, str]:
    """What was counted, what is printed, and by how much of it they differ."""
    if not printed:
        return f"{counted:.1f}", "", ""
    return f"{counted:.1f}", f"{printed:g}", f"{counted / printed - 1:+.1%}"


if __name__ == "__main__":
    run_command(main, description=__doc__, add_flags=add_flags, in_workdir=False)
