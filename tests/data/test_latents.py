"""Records survive packing, and a manifest refuses what does not belong together."""

import dataclasses

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from ldm_jax.data.latents import Autoencoder, Manifest, Record, Shard, open_records, pack, unpack


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
        path = tmp_path / f"latents-{number}.array_record"
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
    path = directory / "latents-2.array_record"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:left])
    if left is None:
        path.unlink()
    has = f"latents-2.array_record has {left or 0} bytes where the manifest says {size}"
    with pytest.raises(ValueError, match=has):
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
