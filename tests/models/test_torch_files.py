"""Files of torch.save, read beside torch; and files that would have something run."""

import collections
import copy
import importlib.util
import os
import pickle
import re
import runpy
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from specimens import outputs_of

from ldm_jax.models import torch_files

FORMS = ("archive.pth", "stream.pth")


@pytest.fixture(scope="module", params=["committed", "live"])
def written_by_torch(request, goldens, tmp_path_factory):
    """A directory of both forms; with the extra `parity`, a new one too."""
    if request.param == "committed":
        return goldens / "torch_files"
    pytest.importorskip("torch")
    directory = tmp_path_factory.mktemp("live")
    runpy.run_path(str(goldens / "make_torch_file_goldens.py"))["write"](directory, seed=1)
    return directory


@pytest.mark.parametrize("form", FORMS)
def test_every_tensor_is_what_it_was_for_torch(written_by_torch, form):
    given, expected = torch_files.read(written_by_torch / form), outputs_of(written_by_torch)
    assert given.keys() == expected.keys()
    for key, tensor in given.items():
        assert tensor.dtype == ("bfloat16" if key == "bfloat16" else expected[key].dtype), key
        np.testing.assert_array_equal(tensor.astype(expected[key].dtype), expected[key], key)


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_a_file_that_was_released_in_2018_is_read_as_torch_reads_it(net):
    torch = pytest.importorskip("torch")
    package = Path(importlib.util.find_spec("lpips").origin).parent
    file = package / "weights" / "v0.1" / f"{net}.pth"
    theirs = torch.load(file, map_location="cpu", weights_only=True)
    ours = torch_files.read(file)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[key].numpy())


def test_torch_is_not_imported(goldens):
    program = "import sys; from ldm_jax.models import torch_files as t; t.read(sys.argv[1]);"
    program += "sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program, goldens / "torch_files" / FORMS[0]], check=True)


