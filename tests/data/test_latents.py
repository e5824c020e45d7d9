"""Records survive packing, and a manifest refuses what does not belong together."""

import dataclasses
import json
import os

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from ldm_jax.data.latents import (
    Autoencoder,
    Manifest,
    Record,
    Shard,
    open_records,
    pack,
    shard_name,
    unpack,
)


def record(number, text=False):
    rng = np.random.default_rng(number)
    embedded = {
        "tokens": rng.normal(size=(2, 3, 5)).astype(np.float16),
        "mask": rng.random((2, 3)) < 0.5,
    }
    return Record(
        key=f"k/{number}.jpg",
        latents=rng.normal(size=(2, 4, 3)).astype(np.float16),
        captions=("un café", f"caption {number}"),
        text=embedded if text else None,
    )


def assert_same(a, b):
    assert (a.key, a.captions) == (b.key, b.captions)
    np.testing.assert_array_equal(a.latents, b.latents)
    assert a.latents.dtype == b.latents.dtype == np.float16
    assert (a.text is None) == (b.text is None)
    for name in a.text or ():
        np.testing.assert_array_equal(a.text[name], b.text[name])
        assert a.text[name].dtype == b.text[name].dtype


@pytest.fixture
def directory(tmp_path):
    """Three shards of 2, 0 and 3 records."""
    shards = []
    for number, records in enumerate((range(2), range(0), range(2, 5))):
        path = tmp_path / f"latents-{number:05d}.array_record"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for each in records:
            writer.write(pack(record(each)))
        writer.close()
        shards.append(Shard(path.name, len(records), path.stat().st_size))
    manifest(tuple(shards)).write(tmp_path)
    return tmp_path


def manifest(shards):
    return Manifest(
        version=1,
        source={"class": "Folder", "path": "/photos", "items": 6, "identity": "abc"},
        size=16,
        read=6,
        written=5,
        skipped={"no caption": ["x.jpg"]},
        latent_shape=(2, 4, 3),
        latent_mean=(0.1, 0.2, 0.3),
        latent_std=(1.0, 1.1, 0.9),
        autoencoder=Autoencoder("abcd", 0.0, 0.18215),
        text_encoder="",
        shards=shards,
    )


@pytest.mark.parametrize("text", [False, True])
def test_a_record_survives_packing(text):
    assert_same(unpack(pack(record(7, text))), record(7, text))


def test_records_of_all_shards_are_one_sequence(directory):
    records = open_records(directory, Manifest.read_from(directory).shards)
    assert len(records) == 5
    for index in (4, 0, 2, 1, 3):
        assert_same(unpack(records[index]), record(index))


def test_a_manifest_survives_writing(directory):
    read = Manifest.read_from(directory)
    assert read == manifest(read.shards)
    assert read == Manifest.read_from(str(directory))


def test_an_unfinished_directory_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"has no manifest\.json: encoding into it was not finished"
    ):
        Manifest.read_from(tmp_path)


def test_another_version_is_refused(directory):
    newer = dataclasses.replace(Manifest.read_from(directory), version=99)
    newer.write(directory)
    with pytest.raises(ValueError, match="version 99, not 1"):
        Manifest.read_from(directory)


@pytest.mark.parametrize("left", [None, 100])
def test_a_shard_that_is_missing_or_cut_short_is_named(directory, left):
    path = directory / "latents-00002.array_record"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:left])
    if left is None:
        path.unlink()
    has = f"latents-00002.array_record has {left or 0} bytes where the manifest says {size}"
    with pytest.raises(ValueError, match=has):
        Manifest.read_from(directory)


def edit(directory, change):
    """Changes the manifest's JSON, given as a dict with its shards as a list."""
    path = directory / "manifest.json"
    fields = json.loads(path.read_text())
    change(fields, fields["shards"])
    path.write_text(json.dumps(fields))


def change_counts(fields, shards):
    shards[0]["records"], shards[1]["records"] = 1, 1


def swap_counts(fields, shards):
    shards[0]["records"], shards[2]["records"] = 3, 2


def name_twice(fields, shards):
    shards[2] = shards[0]


def swap_names(fields, shards):
    shards[0]["name"], shards[2]["name"] = shards[2]["name"], shards[0]["name"]


