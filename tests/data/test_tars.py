"""Tar shards in webdataset's layout, read at random."""

import io
import json
import pickle
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


def test_the_identity_changes_with_the_members(tmp_path):
    identities = set()
    for members in (sample(0), sample(1), {**sample(0), "s0.txt": b"longer caption"}):
        write_tar(tmp_path / "a.tar", members)
        identities.add(Tars(f"{tmp_path}/a.tar").identity)
    assert len(identities) == 3
