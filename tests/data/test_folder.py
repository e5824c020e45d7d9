"""A folder of images gives every image with the caption that stands beside it or in a metadata file."""

import errno
import json
import logging
import os
from unittest import mock

import pytest
from PIL import Image

from ldm_jax.data import Skip, open_source
from ldm_jax.data.captions import check_captions
from ldm_jax.data.folder import Folder
from ldm_jax.data.images import ENDINGS, to_square
from ldm_jax.data.sources import provenance


def put(path, data=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() in ENDINGS:
        Image.new("RGB", (16, 16)).save(path)
    else:
        path.write_bytes(data if isinstance(data, bytes) else data.encode())


def captions(folder):
    source = open_source(f"folder:{folder}")
    return {item.key: item.captions for item in (source[i] for i in range(len(source)))}


def skips(folder):
    """The reason for each item that is skipped, and all captions of the others."""
    source, found = open_source(f"folder:{folder}"), {}
    provenance(source)
    for index in range(len(source)):
        try:
            item = source[index]
        except Skip as skip:
            found[skip.key] = skip.reason
        else:
            found[item.key] = item.captions
    return found


def test_text_files_beside_images_are_their_captions(tmp_path):
    for name, text in {"b": "a cat\n", "a": "un café", "deep/down/c": "two\nlines"}.items():
        put(tmp_path / f"{name}.jpg")
        put(tmp_path / f"{name}.txt", text)
    assert captions(tmp_path) == {
        "a.jpg": ("un café",),
        "b.jpg": ("a cat\n",),
        "deep/down/c.jpg": ("two\nlines",),
    }


def test_items_are_in_the_order_of_their_names_whatever_the_disk_says(tmp_path):
    for name in ("z.png", "k/a.png", "a.JPG", "m.webp"):
        put(tmp_path / name)
    assert list(captions(tmp_path)) == ["a.JPG", "k/a.png", "m.webp", "z.png"]


def test_the_image_is_the_file_as_it_is(tmp_path):
    put(tmp_path / "a.png")
    assert Folder(str(tmp_path))[0].image == (tmp_path / "a.png").read_bytes()


def test_what_is_no_image_or_hidden_is_left_out(tmp_path):
    for name in ("a.png", "._a.png", "notes.md", "b.png.part", ".DS_Store"):
        put(tmp_path / name)
    assert list(captions(tmp_path)) == ["a.png"]


def test_hidden_folders_are_left_out_and_links_to_nowhere_skipped(tmp_path):
    put(tmp_path / "a.png")
    put(tmp_path / ".thumbs" / "b.png")
    (tmp_path / "c.png").symlink_to(tmp_path / "gone.png")
    source = open_source(f"folder:{tmp_path}")
    assert len(source) == 2 and source[0].key == "a.png"
    with pytest.raises(Skip, match="file cannot be read: No such file"):
        source[1]


@pytest.mark.parametrize("text", [7, [1, 2], {"en": "a cat"}])
def test_a_caption_that_is_no_text_is_skipped(tmp_path, text):
    put(tmp_path / "a.png")
    put(tmp_path / "metadata.jsonl", json.dumps({"file_name": "a.png", "text": text}))
    with pytest.raises(Skip, match="caption is no text"):
        open_source(f"folder:{tmp_path}")[0]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.csv", "text,file_name\na cat\n", r"csv:2: file_name is None"),
        ("metadata.csv", f"file_name,text\na.png,{'x' * 200_000}\n", r"csv:\d is no CSV"),
        ("metadata.jsonl", '{"file_name": 3, "text": "a cat"}', r"jsonl:1: file_name is 3"),
    ],
)
def test_metadata_that_names_no_file_is_refused_with_its_line(tmp_path, name, text, message):
    put(tmp_path / "a.png")
    put(tmp_path / name, text)
    with pytest.raises(ValueError, match=message):
        open_source(f"folder:{tmp_path}")


def test_a_jsonl_of_metadata_gives_captions_and_alternatives(tmp_path):
    for name in ("a.png", "in/b.png", "c.png"):
        put(tmp_path / name)
    put(tmp_path / "c.txt", "from a text file")
    rows = [
        {"file_name": "a.png", "text": "one", "height": 16},
        {"file_name": "in/b.png", "text": ["main", "other", "third"]},
    ]
    put(tmp_path / "metadata.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    assert captions(tmp_path) == {
        "a.png": ("one",),
        "in/b.png": ("main", "other", "third"),
        "c.png": ("from a text file",),
    }


def test_a_csv_of_metadata_names_files_below_its_own_folder(tmp_path):
    put(tmp_path / "train/x.png")
    put(tmp_path / "train/metadata.csv", 'text,file_name\n"a dog, running",x.png\n')
    assert captions(tmp_path) == {"train/x.png": ("a dog, running",)}


def test_the_column_of_captions_is_an_option(tmp_path):
    put(tmp_path / "x.png")
    put(tmp_path / "metadata.csv", "file_name,alt\nx.png,a tree\n")
    assert open_source(f"folder:{tmp_path}?caption=alt")[0].captions == ("a tree",)
    with pytest.raises(ValueError, match=r"metadata\.csv:2 has no 'text'; it has .*'alt'"):
        open_source(f"folder:{tmp_path}")


