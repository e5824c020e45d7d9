"""Tar shards in webdataset's layout, read at random; what is damaged or unusable is never passed over in silence."""

import io
import json
import os
import pickle
import random
import tarfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from ldm_jax.data import Skip, open_source
from ldm_jax.data.images import ENDINGS
from ldm_jax.data.tars import Tars, expand


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def sample(number):
    return {f"s{number}.jpg": b"image %d" % number, f"s{number}.txt": b"caption %d" % number}


def test_members_of_one_name_are_one_sample(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        {
            "dir/0001.jpg": b"first image",
            "dir/0001.txt": b"first caption",
            "0002.json": json.dumps({"caption": "second", "width": 3}).encode(),
            "0002.cls": b"7",
            "0002.PNG": b"second image",
        },
    )
    source = open_source(f"tars:{tmp_path}/a.tar")
    assert [tuple(source[i]) for i in range(len(source))] == [
        ("a.tar/dir/0001", b"first image", ("first caption",)),
        ("a.tar/0002", b"second image", ("second",)),
    ]


def test_samples_of_many_tars_stand_in_order_and_are_read_at_random(tmp_path):
    for tar in range(3):
        members = [sample(10 * tar + i) for i in range(10)]
        write_tar(tmp_path / f"{tar:03d}.tar", {k: v for each in members for k, v in each.items()})
    source = open_source(f"tars:{tmp_path}/{{000..002}}.tar")
    assert len(source) == 30
    for index in (29, 0, 17, 17, 10):
        assert source[index].image == b"image %d" % index
    with ThreadPoolExecutor(8) as threads:
        items = list(threads.map(source.__getitem__, [*range(30)] * 5))
    assert [item.captions[0] for item in items] == [f"caption {i}" for i in range(30)] * 5
    assert pickle.loads(pickle.dumps(source))[5] == source[5]


def test_a_list_of_captions_in_json_is_the_main_one_and_alternatives(tmp_path):
    write_tar(tmp_path / "a.tar", {"x.jpg": b"i", "x.json": b'{"texts": ["one", "two"]}'})
    assert open_source(f"tars:{tmp_path}/a.tar?caption=texts")[0].captions == ("one", "two")
    assert open_source(f"tars:{tmp_path}/a.tar")[0].captions == ()


def test_images_of_every_known_ending_are_read_and_the_first_of_several(tmp_path):
    members = {f"{ending[1:]}{ending}": ending.encode() for ending in ENDINGS}
    write_tar(tmp_path / "a.tar", members | {"both.gif": b"2", "both.png": b"1"})
    source = Tars(f"{tmp_path}/a.tar")
    images = [ending.encode() for ending in ENDINGS]
    assert [source[index].image for index in range(len(source))] == [*images, b"1"]


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path):
    members = {"x.jpg": b"i", "x.txt": b"\xef\xbb\xbfa red cat"}
    members |= {"y.jpg": b"i", "y.json": b'\xef\xbb\xbf{"caption": "a red cat"}'}
    write_tar(tmp_path / "a.tar", members)
    source = Tars(f"{tmp_path}/a.tar")
    assert source[0].captions == source[1].captions == ("a red cat",)


def test_a_sample_without_a_caption_has_none(tmp_path):
    write_tar(tmp_path / "a.tar", {"x.jpg": b"i"})
    assert Tars(f"{tmp_path}/a.tar")[0].captions == ()


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"x.txt": b"a caption"}, "no image"),
        ({"x.jpg": b"i", "x.json": b"{"}, "JSON cannot be read"),
        ({"x.jpg": b"i", "x.json": b"[]"}, "JSON cannot be read"),
        ({"x.jpg": b"i", "x.json": b"[" * 100_000}, "JSON cannot be read"),
        ({"x.jpg": b"i", "x.json": b'{"caption": %s}' % (b"9" * 5000)}, "JSON cannot be read"),
        ({"x.jpg": b"i", "x.JPG": b"j", "x.txt": b"a caption"}, "two members of one name"),
        ({"x.jpg": b"i", "x.json": b'{"caption": 7}'}, "caption is no text"),
    ],
)
def test_a_sample_that_cannot_be_used_is_skipped_by_name(tmp_path, members, reason):
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(Skip) as skip:
        Tars(f"{tmp_path}/a.tar")[0]
    assert (skip.value.reason, skip.value.key) == (reason, "a.tar/x")


