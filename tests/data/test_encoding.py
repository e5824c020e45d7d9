"""Encoding gives the same records whatever happens on the way, and says what it could not use."""

import dataclasses
import errno
import io
import json
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from ldm_jax.data import Item, Skip, open_source
from ldm_jax.data.encoding import Limits, TextEncoder, encode
from ldm_jax.data.images import to_square
from ldm_jax.data.latents import Autoencoder, Manifest, open_records, unpack
from ldm_jax.types import Cond

AUTOENCODER = Autoencoder("abcd", 0.0, 1.0)
SIZE = 16


def pool(images):
    """A stand-in for an autoencoder: means over 8 x 8 pixels, and their brightness as a fourth channel."""
    rows, side = len(images), images.shape[1] // 8
    means = np.asarray(images).reshape(rows, side, 8, side, 8, 3).mean((2, 4))
    return np.concatenate([means, means.mean(-1, keepdims=True)], -1)


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Noise with captions; every item at an index of `bad` cannot be used."""

    count: int = 23
    bad: tuple = ()
    seed: int = 0

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.bad:
            raise Skip("no caption", f"k{index}")
        rng = np.random.default_rng([self.seed, index])
        image = rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
        return Item(
            f"k{index}", image, tuple(f"caption {i} of {index}" for i in range(1 + index % 3))
        )


def run(source, directory, encoder=pool, **options):
    defaults = {"size": SIZE, "batch": 4, "items_per_shard": 10, "workers": 2, "progress": False}
    return encode(source, encoder, directory, autoencoder=AUTOENCODER, **defaults | options)


def records(directory):
    stored = open_records(directory, Manifest.read_from(directory).shards)
    return [stored[i] for i in range(len(stored))]


def test_every_item_becomes_its_latents_and_captions_in_order(tmp_path):
    run(Pictures(), tmp_path)
    stored = [unpack(data) for data in records(tmp_path)]
    assert [record.key for record in stored] == [f"k{i}" for i in range(23)]
    for index, record in enumerate(stored):
        item = Pictures()[index]
        assert record.captions == item.captions
        expected = pool(item.image[None] / 127.5 - 1)[0]
        np.testing.assert_allclose(record.latents, expected, atol=1e-3)  # float16


def test_the_manifest_tells_what_is_there(tmp_path):
    manifest = run(Pictures(bad=(3, 12)), tmp_path, limits=Limits(max_skipped=0.1))
    stored = np.stack([unpack(data).latents for data in records(tmp_path)]).astype(np.float64)
    assert (manifest.read, manifest.written, len(stored)) == (23, 21, 21)
    assert manifest.skipped == {"no caption": ["k3", "k12"]}
    assert [shard.records for shard in manifest.shards] == [9, 9, 3]
    assert manifest.latent_shape == (2, 2, 4)
    assert manifest.source["class"] == "Pictures"
    np.testing.assert_allclose(manifest.latent_mean, stored.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(manifest.latent_std, stored.std((0, 1, 2)), rtol=1e-9)


def test_the_records_do_not_depend_on_workers_or_shards(tmp_path):
    expected = None
    for workers, shard in ((1, 10), (7, 10), (3, 23), (2, 100)):
        directory = tmp_path / f"{workers}-{shard}"
        run(Pictures(bad=(5,)), directory, workers=workers, items_per_shard=shard)
        expected = expected or records(directory)
        assert records(directory) == expected


def test_the_encoder_sees_full_batches_only(tmp_path):
    shapes = set()

    def encoder(images):
        shapes.add(images.shape)
        assert images.dtype == np.float32
        assert images.min() >= -1
        assert images.max() <= 1
        return pool(images)

    run(Pictures(), tmp_path, encoder, batch=8)
    assert shapes == {(8, SIZE, SIZE, 3)}


def image_file(kind="JPEG", size=(32, 32)):
    file = io.BytesIO()
    Image.new("RGB", size, (10, 200, 90)).save(file, kind)
    return file.getvalue()


BAD = {
    "no caption": (image_file(), None),
    "empty caption": (image_file(), b" \n"),
    "caption longer than 4000 characters": (image_file(), b"x" * 10_000),
    "caption is not UTF-8": (image_file(), b"caf\xe9"),
    "NUL in caption": (image_file(), b"a \0 caption"),
    "truncated or unreadable image": (image_file(size=(200, 200))[:700], b"a caption"),
    "empty file": (b"", b"a caption"),
    "image smaller than 16 pixels": (image_file("PNG", (1, 1)), b"a caption"),
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_item_is_skipped_counted_and_listed(tmp_path, reason):
    photos = tmp_path / "photos"
    photos.mkdir()
    files = {f"{i}": (image_file(), b"a caption") for i in range(3)} | {"bad": BAD[reason]}
    for name, (image, caption) in files.items():
        (photos / f"{name}.jpg").write_bytes(image)
        if caption is not None:
            (photos / f"{name}.txt").write_bytes(caption)
    source = open_source(f"folder:{photos}")
    manifest = run(source, tmp_path / "latents", limits=Limits(max_skipped=0.25))
    assert manifest.skipped == {reason: ["bad.jpg"]}
    assert (manifest.read, manifest.written) == (4, 3)
    stored = [unpack(data) for data in records(tmp_path / "latents")]
    assert [record.key for record in stored] == ["0.jpg", "1.jpg", "2.jpg"]
    expected = pool(to_square(image_file(), SIZE)[None] / 127.5 - 1)[0]
    np.testing.assert_allclose(stored[0].latents, expected, atol=1e-3)


def test_a_folder_of_anything_is_encoded_with_a_manifest_of_all_that_is_not(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.jpg", "caf\udce9.jpg", "b.heic"):
        (photos / name).write_bytes(image_file())
    os.mkfifo(photos / "pipe.jpg")
    (photos / "linked").symlink_to(tmp_path)
    rows = [{"file_name": name, "text": "a caption"} for name in ("a.jpg", "\ud800", "../x")]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run(open_source(f"folder:{photos}"), tmp_path / "latents", limits=Limits(max_skipped=0.9))
    manifest = Manifest.read_from(tmp_path / "latents")
    assert [unpack(data).key for data in records(tmp_path / "latents")] == ["a.jpg"]
    assert {reason: len(keys) for reason, keys in manifest.skipped.items()} == {
        "file outside the folder": 1,
        "name is not UTF-8": 2,
        "not a regular file": 1,
    }
    assert manifest.left_out == {".heic": ["b.heic"], "linked folder": ["linked"]}


def test_too_many_bad_items_are_an_error_that_names_the_reasons(tmp_path):
    source = Pictures(bad=(1, 2, 15))
    message = (
        r"3 of 23 items .* allows a share of 0\.1; the commonest reasons: no caption \(3, such as "
    )
    with pytest.raises(ValueError, match=message):
        run(source, tmp_path, limits=Limits(max_skipped=0.1))
    with pytest.raises(ValueError, match="was not finished"):
        Manifest.read_from(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("latents-00000.*")}
    assert len(before) == 2
    assert run(source, tmp_path, limits=Limits(max_skipped=0.2)).written == 20
    assert before == {
        path.name: path.stat().st_mtime_ns for path in tmp_path.glob("latents-00000.*")
    }


def test_too_many_bad_items_stop_it_as_soon_as_that_is_certain(tmp_path):
    encoded = []
    source = Pictures(count=1000, bad=tuple(range(60)))
    with pytest.raises(ValueError, match="51 of 1000"):
        run(source, tmp_path, lambda images: encoded.append(0) or pool(images))
    assert not encoded


def test_a_source_of_bad_items_only_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="2 of 2 items cannot be used"):
        run(Pictures(count=2, bad=(0, 1)), tmp_path, limits=Limits(max_skipped=1.0))


def test_a_shard_of_bad_items_only_is_no_error(tmp_path):
    source = Pictures(bad=tuple(range(10, 20)))
    manifest = run(source, tmp_path, limits=Limits(max_skipped=0.5))
    assert [shard.records for shard in manifest.shards] == [10, 0, 3]
    assert [unpack(data).key for data in records(tmp_path)][-1] == "k22"


def test_an_encoding_that_is_stopped_anywhere_continues_to_the_same_records(tmp_path):
    run(Pictures(), tmp_path / "undisturbed")
    calls = 0

    class Stop(BaseException):
        pass

    def encoder(images):
        nonlocal calls
        calls += 1
        if calls == stop:
            raise Stop
        return pool(images)

    for stop in range(1, 9):
        calls, directory = 0, tmp_path / str(stop)
        try:
            run(Pictures(), directory, encoder)
        except Stop:
            finished = {p.name: p.stat().st_mtime_ns for p in directory.glob("*.json")}
            calls = -100
            run(Pictures(), directory, encoder)
            assert (
                finished.items()
                <= {p.name: p.stat().st_mtime_ns for p in directory.glob("*.json")}.items()
            )
        assert records(directory) == records(tmp_path / "undisturbed")
        assert not list(directory.glob("*.partial"))
    assert Manifest.read_from(directory) == Manifest.read_from(tmp_path / "undisturbed")


def test_a_shard_without_its_statistics_is_made_again(tmp_path):
    run(Pictures(), tmp_path)
    expected = records(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "latents-00001.json").unlink()
    (tmp_path / "latents-00001.array_record").write_bytes(b"half a shard")
    (tmp_path / "latents-00002.array_record.partial").write_bytes(b"half a shard")
    run(Pictures(), tmp_path)
    assert records(tmp_path) == expected


def test_what_is_finished_is_not_done_again(tmp_path):
    manifest = run(Pictures(), tmp_path)

    def encoder(images):
        raise AssertionError("encoded again")

    assert run(Pictures(), tmp_path, encoder) == manifest


@pytest.mark.parametrize(
    ("source", "options", "difference"),
    [
        (Pictures(seed=1), {}, "source.seed was 0, now 1"),
        (Pictures(count=22), {}, "source.items was 23, now 22"),
        (Pictures(), {"size": 32}, "size was 16, now 32"),
        (Pictures(), {"items_per_shard": 5}, "items_per_shard was 10, now 5"),
        (Pictures(), {"limits": Limits(max_caption=9)}, "max_caption was 4000, now 9"),
    ],
)
def test_another_job_in_the_same_directory_is_refused(tmp_path, source, options, difference):
    run(Pictures(), tmp_path)
    with pytest.raises(ValueError, match=difference):
        run(source, tmp_path, **options)


@pytest.mark.parametrize("name", ["settings.json", "manifest.json", "latents-00001.json"])
@pytest.mark.parametrize("content", [b"5", b"null", b"\xff", b"["])
def test_a_file_of_the_directory_that_holds_something_else_is_named(tmp_path, name, content):
    run(Pictures(), tmp_path)
    if name != "manifest.json":
        (tmp_path / "manifest.json").unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^{tmp_path}/{name} is damaged, "):
        run(Pictures(), tmp_path)


def test_statistics_of_another_program_are_named(tmp_path):
    run(Pictures(), tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "latents-00001.json").write_text('{"records": 7, "page": 3}')
    with pytest.raises(ValueError, match=r"latents-00001\.json is damaged, .* page is unknown"):
        run(Pictures(), tmp_path)


def test_a_key_that_is_no_text_is_skipped_and_can_be_printed(tmp_path):
    class Latin(Pictures):
        def __getitem__(self, index):
            if index == 4:
                raise Skip("no caption", "caf\udce9")
            item = super().__getitem__(index)
            return item._replace(key=f"\udce9{index}") if index == 3 else item

    manifest = run(Latin(), tmp_path, limits=Limits(max_skipped=0.1))
    assert manifest.skipped == {"name is not UTF-8": [r"\udce93"], "no caption": [r"caf\udce9"]}
    assert manifest.written == 21
    assert [shard.first_key for shard in manifest.shards] == ["k0", "k10", "k20"]


def test_another_autoencoder_in_the_same_directory_is_refused(tmp_path):
    run(Pictures(), tmp_path)
    with pytest.raises(ValueError, match=r"autoencoder\.fingerprint was 'abcd', now 'efgh'"):
        encode(Pictures(), pool, tmp_path, autoencoder=Autoencoder("efgh", 0.0, 1.0), size=SIZE)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_latents_that_are_not_finite_are_refused_by_name(tmp_path, value):
    def encoder(images):
        z = pool(images)
        z[2, 0, 0, 0] = value
        return z

    with pytest.raises(ValueError, match="latents of k2 are not finite in float16"):
        run(Pictures(), tmp_path, encoder)


def test_a_full_disk_is_one_sentence_and_loses_no_finished_shard(tmp_path):
    (tmp_path / "latents-00001.array_record.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"^no space left on the disk of {tmp_path}: [^\n]*$"):
        run(Pictures(), tmp_path)
    assert (tmp_path / "latents-00000.json").exists()
    assert not (tmp_path / "latents-00001.array_record").exists()
    (tmp_path / "latents-00001.array_record.partial").unlink()  # room is made
    assert run(Pictures(), tmp_path).written == 23


def test_the_progress_bar_counts_items_and_skips_from_where_it_continues(tmp_path, capsys):
    source = Pictures(bad=(21,))
    run(source, tmp_path, progress=True)
    assert "23/23" in capsys.readouterr().err
    for name in ("manifest.json", "latents-00002.json"):
        (tmp_path / name).unlink()
    run(source, tmp_path, progress=True)
    bar = capsys.readouterr().err
    assert "20/23" in bar  # two shards of ten items were finished
    assert "skipped=1" in bar.splitlines()[-1]


def test_an_error_of_the_source_passes_unchanged(tmp_path):
    class Broken(Pictures):
        def __getitem__(self, index):
            raise OSError(errno.EIO, "a disk failed")

    with pytest.raises(OSError, match="a disk failed"):
        run(Broken(), tmp_path)


def embed(captions):
    """Embeds a caption as its length and first letters; the mask marks the letters that it has."""
    assert len(captions) == 4
    letters = [[ord(letter) for letter in caption[:5].ljust(5)] for caption in captions]
    tokens = np.array(letters, np.float32)[:, :, None] / 128
    mask = np.arange(5)[None, :] < np.array([len(caption) for caption in captions])[:, None]
    return Cond(tokens, mask)


def test_embeddings_are_stored_one_row_a_caption(tmp_path):
    manifest = run(Pictures(), tmp_path, text=TextEncoder(embed, "letters"))
    assert manifest.text_encoder == "letters"
    for data in records(tmp_path):
        record = unpack(data)
        padded = [*record.captions, "", "", ""][:4]
        expected = embed(padded)
        count = len(record.captions)
        np.testing.assert_array_equal(record.text["tokens"], expected.tokens[:count])
        np.testing.assert_array_equal(record.text["mask"], expected.mask[:count])
        assert record.text["tokens"].dtype == np.float16


DRILL = """
import sys, time
sys.path.insert(0, {tests!r})
from test_encoding import Pictures, pool, run