def test_broken_metadata_is_refused_with_its_line(tmp_path):
    put(tmp_path / "x.png")
    put(tmp_path / "metadata.jsonl", '{"file_name": "x.png", "text": "a"}\n{"file_name": \n')
    with pytest.raises(ValueError, match=r"metadata\.jsonl:2 is no JSON"):
        open_source(f"folder:{tmp_path}")


def test_a_listed_file_that_is_missing_is_skipped_by_name(tmp_path):
    put(tmp_path / "x.png")
    put(tmp_path / "metadata.jsonl", '{"file_name": "gone.png", "text": "a"}\n')
    source = Folder(str(tmp_path))
    with pytest.raises(Skip, match="file cannot be read: No such file") as skip:
        source[0]
    assert skip.value.key == "gone.png"


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        (None, "no caption"),
        (b"", "empty caption"),
        (b"x" * 10_000, "caption longer than 4000 characters"),
        (b"caf\xe9", "caption is not UTF-8"),
    ],
)
def test_a_bad_caption_is_found_out(tmp_path, caption, reason):
    put(tmp_path / "x.png")
    if caption is not None:
        put(tmp_path / "x.txt", caption)
    with pytest.raises(Skip, match=f"^{reason}$"):
        check_captions(Folder(str(tmp_path))[0].captions)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata_that_is_not_utf_8_spoils_only_its_own_row(tmp_path, name):
    put(tmp_path / "x.png")
    put(tmp_path / "y.png")
    rows = {
        "metadata.jsonl": b'{"file_name": "x.png", "text": "\xff"}\n{"file_name": "y.png", "text": "y"}',
        "metadata.csv": b"file_name,text\nx.png,\xff\ny.png,y\n",
    }
    put(tmp_path / name, rows[name])
    found = captions(tmp_path)
    assert check_captions(found["y.png"]) == ("y",)
    with pytest.raises(Skip, match="not UTF-8"):
        check_captions(found["x.png"])


@pytest.mark.parametrize("text", ["null", "[]"])
def test_metadata_without_a_caption_is_no_caption(tmp_path, text):
    put(tmp_path / "x.png")
    put(tmp_path / "metadata.jsonl", f'{{"file_name": "x.png", "text": {text}}}')
    assert captions(tmp_path) == {"x.png": ()}


def test_the_identity_changes_with_the_files_and_only_then(tmp_path):
    put(tmp_path / "a.png")
    put(tmp_path / "a.txt", "one")
    identities = [Folder(str(tmp_path)).identity]
    os.utime(tmp_path / "a.png", (0, 0))
    assert Folder(str(tmp_path)).identity == identities[0]
    put(tmp_path / "b.png")
    identities.append(Folder(str(tmp_path)).identity)
    put(tmp_path / "a.txt", "more")
    identities.append(Folder(str(tmp_path)).identity)
    for text in ("one", "two"):
        put(tmp_path / "metadata.csv", f"file_name,text\na.png,{text}\n")
        identities.append(Folder(str(tmp_path)).identity)
    assert len(set(identities)) == len(identities)


def test_no_folder_and_no_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        open_source(f"folder:{tmp_path}/none")
    with pytest.raises(ValueError, match=r"holds no image \(\.jpg"):
        open_source(f"folder:{tmp_path}")


def test_images_of_every_known_ending_are_items_that_can_be_read(tmp_path):
    for ending in ENDINGS:
        put(tmp_path / f"{ending[1:]}{ending}")
        put(tmp_path / f"{ending[1:]}{ending.upper()}")
    source = open_source(f"folder:{tmp_path}")
    assert len(source) == 2 * len(ENDINGS)
    assert {to_square(source[index].image, 16).max() for index in range(len(source))} == {0}


