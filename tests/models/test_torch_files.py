"""Files of torch.save, read beside torch; and files that would have something run."""

import collections
import importlib.util
import os
import pickle
import runpy
import subprocess
import sys
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


def stream(content):
    parts = (torch_files.MAGIC, 1001, {}, content, [])
    return b"".join(pickle.dumps(part, protocol=2) for part in parts)


def archive(path, content):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))


def write(path, form, content):
    if form == "archive.pth":
        archive(path, content)
    else:
        path.write_bytes(stream(content))


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
