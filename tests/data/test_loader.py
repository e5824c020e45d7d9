"""The order of the data, captions included, is a function of (seed, position) and of nothing else."""

import itertools

import numpy as np
import pytest

from ldm_jax.data import Item
from ldm_jax.data.captions import CaptionPolicy
from ldm_jax.data.encoding import TextEncoder, encode
from ldm_jax.data.latents import Autoencoder
from ldm_jax.data.loader import Loader, fixed_batch
from ldm_jax.types import Cond

COUNT = 23
MAIN = CaptionPolicy(0.0, 0.0)


class Numbered:
    """Item i has a picture of brightness i, and the captions "i", "i+100" and "i+200"."""

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        captions = tuple(str(index + hundreds) for hundreds in (0, 100, 200))
        return Item(str(index), np.full((16, 16, 3), index, np.uint8), captions)


def brightness(images):
    """Latents that tell the item: every value is its number."""
    return np.round((np.asarray(images)[:, ::8, ::8, :] + 1) * 127.5)


def embed(captions):
    """An embedding that tells the caption: its number, or -1 for the empty one; the mask, how many digits it has."""
    numbers = np.array([int(caption or -1) for caption in captions], np.float32)
    lengths = np.array([len(caption) for caption in captions])
    return Cond(
        np.tile(numbers[:, None, None], (1, 4, 2)), np.arange(4)[None, :] < lengths[:, None]
    )


def tokenizer(captions):
    return np.array([[int(caption or -1), len(caption)] for caption in captions], np.int32)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("latents")
    autoencoder = Autoencoder("abcd", 0.0, 1.0)
    sizes = {"size": 16, "batch": 4, "items_per_shard": 7}
    text = TextEncoder(embed, "numbers")
    encode(
        Numbered(),
        brightness,
        directory,
        autoencoder=autoencoder,
        text=text,
        progress=False,
        **sizes,
    )
    return directory


@pytest.fixture
def load(directory):
    """`load(count, ...)` is the first `count` batches of a loader with these options."""
    opened = []

    def load(count, seek=0, **options):
        defaults = {"batch": 4, "seed": 0, "policy": MAIN, "tokenizer": tokenizer}
        opened.append(Loader(directory, **defaults | options))
        opened[-1].seek(seek)
        return list(itertools.islice(opened[-1], count))

    yield load
    for loader in opened:
        loader.close()


def items(batches):
    """Which item each example is."""
    return np.concatenate([batch.latents[:, 0, 0, 0] for batch in batches]).astype(int).tolist()


def examples(batches):
    """Position -> (item, caption) of every example."""
    tokens = np.concatenate([batch.text[:, 0] for batch in batches]).tolist()
    positions = np.concatenate([batch.index for batch in batches]).tolist()
    return dict(zip(positions, zip(items(batches), tokens, strict=True), strict=True))


def test_a_batch_has_the_stated_types_and_shapes(load):
    (batch,) = load(1)
    assert batch.latents.shape == (4, 2, 2, 3)
    assert batch.text.shape == (4, 2)
    assert batch.weight.tolist() == [1.0] * 4
    assert batch.index.tolist() == [0, 1, 2, 3]
    dtypes = [getattr(batch, name).dtype for name in ("latents", "text", "weight", "index")]
    assert dtypes == [np.float32, np.int32, np.float32, np.uint32]
    assert all(isinstance(leaf, np.ndarray) for leaf in batch)


def test_latents_and_captions_belong_together(load):
    for item, caption in examples(load(12)).values():
        assert item == caption