class Runs:
    """Unpickled, it makes a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write(path, form, content):
    """A file whose dict of tensors is `content`; or the pickle that `content` is."""
    pickled = content if isinstance(content, bytes) else pickle.dumps(content, protocol=2)
    if form == "archive.pth":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", pickled)
    else:
        before, after = (torch_files.MAGIC, 1001, {}), ([],)
        parts = [[pickle.dumps(part, protocol=2) for part in side] for side in (before, after)]
        path.write_bytes(b"".join([*parts[0], pickled, *parts[1]]))


@pytest.mark.parametrize("form", FORMS)
def test_nothing_that_a_file_asks_for_is_run(tmp_path, form):
    write(tmp_path / form, form, {"weight": Runs(tmp_path / "made")})
    with pytest.raises(ValueError, match=rf"{form} is not a dict of tensors.*: it asks for posix"):
        torch_files.read(tmp_path / form)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([1, 2], "it holds a list"),
        ({"model": {}}, "'model' is a dict"),
        (collections.OrderedDict(epoch=3), "'epoch' is a int"),
        ({"dtype": np.dtype("f")}, "it asks for numpy.dtype"),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_no_tensor_is_named(tmp_path, form, content, sentence):
    write(tmp_path / form, form, content)
    with pytest.raises(ValueError, match=f"{form} is not a dict of tensors .*: {sentence}"):
        torch_files.read(tmp_path / form)


def refusal(path):
    """The sentence of the error, and the memory in bytes that it took to come to it."""
    tracemalloc.start()
    with pytest.raises(ValueError) as error:
        torch_files.read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return str(error.value), peak


NEST = b"\x80\x02})" + b"\x85" * 2_000  # a dict, and a tuple in a tuple in a tuple ...
TWICE = b"\x80\x02})" + b"".join(  # a tuple of two tuples that each are one tuple twice, and so on
    b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60)
)
HOSTILE = {
    "a name of 2,000 tuples": (NEST + b"Ns.", "it has a tuple for a name"),
    "a name of 2^60 tuples": (TWICE + b"Ns.", "it has a tuple for a name"),
    "a storage of 2^60 tuples": (TWICE + b"X\x01\0\0\0aNNN\x85tQs.", ""),
    "a kind of 2^60 tuples": (TWICE.replace(b"}", b"}(") + b"NNNNtQ.", "it asks for something"),
    "place 2^29 in the memo": (b"\x80\x02]r\xff\xff\xff\x1f.", "it holds a list"),
    "a text of 4 GB": (b"\x80\x02}X\xff\xff\xff\xffa.", "expected 4294967295 bytes"),
    "a number of 2 GB": (b"\x80\x02}\x8b\xff\xff\xff\x7f.", "LONG4|not enough data"),
    "a frame of 1 TB": (b"\x80\x04\x95\0\0\0\0\0\1\0\0}", "pickle exhausted|it holds a list"),
    "items of a text": (b"\x80\x02X\x01\0\0\0aX\x01\0\0\0bNs.", "it sets items of a str"),
    "nothing to take": (b"\x80\x02s.", ""),
    "a tensor of no storage": (
        b"\x80\x02}X\x01\0\0\0actorch._utils\n_rebuild_tensor_v2\n(NK\0))tRs.",
        "a tensor without a storage",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("form", FORMS)
def test_no_pickle_takes_more_memory_than_its_length_allows(tmp_path, form, case):
    pickled, expected = HOSTILE[case]
    write(tmp_path / form, form, pickled)
    sentence, peak = refusal(tmp_path / form)
    assert f"{form} is not a dict of tensors as torch.save writes it: " in sentence
    assert re.search(expected, sentence)
    assert peak < 2 * torch_files.LONGEST


@pytest.mark.parametrize("form", FORMS)
def test_a_pickle_that_does_not_end_is_read_to_a_bound(tmp_path, form):
    write(tmp_path / form, form, b"\x80\x02" + b"}0" * torch_files.LONGEST)
    sentence, peak = refusal(tmp_path / form)
    assert "instruction POP, which no dict of tensors needs" in sentence
    assert peak < 20 * torch_files.LONGEST


def test_a_stream_that_promises_more_than_it_has_is_refused_before_it_is_read(goldens, tmp_path):
    whole = (goldens / "torch_files" / "stream.pth").read_bytes()
    at = whole.rindex(b"e.") + 2  # the last pickle is the list of storages
    (tmp_path / "stream.pth").write_bytes(whole[:at] + b"\0\0\0\0\1\0\0\0" + whole[at + 8 :])
    sentence, peak = refusal(tmp_path / "stream.pth")
    assert "bytes too soon" in sentence and peak < 2 * torch_files.LONGEST


def test_no_archive_expands_to_more_than_the_file(tmp_path):
    for name in ("data.pkl", "byteorder", "data/0"):
        with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("archive/data.pkl" if "/" in name else "archive/data/0", b"")
            file.writestr(f"archive/{name}", bytes(2**24))
        sentence, peak = refusal(tmp_path / "a.pth")
        assert "it is compressed, which no file of torch.save is" in sentence and peak < 2**20


def test_no_archive_has_the_same_bytes_many_times(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as file:
        file.writestr("archive/data.pkl", bytes(1000))
        file.filelist += [copy.copy(file.filelist[0]) for _ in range(9)]
    size = (tmp_path / "a.pth").stat().st_size
    assert f"it is to hold 10000 bytes, and has {size}" in refusal(tmp_path / "a.pth")[0]


def test_tensors_of_one_storage_share_its_bytes(goldens):
    for form in FORMS:
        tensors = torch_files.read(goldens / "torch_files" / form)
        assert np.may_share_memory(tensors["part"], tensors["transposed"])
        assert not np.may_share_memory(tensors["part"], tensors["half"])


@pytest.mark.parametrize("form", FORMS)
def test_a_file_cut_off_anywhere_is_refused(goldens, tmp_path, form):
    whole = (goldens / "torch_files" / form).read_bytes()
    path = tmp_path / form
    for length in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"{form} is not a dict of tensors"):
            torch_files.read(path)


def test_a_tensor_past_the_end_of_its_storage_is_refused(goldens, tmp_path):
    """Or memory would be read that is not the file's."""
    with zipfile.ZipFile(goldens / "torch_files" / FORMS[0]) as file:
        members = {name: file.read(name) for name in file.namelist()}
    for name in [name for name in members if "/data/" in name and members[name]]:
        with zipfile.ZipFile(tmp_path / "short.pth", "w") as file:
            for other, content in members.items():
                file.writestr(other, content[:-8] if other == name else content)
        with pytest.raises(ValueError, match=r"a tensor \[.*\] is not within its \d+ values"):
            torch_files.read(tmp_path / "short.pth")


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        torch_files.read(tmp_path / "none.pth")
