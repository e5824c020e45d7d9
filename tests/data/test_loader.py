"""The order of the data, captions included, is a function of (seed, position) and of nothing else."""

import dataclasses
import itertools
import json

import grain
import numpy as np
import pytest

from ldm_jax.data import Item
from ldm_jax.data.captions import CaptionPolicy
from ldm_jax.data.encoding import TextEncoder, encode
from ldm_jax.data.latents import Autoencoder
from ldm_jax.data.loader import Loader, Mixture, fixed_batch
from ldm_jax.types import Cond

COUNT = 23
MAIN = CaptionPolicy(0.0, 0.0)


@dataclasses.dataclass(frozen=True)
class Numbered:
    """Item i has a picture of brightness n = i + first, and the captions "n", "n+100" and "n+200"."""

    count: int = COUNT
    first: int = 0

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        number = index + self.first
        captions = tuple(str(number + hundreds) for hundreds in (0, 100, 200))
        return Item(str(number), np.full((16, 16, 3), number, np.uint8), captions)


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


def encode_into(directory, source=Numbered(), **options):
    defaults = {
        "autoencoder": Autoencoder("abcd", 0.0, 1.0),
        "text": TextEncoder(embed, "numbers"),
        "size": 16,
        "batch": 4,
        "items_per_shard": 7,
    }
    encode(source, brightness, directory, progress=False, **defaults | options)
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return encode_into(tmp_path_factory.mktemp("latents"))


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Two more directories: of the items 50 to 60, and of the items 70 to 79."""
    return [
        encode_into(tmp_path_factory.mktemp("latents"), source)
        for source in (Numbered(11, 50), Numbered(10, 70))
    ]


@pytest.fixture
def load(directory):
    """`load(count, ...)` is the first `count` batches of a loader with these options."""
    opened = []

    def load(count, seek=0, **options):
        defaults = {"batch": 4, "seed": 0, "policy": MAIN, "tokenizer": tokenizer}
        opened.append(Loader(**{"parts": [(directory, 1.0)]} | defaults | options))
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
    batches = list(batches)
    tokens = np.concatenate([batch.cond[:, 0] for batch in batches]).tolist()
    positions = np.concatenate([batch.index for batch in batches]).tolist()
    return dict(zip(positions, zip(items(batches), tokens, strict=True), strict=True))


def test_a_batch_has_the_stated_types_and_shapes(load):
    (batch,) = load(1)
    assert batch.latents.shape == (4, 2, 2, 3)
    assert batch.cond.shape == (4, 2)
    assert batch.weight.tolist() == [1.0] * 4
    assert batch.index.tolist() == [0, 1, 2, 3]
    dtypes = [getattr(batch, name).dtype for name in ("latents", "cond", "weight", "index")]
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
    loader = Loader([(directory, 1.0)], batch=4, seed=0, tokenizer=tokenizer)
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
        assert isinstance(batch.cond, Cond)
        assert batch.cond.tokens.dtype == np.float32
        expected = embed([str(captions[i][1]).replace("-1", "") for i in batch.index.tolist()])
        np.testing.assert_array_equal(batch.cond.tokens, expected.tokens)
        np.testing.assert_array_equal(batch.cond.mask, expected.mask)


def test_a_fixed_batch_is_records_by_their_place_with_their_main_captions(directory):
    batch = fixed_batch(directory, [0, 7, 22], tokenizer=tokenizer)
    assert items([batch]) == [0, 7, 22]
    assert batch.cond[:, 0].tolist() == [0, 7, 22]
    assert batch.index.tolist() == [0, 7, 22]
    embedded = fixed_batch(directory, range(5), tokenizer=None)
    np.testing.assert_array_equal(embedded.cond.tokens[:, 0, 0], range(5))


def test_wrong_requests_are_refused(directory, tmp_path):
    with pytest.raises(ValueError, match="batch of 6 examples cannot be shared by 4 processes"):
        Loader([(directory, 1.0)], batch=6, seed=0, tokenizer=tokenizer, process_count=4)
    with pytest.raises(ValueError, match="holds records 0 to 22"):
        fixed_batch(directory, [5, 23], tokenizer=tokenizer)
    encode_into(tmp_path, text=None)
    with pytest.raises(ValueError, match="holds no text embeddings"):
        Loader([(tmp_path, 1.0)], batch=4, seed=0, tokenizer=None)


@pytest.mark.parametrize("threads", [1, 5])
def test_the_number_of_threads_changes_nothing(load, threads):
    policy = CaptionPolicy(0.2, 0.5)
    expected = examples(load(8, policy=policy))
    assert examples(load(8, policy=policy, threads=threads, prefetch=threads)) == expected


@pytest.mark.parametrize(
    "weights", [(0.3, 0.7), (1.0, 1.0), (2.5, 0.001), (0.5, 0.3, 0.2), (7.0, 1.0, 1.0, 3.0, 2.0)]
)
@pytest.mark.parametrize("start", [0, 10**12 + 7])
def test_every_window_holds_the_shares_of_the_parts(weights, start):
    mixture, count = Mixture(weights), 2000
    parts = np.array([mixture[position][0] for position in range(start, start + count)])
    for part, weight in enumerate(weights):
        surplus = np.cumsum(parts == part) - np.arange(1, count + 1) * weight / sum(weights)
        # A window's surplus is the difference of two of these.
        assert np.ptp(np.append(surplus, 0)) < max(1, len(weights) - 1)


def test_shares_are_those_of_the_decimals_as_written():
    parts = [Mixture((0.3, 0.7))[position][0] for position in range(10**15, 10**15 + 1000)]
    assert parts.count(0) == 300


@pytest.mark.parametrize("weights", [(1.0,), (0.3, 0.7), (1e-5, 1.0), (0.2, 0.5, 0.3)])
def test_no_position_of_a_part_is_passed_over_or_taken_twice(weights):
    mixture = Mixture(weights)
    counts = [0] * len(weights)
    for position in range(500):
        part, place = mixture[position]
        assert place == counts[part]
        counts[part] += 1


def test_one_part_has_the_order_of_grains_shuffle(load):
    for seed in (0, 7, 2**32 - 1):
        order = grain.MapDataset.range(COUNT).shuffle(seed).repeat()
        assert items(load(2 * COUNT, batch=1, seed=seed)) == [order[i] for i in range(2 * COUNT)]


@pytest.fixture
def mixed(directory, others):
    return list(zip([directory, *others], (0.5, 0.2, 0.3), strict=True))


def test_every_record_of_a_part_is_seen_once_before_any_is_seen_again(load, mixed):
    order = items(load(300, batch=1, parts=mixed))
    for records, count in ((range(COUNT), 150), (range(50, 61), 60), (range(70, 80), 90)):
        seen = [item for item in order if item in records]
        assert abs(len(seen) - count) < 2
        epochs = [seen[i : i + len(records)] for i in range(0, len(seen), len(records))]
        assert all(sorted(epoch) == list(records) for epoch in epochs[:-1])
        assert len(set(epochs[-1])) == len(epochs[-1])
        assert len(set(map(tuple, epochs))) == len(epochs) > 2


def test_parts_of_one_size_have_orders_of_their_own(load, others, tmp_path):
    twin = encode_into(tmp_path, Numbered(10, 90))
    order = items(load(20, batch=1, parts=[(others[1], 1.0), (twin, 1.0)]))
    assert [item - 70 for item in order[::2]] != [item - 90 for item in order[1::2]]


def test_captions_are_those_of_the_record_by_the_position_in_the_mixture(load, mixed):
    policy = CaptionPolicy(0.3, 0.5)
    for position, (item, caption) in examples(load(40, policy=policy, parts=mixed)).items():
        choice = policy.choose(3, 0, position)
        assert caption == (-1 if choice is None else item + 100 * choice)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_mixture_goes_on_from_any_position_on_any_number_of_processes(load, mixed, processes):
    options = {"policy": CaptionPolicy(0.2, 0.5), "parts": mixed}
    expected = examples(load(100, batch=1, seek=41, **options))
    assert examples(load(141, batch=1, **options)).items() >= expected.items()
    shares = [
        load(10, seek=41, batch=6, process_index=p, process_count=processes, **options)
        for p in range(processes)
    ]
    found = examples(itertools.chain(*shares))
    assert found == {position: expected[position] for position in range(41, 101)}


def test_embeddings_of_a_mixture_are_those_of_the_record(load, mixed):
    for batch in load(10, tokenizer=None, parts=mixed):
        assert batch.cond.tokens[:, 0, 0].tolist() == items([batch])


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_not_a_finite_number_above_0_is_refused(load, directory, others, weight):
    with pytest.raises(ValueError, match=f"the weight of {others[0]} is .*: give a finite number"):
        load(1, parts=[(directory, 1.0), (others[0], weight)])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"autoencoder": Autoencoder("efgh", 0.0, 1.0)}, "autoencoder is .*efgh.* and .*abcd"),
        ({"autoencoder": Autoencoder("abcd", 0.5, 1.0)}, r"shift=0\.5"),
        ({"size": 32}, "size is 32 and 16"),
        ({"text": TextEncoder(embed, "other")}, "text_encoder is other and numbers"),
        ({"text": None}, "text_encoder is  and numbers"),
    ],
)
def test_parts_that_were_made_by_different_networks_are_refused(
    load, directory, tmp_path, options, says
):
    other = encode_into(tmp_path, **options)
    with pytest.raises(ValueError, match=f"{tmp_path} and {directory} cannot be mixed: .*{says}"):
        load(1, parts=[(directory, 1.0), (other, 1.0)], tokenizer=None)


def test_captions_of_parts_with_other_embeddings_can_be_mixed(load, directory, tmp_path):
    other = encode_into(tmp_path, Numbered(9, 50), text=None)
    found = examples(load(5, parts=[(directory, 1.0), (other, 1.0)]))
    assert sum(item >= 50 for item, _ in found.values()) == 10


def test_no_part_an_empty_part_and_one_given_twice_are_refused(load, directory, others, tmp_path):
    with pytest.raises(ValueError, match="parts is empty: give at least one directory"):
        load(1, parts=[])
    with pytest.raises(ValueError, match=f"{others[0]}/ is given twice"):
        load(1, parts=[(directory, 1.0), (others[0], 1.0), (f"{others[0]}/", 1.0)])
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest |= {"written": 0, "read": 0, "shards": []}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"{tmp_path} holds no record: leave it out"):
        load(1, parts=[(directory, 1.0), (tmp_path, 1.0)])