def leave_out(fields, shards):
    del shards[1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda fields, shards: shards[0].update(records=1), r"add up to 4, not to 5"),
        (lambda fields, shards: fields.update(written=4), r"shards\.records add up to 5, not to 4"),
        (lambda fields, shards: fields["skipped"].clear(), r"skipped add up to 5, not to 6"),
        (change_counts, r"latents-00000\.array_record has 2 records where the manifest says 1"),
        (swap_counts, r"latents-00000\.array_record has 2 records where the manifest says 3"),
        (
            name_twice,
            r"names latents-00000\.array_record where latents-00002\.array_record belongs",
        ),
        (
            swap_names,
            r"names latents-00002\.array_record where latents-00000\.array_record belongs",
        ),
        (leave_out, r"names latents-00002\.array_record where latents-00001\.array_record belongs"),
        (lambda fields, shards: shards.reverse(), "its shards were reordered"),
        (lambda fields, shards: shards.pop(), r"add up to 2, not to 5"),
        (lambda fields, shards: shards[0].update(name="../x"), "its shards were reordered"),
    ],
)
def test_a_manifest_that_was_changed_is_refused(directory, change, says):
    edit(directory, change)
    with pytest.raises(ValueError, match=says):
        Manifest.read_from(directory)


def test_files_that_changed_places_are_refused_where_their_sizes_agree(tmp_path):
    shards = []
    for number in range(2):
        path = tmp_path / shard_name(number)
        writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        for each in (2 * number, 2 * number + 1):
            writer.write(pack(record(each)))
        writer.close()
        shards.append(Shard(path.name, 2, path.stat().st_size, f"k/{2 * number}.jpg"))
    assert shards[0].bytes == shards[1].bytes
    sums = {"read": 5, "written": 4}
    dataclasses.replace(manifest(tuple(shards)), **sums).write(tmp_path)
    assert Manifest.read_from(tmp_path).shards == tuple(shards)
    os.rename(tmp_path / shard_name(0), tmp_path / "aside")
    os.rename(tmp_path / shard_name(1), tmp_path / shard_name(0))
    os.rename(tmp_path / "aside", tmp_path / shard_name(1))
    with pytest.raises(ValueError, match=r"begins with 'k/2\.jpg' where .* says 'k/0\.jpg'"):
        Manifest.read_from(tmp_path)


def test_a_shard_with_damaged_bytes_is_named(directory):
    path = directory / shard_name(0)
    path.write_bytes(os.urandom(path.stat().st_size))
    with pytest.raises(ValueError, match=r"latents-00000\.array_record is damaged: "):
        Manifest.read_from(directory)


def test_a_manifest_from_before_first_keys_is_read(directory):
    edit(directory, lambda fields, shards: [shard.pop("first_key") for shard in shards])
    assert len(open_records(directory, Manifest.read_from(directory).shards)) == 5


@pytest.mark.parametrize(
    "content", [b"5", b"null", b"[]", b'"x"', b"", b"{", b'{"version": 1\xff}', b"[" * 100_000]
)
def test_a_file_that_is_no_manifest_is_named(directory, content):
    (directory / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"^\S+/manifest\.json is damaged, [^\n]+$"):
        Manifest.read_from(directory)


def test_an_empty_object_is_of_no_version(directory):
    (directory / "manifest.json").write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"manifest\.json is of version None, not 1"):
        Manifest.read_from(directory)


def test_a_bucket_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match="mount the bucket"):
        Manifest.read_from("gs://bucket/latents")


def test_latents_of_another_autoencoder_are_refused():
    latents = manifest(())
    latents.require(autoencoder="abcd")
    with pytest.raises(
        ValueError, match="latents were made by the encoder abcd, and this run has efgh"
    ):
        latents.require(autoencoder="efgh")


def test_embeddings_of_another_text_encoder_are_refused():
    latents = dataclasses.replace(manifest(()), text_encoder="t5")
    latents.require(autoencoder="abcd", text_encoder="t5")
    with pytest.raises(ValueError, match="text embeddings were made by the encoder t5"):
        latents.require(autoencoder="abcd", text_encoder="clip")
    with pytest.raises(ValueError, match="none stored"):
        manifest(()).require(autoencoder="abcd", text_encoder="clip")
