"""One line of text opens a source, and a wrong line says what would be right."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from ldm_jax.data import SOURCES, Item, Skip, open_source
from ldm_jax.data.sources import digest, provenance, tally


@dataclasses.dataclass(frozen=True)
class Made:
    place: str
    count: int = 3
    share: float = 0.5
    sorted: bool = False

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return Item(str(index), np.zeros((16, 16, 3), np.uint8), ("a caption",))


@pytest.fixture(autouse=True)
def made(monkeypatch):
    monkeypatch.setitem(SOURCES, "made", f"{__name__}:Made")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("made:/photos", Made("/photos")),
        ("made:/photos?count=7", Made("/photos", count=7)),
        ("made:/p?share=1e-3&sorted=true&count=2", Made("/p", 2, 1e-3, True)),
        ("made:/p?sorted=False", Made("/p", sorted=False)),
        ("made:C:/p", Made("C:/p")),
        ("made:/00?.tar", Made("/00?.tar")),
        ("made:/00?.tar?count=4", Made("/00?.tar", 4)),
        ("made:?place=/p", Made("/p")),
    ],
)
def test_a_line_opens_what_it_says(spec, expected):
    assert open_source(spec) == expected


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("maid:/photos", ["'maid'", "folder, tfds, tars, scenes, made"]),
        ("made:/p?counts=7", ["'counts'", "place, count, share, sorted"]),
        ("made:/p?count=many", ["'many'", "count", "int"]),
        ("made:/p?count=1.5", ["'1.5'", "int"]),
        ("made:/p?sorted=yes", ["'yes'", "sorted", "bool"]),
        ("made", ["made", "place"]),
        ("/photos", ["'/photos'", "for files write folder:/photos"]),
        ("my/photos?caption=alt", ["for files write folder:my/photos?caption=alt"]),
        ("/data/{0..9}.tar", ["for files write tars:/data/{0..9}.tar"]),
        ("", ["''", "folder"]),
    ],
)
def test_a_wrong_line_is_refused_in_a_sentence_that_names_what_exists(spec, parts):
    with pytest.raises(ValueError) as error:
        open_source(spec)
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


def test_the_name_of_a_file_or_folder_that_is_there_is_told_its_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "a.tar").touch()
    for name, source in {"photos": "folder:photos", "a.tar": "tars:a.tar"}.items():
        with pytest.raises(ValueError, match=f"there are .*; for files write {source}$"):
            open_source(name)
    with pytest.raises(ValueError, match=r"there are folder, tfds, tars, scenes, made$"):
        open_source("pictures")


def test_the_scenes_are_a_source_like_any_other():
    source = open_source("scenes:full?count=5&seed=3")
    assert len(source) == 5
    item = source[4]
    assert item.image.shape == (64, 64, 3)
    assert item.image.dtype == np.uint8
    assert all(isinstance(caption, str) for caption in item.captions)


def test_provenance_has_the_options_and_the_number_of_items():
    assert provenance(open_source("made:/p?count=7")) == {
        "class": "Made",
        "place": "/p",
        "count": 7,
        "share": 0.5,
        "sorted": False,
        "items": 7,
        "identity": "",
    }


def test_the_digest_tells_listings_apart():
    listings = [[], ["a"], ["b"], ["a", "b"], ["b", "a"], ["ab"], ["a\udcff"]]
    assert len({digest(listing) for listing in listings}) == len(listings)


def test_a_tally_counts_the_keys_of_each_reason():
    assert tally({"no caption": ["a", "b"], ".heic": ["c"]}) == "2 no caption, 1 .heic"
    assert tally({}) == "none"


def test_a_skip_keeps_reason_and_key():
    skip = Skip("no caption", "a.jpg")
    assert (str(skip), skip.reason, skip.key) == ("no caption", "no caption", "a.jpg")


def test_naming_sources_imports_no_engine():
    heavy = ("grain", "tensorflow", "tensorflow_datasets", "PIL", "jax")
    code = f"import sys, ldm_jax.data; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