def test_patterns_count_and_match(tmp_path):
    for name in ("t-08.tar", "t-09.tar", "t-10.tar", "t-11.tar", "other.tar"):
        write_tar(tmp_path / name, sample(0))
    names = [f"{tmp_path}/t-{number}.tar" for number in ("08", "09", "10")]
    assert expand(f"{tmp_path}/t-{{08..10}}.tar") == names
    assert expand(f"{tmp_path}/t-0?.tar") == names[:2]
    assert expand(f"{tmp_path}/t-{{1..1}}{{0..1}}.tar") == [names[2], f"{tmp_path}/t-11.tar"]


def test_missing_files_and_other_formats_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file .*none\.tar"):
        open_source(f"tars:{tmp_path}/none.tar")
    write_tar(tmp_path / "a.tar.gz", sample(0), "w:gz")
    with pytest.raises(ValueError, match="uncompressed tar"):
        open_source(f"tars:{tmp_path}/a.tar.gz")
    write_tar(tmp_path / "empty.tar", {})
    with pytest.raises(ValueError, match="holds no sample"):
        open_source(f"tars:{tmp_path}/empty.tar")
    with pytest.raises(ValueError, match=r"not a regular file; .* write tars:FOLDER/\*\.tar"):
        open_source(f"tars:{tmp_path}")
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(ValueError, match=r"pipe\.tar is not a regular file"):
        open_source(f"tars:{tmp_path}/pipe.tar")


def test_the_identity_changes_with_the_members(tmp_path):
    identities = set()
    for members in (sample(0), sample(1), {**sample(0), "s0.txt": b"longer caption"}):
        write_tar(tmp_path / "a.tar", members)
        identities.add(Tars(f"{tmp_path}/a.tar").identity)
    assert len(identities) == 3


def items_and_skips(path):
    items, skips = [], []
    source = Tars(str(path))
    for index in range(len(source)):
        try:
            items.append(source[index])
        except Skip as skip:
            skips.append((skip.key, skip.reason))
    return items, skips


FORMATS = {
    "ustar": (tarfile.USTAR_FORMAT, "s"),
    "gnu": (tarfile.GNU_FORMAT, "é" * 80),
    "pax": (tarfile.PAX_FORMAT, "é" * 80),
}


