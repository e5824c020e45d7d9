import pytest

from ldm_jax import plan
from ldm_jax.flags import UsageError, parse
from ldm_jax.models.sizes import SIZES


def run(*words):
    plan.main(parse(words, add_flags=plan.add_flags, in_workdir=False))


def test_the_table_has_every_backbone_beside_what_is_printed_of_it(capsys):
    run("--table")
    _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == list(SIZES)
    (td4_4,) = (row.split() for row in rows if row.startswith("unet-sdxl-td4_4 "))
    assert td4_4[-4:] == ["143.0", "GMACs", "143", "-0.0%"]


def test_nothing_asked_for_is_said():
    with pytest.raises(UsageError, match="--table prints the backbones"):
        run()