def test_every_epoch_holds_every_record_once_in_an_order_of_its_own(load):
    order = items(load(COUNT, batch=3))
    epochs = [order[i : i + COUNT] for i in range(0, 3 * COUNT, COUNT)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert list(range(COUNT)) not in epochs


def test_the_seed_decides_the_order(load):
    assert items(load(6)) == items(load(6))
    assert items(load(6)) != items(load(6, seed=1))


@pytest.mark.parametrize("batch", [1, 3, 8, 24])
def test_the_order_and_captions_do_not_depend_on_the_batch_size(load, batch):
    policy = CaptionPolicy(0.2, 0.5)
    expected = examples(load(48, batch=2, policy=policy))
    assert examples(load(96 // batch, batch=batch, policy=policy)) == expected


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_every_batch(load, processes):
    policy = CaptionPolicy(0.2, 0.5)
    whole = load(10, batch=8, policy=policy)
    shares = [
        load(10, batch=8, policy=policy, process_index=p, process_count=processes)
        for p in range(processes)
    ]
    for step in range(10):
        assert all(len(share[step].index) == 8 // processes for share in shares)
        assert examples([share[step] for share in shares]) == examples([whole[step]])


@pytest.mark.parametrize("position", [4, 5, 23, 100])
def test_seeking_is_skipping(load, position):
    policy = CaptionPolicy(0.2, 0.5)
    skipped = examples(load(position + 12, batch=1, policy=policy))
    expected = {p: skipped[p] for p in range(position, position + 12)}
    assert examples(load(3, seek=position, policy=policy)) == expected
    shares = [
        load(3, seek=position, policy=policy, process_index=p, process_count=2) for p in range(2)
    ]
    assert examples(shares[0] + shares[1]) == expected


def test_a_loader_seeks_back_and_forth(directory):
    loader = Loader(directory, batch=4, seed=0, tokenizer=tokenizer)
    first = next(loader)
    next(loader)
    loader.seek(400)
    assert next(loader).index.tolist() == [400, 401, 402, 403]
    loader.seek(0)
    again = next(loader)
    np.testing.assert_array_equal(again.latents, first.latents)
    loader.close()


def test_captions_follow_the_policy_at_their_position(load):
    policy = CaptionPolicy(0.3, 0.5)
    for position, (item, caption) in examples(load(25, policy=policy, seed=5)).items():
        choice = policy.choose(3, 5, position)
        assert caption == (-1 if choice is None else item + 100 * choice)


def test_a_data_set_smaller_than_a_batch_repeats(load):
    (batch,) = load(1, batch=2 * COUNT)
    assert sorted(items([batch])) == sorted([*range(COUNT)] * 2)
    assert batch.index.tolist() == list(range(2 * COUNT))


def test_stored_embeddings_are_those_of_the_chosen_captions(load):
    policy = CaptionPolicy(0.3, 0.5)
    captions = examples(load(12, policy=policy))
    for batch in load(12, policy=policy, tokenizer=None):
        assert isinstance(batch.text, Cond)
        assert batch.text.tokens.dtype == np.float32
        expected = embed([str(captions[i][1]).replace("-1", "") for i in batch.index.tolist()])
        np.testing.assert_array_equal(batch.text.tokens, expected.tokens)
        np.testing.assert_array_equal(batch.text.mask, expected.mask)


def test_a_fixed_batch_is_records_by_their_place_with_their_main_captions(directory):
    batch = fixed_batch(directory, [0, 7, 22], tokenizer=tokenizer)
    assert items([batch]) == [0, 7, 22]
    assert batch.text[:, 0].tolist() == [0, 7, 22]
    assert batch.index.tolist() == [0, 7, 22]
    embedded = fixed_batch(directory, range(5), tokenizer=None)
    np.testing.assert_array_equal(embedded.text.tokens[:, 0, 0], range(5))


def test_wrong_requests_are_refused(directory, tmp_path):
    with pytest.raises(ValueError, match="batch of 6 examples cannot be shared by 4 processes"):
        Loader(directory, batch=6, seed=0, tokenizer=tokenizer, process_count=4)
    with pytest.raises(ValueError, match="holds records 0 to 22"):
        fixed_batch(directory, [5, 23], tokenizer=tokenizer)
    encode(
        Numbered(),
        brightness,
        tmp_path,
        autoencoder=Autoencoder("abcd", 0.0, 1.0),
        size=16,
        progress=False,
    )
    with pytest.raises(ValueError, match="holds no text embeddings"):
        Loader(tmp_path, batch=4, seed=0, tokenizer=None)


@pytest.mark.parametrize("threads", [1, 5])
def test_the_number_of_threads_changes_nothing(load, threads):
    policy = CaptionPolicy(0.2, 0.5)
    expected = examples(load(8, policy=policy))
    assert examples(load(8, policy=policy, threads=threads, prefetch=threads)) == expected
