"""Pairs of images and the images that they should be, by the names of both."""

import os
import re
from collections.abc import Sequence

Parts = tuple[str | int, ...]


def pair_by_name(names: Sequence[str], others: Sequence[str]) -> list[int]:
    """Returns for each name the number of the one among `others` that it belongs to.

    Names are compared without their endings, then by the parts in which the names of one side differ from each other,
    numbers as numbers: 1.png belongs to 001.png, and cat_fake.png to cat_real.png.

    Raises:
      ValueError: the names of one side are not those of the other; it names some that stand alone.
    """
    for reduce in (_without_endings, _differing_parts):
        mine, theirs = reduce(names), reduce(others)
        place = {key: number for number, key in enumerate(theirs)}
        if len(place) == len(set(mine)) == len(mine) and set(mine) == set(place):
            return [place[key] for key in mine]
    alone = [name for name, key in zip(names, mine, strict=True) if key not in place]
    unused = [name for name, key in zip(others, theirs, strict=True) if key not in set(mine)]
    raise ValueError(
        f"--images and --truth are paired by their names, which do not match: {_some(alone or names)} of --images,"
        f" {_some(unused or others)} of --truth; name the files alike, such as 1.png and 001.png"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _without_endings(names: Sequence[str]) -> list[str]:
    return [os.path.splitext(name)[0] for name in names]


def _differing_parts(names: Sequence[str]) -> list[Parts]:
    """Words and numbers of each name, without those that all names have in the same place."""
    rows = [
        tuple(
            int(part) if part.isdecimal() else part for part in re.findall(r"\d+|[^\W\d_]+", name)
        )
        for name in _without_endings(names)
    ]
    if len({len(row) for row in rows}) > 1:
        return rows
    differ = [len(set(column)) > 1 for column in zip(*rows, strict=True)]
    return [tuple(part for part, kept in zip(row, differ, strict=True) if kept) for row in rows]