def test_what_is_left_out_is_named_and_said(tmp_path, caplog):
    names = ("in/a.png", "listed.dat", "b.heic", "in/c.HEIC", "README", ".hidden.heic")
    for name in (*names, "in/a.txt", "in/a.png.txt", "listed.txt"):
        put(tmp_path / name)
    put(tmp_path / "metadata.csv", "file_name,text\nlisted.dat,no ending of an image\n")
    (tmp_path / "in" / "linked").symlink_to(tmp_path)
    with caplog.at_level(logging.INFO, "ldm_jax"):
        source = open_source(f"folder:{tmp_path}")
    assert source.left_out == {
        ".heic": ["b.heic", "in/c.HEIC"],
        ".txt without image": ["in/a.png.txt"],
        "file without ending": ["README"],
        "linked folder": ["in/linked"],
    }
    assert f"left out of {tmp_path}: 2 .heic, 1 .txt without image, 1 file" in caplog.text
    assert [source[0].key, source[1].key] == ["in/a.png", "listed.dat"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    put(tmp_path / "a.png")
    put(tmp_path / "closed" / "b.png")
    scan = os.scandir

    def closed(path):
        if os.path.basename(path) == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scan(path)

    with mock.patch("os.scandir", closed):
        source = Folder(str(tmp_path))
        assert source.left_out == {"folder that cannot be read": ["closed"]}


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    put(tmp_path / "a.heic")
    with pytest.raises(ValueError, match=r"left out: 1 \.heic"):
        Folder(str(tmp_path))
    with pytest.raises(ValueError, match=r"a\.heic is a file; give the folder"):
        Folder(str(tmp_path / "a.heic"))


def test_only_regular_files_inside_the_folder_are_read(tmp_path):
    folder, outside = tmp_path / "in", tmp_path / "secret.txt"
    for name in ("a.png", "b.png", "c.png", "d.png"):
        put(folder / name)
    put(outside, "a secret")
    put(tmp_path / "x.png")
    for name in ("a.txt", "link.png"):
        (folder / name).symlink_to(outside)
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "inside.png").symlink_to(folder / "c.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "far").symlink_to(tmp_path)
    for name in ("pipe.png", "b.txt"):
        os.mkfifo(folder / name)
    names = ("../x.png", str(outside), "far/x.png", "", str(folder / "d.png"))
    rows = [{"file_name": name, "text": "named"} for name in names]
    put(folder / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    assert skips(folder) == {
        "a.txt": "file outside the folder",
        "b.txt": "not a regular file",
        "c.png": (),
        "d.png": ("named",),
        "inside.png": (),
        "link.png": "file outside the folder",
        "loop.png": f"file cannot be read: {os.strerror(errno.ELOOP)}",
        "pipe.png": "not a regular file",
        "zero.png": "file outside the folder",
        "../x.png": "file outside the folder",
        "../secret.txt": "file outside the folder",
        "far/x.png": "file outside the folder",
        ".": "not a regular file",
    }


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_metadata_that_is_a_pipe_or_outside_the_folder_is_refused(tmp_path, name):
    put(tmp_path / "in" / "a.png")
    put(tmp_path / "outside", "file_name,text\na.png,a secret\n")
    (tmp_path / "in" / name).symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match=f"{name} cannot be used: file outside the folder"):
        Folder(str(tmp_path / "in"))
    os.unlink(tmp_path / "in" / name)
    os.mkfifo(tmp_path / "in" / name)
    with pytest.raises(ValueError, match=f"{name} cannot be used: not a regular file"):
        Folder(str(tmp_path / "in"))


def test_a_name_that_no_file_can_have_costs_its_own_row_only(tmp_path):
    for name in ("b.png", os.fsdecode(b"caf\xe9.png"), os.fsdecode(b"d\xe9/c.png")):
        put(tmp_path / name)
    put(tmp_path / os.fsdecode(b"d\xe9/metadata.csv"), "file_name,text\nc.png,x\n")
    names = ("\ud800.png", "a\0.png", "n" * 300, "b.png")
    rows = [{"file_name": name, "text": "a caption"} for name in names]
    put(tmp_path / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    assert skips(tmp_path) == {
        "b.png": ("a caption",),
        "caf\udce9.png": "name is not UTF-8",
        "d\udce9/c.png": "name is not UTF-8",
        "\ud800.png": "name is not UTF-8",
        "a\0.png": "NUL in name",
        "n" * 300: f"file cannot be read: {os.strerror(errno.ENAMETOOLONG)}",
    }


@pytest.mark.parametrize("depth", [300, 700, 900, 950, 980, 1000, 100_000])
def test_json_of_any_depth_costs_its_own_image_only(tmp_path, depth):
    put(tmp_path / "a.png")
    put(tmp_path / "b.png")
    deep = "[" * depth + "]" * depth
    rows = [f'{{"file_name": "a.png", "text": {deep}}}', '{"file_name": "b.png", "text": "x"}']
    put(tmp_path / "metadata.jsonl", "\n".join(rows))
    found = skips(tmp_path)
    assert found.pop("b.png") == ("x",)
    assert found in (
        {"a.png": "caption is no text"},
        {"a.png": (), "metadata.jsonl:1": "JSON nested too deeply"},
    )


def test_every_row_for_an_image_adds_its_captions(tmp_path):
    put(tmp_path / "s" / "a.png")
    put(tmp_path / "metadata.csv", "file_name,text\ns/a.png,one\n./s/a.png,two\ns/a.png\n")
    put(tmp_path / "metadata.jsonl", '{"file_name": "s/../s/a.png", "text": ["three", "four"]}')
    put(tmp_path / "s" / "metadata.csv", "file_name,text\na.png,five\n")
    assert captions(tmp_path) == {"s/a.png": ("one", "two", "three", "four", "five")}


def test_a_byte_order_mark_is_no_part_of_a_caption_or_of_metadata(tmp_path):
    for name in ("a/a.png", "b/b.png", "c/c.png"):
        put(tmp_path / name)
    put(tmp_path / "a" / "a.txt", "\ufeffa red cat")
    put(tmp_path / "b" / "metadata.csv", "\ufefffile_name,text\nb.png,a red cat\n")
    put(tmp_path / "c" / "metadata.jsonl", '\ufeff{"file_name": "c.png", "text": "a red cat"}\n')
    assert set(captions(tmp_path).values()) == {("a red cat",)}