@pytest.fixture(params=FORMATS)
def archive(request, tmp_path):
    """A tar of four samples in each format, with long names where it knows them, its members and its bytes."""
    path = tmp_path / "a.tar"
    kind, stem = FORMATS[request.param]
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in [pair for n in range(4) for pair in sample(n).items()]:
            info = tarfile.TarInfo(stem + name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    assert len(items_and_skips(path)[0]) == 4
    return path, members, path.read_bytes()


def test_a_flipped_bit_of_a_header_loses_no_sample_in_silence(archive):
    path, members, whole = archive
    headers = [m.offset for m in members] + [m.offset_data - tarfile.BLOCKSIZE for m in members]
    rng = random.Random(0)
    for _ in range(150):
        byte, bit = rng.choice(headers) + rng.randrange(tarfile.BLOCKSIZE), rng.randrange(8)
        flipped = bytearray(whole)
        flipped[byte] ^= 1 << bit
        path.write_bytes(flipped)
        try:
            items, skips = items_and_skips(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:  # a bit of the checksum's padding
            assert (len(items), skips) == (4, [])


def test_a_tar_that_is_cut_anywhere_is_refused(archive):
    path, members, whole = archive
    size = members[-1].offset_data + tarfile.BLOCKSIZE  # without the zeros that end it
    random_places = random.Random(0).sample(range(size), 50)
    for cut in [
        *(member.offset for member in members),
        size,
        size + tarfile.BLOCKSIZE - 1,
        *random_places,
    ]:
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"a\.tar cannot be read as an uncompressed tar"):
            Tars(str(path))
    path.write_bytes(whole[: size + tarfile.BLOCKSIZE])  # one block of zeros tells the end
    assert len(Tars(str(path))) == 4


@pytest.mark.parametrize("size", [1, 512, 5120])
@pytest.mark.parametrize("kind", ["noise", "zeros"])
def test_what_stands_between_members_or_replaces_them_is_refused(archive, kind, size):
    path, members, whole = archive
    junk = random.Random(0).randbytes(size) if kind == "noise" else bytes(size)
    first, last = members[2].offset, members[-1].offset
    for damaged in (whole[:first] + junk + whole[first:], whole[:first] + junk + whole[last:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged at byte|goes on after byte|cut short"):
            Tars(str(path))


def test_an_unfinished_copy_that_was_filled_with_zeros_is_refused(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, sample(0) | sample(1))
    os.truncate(path, 2 * tarfile.BLOCKSIZE)
    os.truncate(path, 2**40)  # a hole of 1 TB
    with pytest.raises(ValueError, match="zeros may have replaced a part of it"):
        Tars(str(path))


def test_two_tars_in_one_file_are_refused_not_half_read(tmp_path):
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", sample(number))
    both = (tmp_path / "0.tar").read_bytes() + (tmp_path / "1.tar").read_bytes()
    (tmp_path / "both.tar").write_bytes(both)
    with pytest.raises(ValueError, match="give each as a file of its own"):
        Tars(f"{tmp_path}/both.tar")


def test_all_damaged_tars_are_named_at_once(tmp_path):
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", sample(number))
        if number != 1:
            os.truncate(tmp_path / f"{number}.tar", 1024)
    with pytest.raises(ValueError, match=r"0\.tar cannot .*; \S*2\.tar cannot ") as error:
        Tars(f"{tmp_path}/*.tar")
    assert "1.tar" not in str(error.value)


def test_a_negative_size_ends_in_a_sentence(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, sample(0) | sample(1))
    data = bytearray(path.read_bytes())
    start = 2 * tarfile.BLOCKSIZE
    data[start + 124 : start + 136] = (-1024).to_bytes(12, "big", signed=True)
    data[start + 148 : start + 156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"the size of 's0\.txt' is negative"):
        Tars(str(path))


def test_members_without_bytes_of_their_own_are_skipped_and_hard_links_are_followed(tmp_path):
    path = tmp_path / "a.tar"

    def add(name, kind=tarfile.REGTYPE, data=b"", **fields):
        info = tarfile.TarInfo(name)
        info.type, info.size = kind, len(data)
        for field, value in fields.items():
            setattr(info, field, value)
        tar.addfile(info, io.BytesIO(data))

    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        add("folder.d", tarfile.DIRTYPE)
        for stem in ("good", "hole", "hard", "lost", "soft", "pipe", "twin"):
            add(f"{stem}.txt", data=stem.encode())
        add("good.png", data=b"image")
        add("hole.png", data=b"1\n0\n0\n".ljust(512, b"\0"), pax_headers=SPARSE)
        add("hard.png", tarfile.LNKTYPE, linkname="good.png")
        add("lost.png", tarfile.LNKTYPE, linkname="none.png")
        add("soft.png", tarfile.SYMTYPE, linkname="good.png")
        add("pipe.png", tarfile.FIFOTYPE)
        add("twin.png", data=b"first")
        add("twin.png", data=b"second")
    items, skips = items_and_skips(path)
    assert [tuple(item) for item in items] == [
        ("a.tar/good", b"image", ("good",)),
        ("a.tar/hard", b"image", ("hard",)),
    ]
    assert skips == [
        ("a.tar/hole", "sparse file"),
        ("a.tar/lost", "hard link to a file that is not in the tar"),
        ("a.tar/soft", "not a regular file"),
        ("a.tar/pipe", "not a regular file"),
        ("a.tar/twin", "two members of one name"),
    ]


SPARSE = {
    "GNU.sparse.major": "1",
    "GNU.sparse.minor": "0",
    "GNU.sparse.name": "hole.png",
    "GNU.sparse.realsize": str(2**40),
}


def test_a_member_that_is_too_large_to_read_is_skipped(tmp_path):
    path = tmp_path / "a.tar"
    info = tarfile.TarInfo("x.png")
    info.size = 2**40
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT))
    os.truncate(path, 2**40 + 1536)  # its bytes and the end are a hole in the file
    assert items_and_skips(path) == ([], [("a.tar/x", "file of more than 1024 MiB")])


def test_a_tar_that_is_cut_after_it_was_opened_gives_no_half_caption(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, sample(0))
    source = Tars(str(path))
    os.truncate(path, 3 * tarfile.BLOCKSIZE + 4)
    with pytest.raises(Skip, match="the tar was cut short"):
        source[0]


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    mark = "\ufeff".encode()
    text = {"x.jpg": b"i", "x.txt": mark + b"a cat"}
    write_tar(tmp_path / "a.tar", text | {"y.jpg": b"i", "y.json": mark + b'{"caption": "a dog"}'})
    items, _ = items_and_skips(tmp_path / "a.tar")
    assert [item.captions for item in items] == [("a cat",), ("a dog",)]