def slowly(images):
    time.sleep(0.05)
    return pool(images)

run(Pictures(count=97, bad=(7, 50)), {directory!r}, slowly, items_per_shard=8, batch=3)
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_and_the_same_command_give_the_same_records(tmp_path):
    def start(directory):
        code = DRILL.format(tests=os.path.dirname(__file__), directory=str(directory))
        return subprocess.Popen([sys.executable, "-c", code])

    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert start(undisturbed).wait() == 0
    rng, kills, finished = random.Random(0), 0, {}
    while True:
        process = start(killed)
        while not (killed / "settings.json").exists():
            time.sleep(0.01)
        before = shards_of(killed)
        while process.poll() is None and shards_of(killed) == before:
            time.sleep(0.005)  # importing is over when the next shard is there
        time.sleep(rng.uniform(0, 0.4))
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
        now = shards_of(killed)
        assert finished.items() <= now.items(), "a finished shard was made again"
        finished = now
    assert process.returncode == 0
    assert kills >= 5
    assert records(killed) == records(undisturbed)
    assert Manifest.read_from(killed) == Manifest.read_from(undisturbed)
    keys = [unpack(data).key for data in records(killed)]
    assert len(set(keys)) == len(keys) == 95


def shards_of(directory):
    return {p.name: json.loads(p.read_bytes()) for p in directory.glob("latents-*.json")}
