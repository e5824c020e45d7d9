import json
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from ldm_jax.models.tokenizer import BOS, EOS, NUM_BASE, Tokenizer, train_tokenizer

T5 = Path(__file__).parent.parent / "goldens" / "t5_tokenizer"
TEXT = """
a red green blue small large circle square triangle left right above below the of is striped dotted
background white yellow purple tiny huge next to it's we'll 42 café naïve Ünï
"""
WORDS = TEXT.split()
ODD = [
    "",
    "   ",
    "A RED Circle!!",
    "it's 42's we'll they'd",
    "日本語 のテスト",
    "🙂 emoji👍🏽",
    "cafe\u0301 café",
    "x" * 300,
    " ".join(WORDS),
    "tab\tnew\nline\u00a0nbsp\u3000wide",
    "<|endoftext|> inside",
    "<|ENDOFTEXT|> upper",
    "a<|startoftext|>b",
    "İstanbul ß ﬁ",
    "!wow! !!",
    "\u0000\u0001 control",
    "— “quotes” …",
    "1234567890 3.14",
    "'s't",
    "a\u200bb",
    "</w> <pad> #version: 0.2",
]


def captions():
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, 8)) for _ in range(300)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(captions(), 600, 16, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory):
    return Tokenizer.from_directory(directory)


def copied(directory, tmp_path, special=(), config=()):
    """The directory without tokenizer.json, as Stable Diffusion has it, and with other special tokens."""
    path = tmp_path / "copy"
    shutil.copytree(directory, path)
    (path / "tokenizer.json").unlink()
    for name, changes in (("special_tokens_map", special), ("tokenizer_config", config)):
        file = path / f"{name}.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **dict(changes)}))
    return path


def as_stored(token, normalized):
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": normalized}
    return {"content": token, **flags}


ADDED = {0: as_stored("!", False), 598: as_stored(BOS, True), 599: as_stored(EOS, False)}
LAYOUTS = {
    "as trained": {},
    "SD1.5": {"special": {"bos_token": as_stored(BOS, True), "eos_token": as_stored(EOS, True)}},
    "SD2.1": {"special": {"bos_token": as_stored(BOS, True), "pad_token": "!"}},
    "SDXL's second": {"config": {"pad_token": "!", "added_tokens_decoder": ADDED}},
}


def assert_same(given, theirs, captions):
    """Ids are those of transformers."""
    expected = theirs(captions, padding="max_length", truncation=True, return_tensors="np")
    assert given.max_length == theirs.model_max_length
    assert (given.pad_id, given.eos_id) == (theirs.pad_token_id, theirs.eos_token_id)
    np.testing.assert_array_equal(given(captions), expected["input_ids"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_are_those_of_transformers(directory, tmp_path, layout):
    transformers = pytest.importorskip("transformers")
    path = copied(directory, tmp_path, **LAYOUTS[layout])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.CLIPTokenizerFast.from_pretrained(path)
        theirs.save_pretrained(tmp_path / "again")
    for place in (path, tmp_path / "again"):
        assert_same(Tokenizer.from_directory(place), theirs, ODD)


def with_file(path, name, content):
    (path / name).write_text(json.dumps(content))
    return path


LEARNED = {"<cat-toy>": 600, "<Dog>": 601, "two words": 602}
DECODER = {
    598: as_stored(BOS, True),
    599: as_stored(EOS, False),
    600: as_stored("<cat-toy>", False),
    601: {**as_stored("<Dog>", True), "single_word": True, "special": False},
    602: {**as_stored("two words", True), "lstrip": True, "rstrip": True},
}
ADDED_LATER = {
    "added_tokens.json": {"added_tokens.json": LEARNED},
    "added and special": {
        "added_tokens.json": LEARNED,
        "special_tokens_map.json": {
            **dict.fromkeys(("unk_token", "pad_token", "eos_token"), EOS),
            "bos_token": as_stored(BOS, True),
            "additional_special_tokens": ["<cat-toy>"],
        },
    },
    "extra tokens": {
        "tokenizer_config.json": {
            "model_max_length": 16,
            "additional_special_tokens": ["<cat-toy>", "<Dog>"],
        },
        "added_tokens.json": {"<cat-toy>": 600, "two words": 601},
    },
    "extra tokens alone": {
        "special_tokens_map.json": {
            "additional_special_tokens": ["<cat-toy>", "<Dog>", "two words"]
        },
    },
    "added_tokens_decoder": {
        "tokenizer_config.json": {"model_max_length": 16, "added_tokens_decoder": DECODER},
        "added_tokens.json": {"not read": 600},
    },
}
MENTIONING = [
    "a photo of <cat-toy>",
    "a photo of <CAT-TOY>, red",
    "<dog><Dog> and a<Dog>b <Dog>",
    "one  two words  red two Words twotwo words",
    "not read <cat-toy",
    *ODD,
]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("layout", ADDED_LATER)
def test_tokens_added_later_are_those_of_transformers(directory, tmp_path, layout, whole):
    transformers = pytest.importorskip("transformers")
    path = copied(directory, tmp_path)
    if whole:
        shutil.copy(directory / "tokenizer.json", path)
    for name, content in ADDED_LATER[layout].items():
        with_file(path, name, content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.CLIPTokenizerFast.from_pretrained(path)
        theirs.save_pretrained(tmp_path / "again")
    for place in (path, tmp_path / "again"):
        ours = Tokenizer.from_directory(place)
        assert ours.vocab_size == len(theirs) == 603
        assert_same(ours, theirs, MENTIONING)


@pytest.mark.parametrize("whole", [False, True])
def test_a_learned_token_is_one_id_between_those_of_its_neighbours(directory, tmp_path, whole):
    path = copied(directory, tmp_path)
    if whole:
        shutil.copy(directory / "tokenizer.json", path)
    plain = Tokenizer.from_directory(path)
    ours = Tokenizer.from_directory(with_file(path, "added_tokens.json", LEARNED))
    (before,), (after,) = plain(["a red circle"]), ours(["a red <cat-toy> circle"])
    assert (plain.vocab_size, ours.vocab_size) == (600, 603)
    np.testing.assert_array_equal(np.delete(after, np.flatnonzero(after == 600)), before[:-1])
    assert 600 in after
    assert ours.truncated(" ".join(["<cat-toy>"] * 15)) == "<cat-toy>"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("added_tokens.json", {"<cat-toy>": 700}, "'<cat-toy>' the id 700, and .* gives it 600"),
        ("added_tokens.json", {"a": 600}, "'a' the id 600, and its vocabulary gives it 6"),
        ("added_tokens.json", {"<a>": 600, "<b>": 600}, "json: two tokens have one id"),
        ("added_tokens.json", {"<a>": "600"}, "added_tokens.json: <a> is '600'; it takes int"),
        ("added_tokens.json", ["<a>"], "added_tokens.json holds list"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": ADDED[0]}}, "of the id 'x'"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"600": "<a>"}}, "the token '<a>'"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"600": {}}}, "a token is {}"),
        ("tokenizer_config.json", {"added_tokens_decoder": []}, "added_tokens_decoder is \\[\\]"),
        ("tokenizer_config.json", {"bos_token": 5}, "json: bos_token is 5; it takes str or dict"),
        (
            "tokenizer_config.json",
            {"eos_token": {"content": 5}},
            "json: content is 5; it takes str",
        ),
        ("special_tokens_map.json", {"pad_token": ["!"]}, "map.json: pad_token is"),
        ("special_tokens_map.json", None, "special_tokens_map.json holds null"),
    ],
)
def test_tokens_of_another_kind_are_refused_by_file_and_field(
    directory, tmp_path, name, content, sentence
):
    path = with_file(copied(directory, tmp_path), name, content)
    with pytest.raises(ValueError, match=sentence):
        Tokenizer.from_directory(path, max_length=8)


@pytest.mark.parametrize("absent", [None, 10**30, 1e30, float("inf")])
def test_a_tokenizer_without_a_length_has_that_of_the_text_encoder(directory, tmp_path, absent):
    path = with_file(copied(directory, tmp_path), "tokenizer_config.json", {})
    assert Tokenizer.from_directory(path, positions=11).max_length == 11
    path = with_file(path, "tokenizer_config.json", {"model_max_length": absent})
    assert Tokenizer.from_directory(path, positions=11).max_length == 11
    with pytest.raises(ValueError, match="sets no model_max_length, and no max_length is given"):
        Tokenizer.from_directory(path)


def test_a_length_that_is_said_goes_before_that_of_the_text_encoder(directory):
    assert Tokenizer.from_directory(directory, positions=11).max_length == 16
    assert Tokenizer.from_directory(directory, 5, positions=11).max_length == 5


@pytest.mark.parametrize("length", ["77", -1, 0, 0.5, 7.5, float("nan"), [77], True, {}])
def test_senseless_lengths_are_refused_in_one_sentence(directory, tmp_path, length):
    path = copied(directory, tmp_path, config={"model_max_length": length})
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: model_max_length is .*; it "):
        Tokenizer.from_directory(path, positions=11)


def t5_copied(tmp_path, *files):
    """Some files of T5's committed directory."""
    for file in files:
        shutil.copy(T5 / file, tmp_path)
    return tmp_path


@pytest.mark.parametrize("pieces", ["tokenizer.json", "spiece.model"])
def test_ids_and_masks_of_t5_are_those_of_transformers(tmp_path, pieces):
    with np.load(T5 / "outputs.npz") as file:
        expected = dict(file)
    path = t5_copied(tmp_path, pieces, "tokenizer_config.json")
    tokenizer = Tokenizer.from_directory(path)
    tokens = tokenizer(expected["captions"].tolist())
    np.testing.assert_array_equal(tokens, expected["tokens"])
    # Text that spells the padding's name is hidden with it.
    spelt = np.array(["<pad>" in caption for caption in expected["captions"]])
    mask = tokens != tokenizer.pad_id
    np.testing.assert_array_equal(mask[~spelt], expected["mask"][~spelt])


def test_ids_of_a_t5_that_transformers_writes_now_are_the_same(tmp_path):
    transformers = pytest.importorskip("transformers")
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(captions(), trainer)
    vocab = [tuple(entry) for entry in json.loads(backend.to_str())["model"]["vocab"]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.T5TokenizerFast(vocab=vocab, model_max_length=16)
        theirs.save_pretrained(tmp_path)
    assert_same(Tokenizer.from_directory(tmp_path), theirs, [*ODD, "</s> <pad>", "<extra_id_7>."])


def test_t5_pads_with_0_ends_with_its_end_token_and_starts_with_none(tmp_path):
    """Whether or not a tokenizer_config.json says so."""
    for pieces in ("spiece.model", "tokenizer.json"):
        tokenizer = Tokenizer.from_directory(t5_copied(tmp_path, pieces), max_length=120)
        assert (tokenizer.pad_id, tokenizer.eos_id) == (0, 1)
        tokens = tokenizer(["", "a red circle", "the " * 200])
        np.testing.assert_array_equal(np.sum(tokens != 0, axis=-1), [1, 4, 120])
        np.testing.assert_array_equal(tokens[[0, 1, 2], [0, 3, 119]], [1, 1, 1])
        assert np.all(tokens[1:, 0] > 2)


def test_the_part_that_t5_cuts_off_is_reported():
    tokenizer = Tokenizer.from_directory(T5)
    assert tokenizer.truncated("the " * 15) == ""
    assert tokenizer.truncated("the " * 14 + "red blue") == "blue"


def test_transformers_reads_the_trained_directory_whole(directory, tokenizer):
    transformers = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoTokenizer.from_pretrained(directory)
    expected = theirs(ODD, padding="max_length", truncation=True, return_tensors="np")["input_ids"]
    np.testing.assert_array_equal(tokenizer(ODD), expected)


def test_both_kinds_of_directories_give_the_same_ids(directory, tokenizer, tmp_path):
    np.testing.assert_array_equal(
        Tokenizer.from_directory(copied(directory, tmp_path))(ODD), tokenizer(ODD)
    )


def test_rows_start_and_end_as_they_should_and_are_padded(tokenizer):
    tokens = tokenizer(ODD)
    assert tokens.shape == (len(ODD), 16) and tokens.dtype == np.int32
    bos = tokenizer.backend.token_to_id(BOS)
    assert np.all(tokens[:, 0] == bos) and np.all(tokens[:, -1] == tokenizer.eos_id)
    np.testing.assert_array_equal(tokens[0], [bos] + [tokenizer.eos_id] * 15)


def test_no_caption_is_out_of_vocabulary_and_all_can_be_read_back(tokenizer):
    plain = [caption for caption in ODD if "<|" not in caption]
    for caption in plain:
        ids = tokenizer.backend.encode(caption, add_special_tokens=False).ids
        assert tokenizer.eos_id not in ids
        read = "".join(tokenizer.backend.decode(ids).replace("</w>", " ").split())
        assert read == "".join(tokenizer.backend.normalizer.normalize_str(caption).split())


def test_sd21_pads_with_its_own_token(directory, tmp_path):
    tokenizer = Tokenizer.from_directory(copied(directory, tmp_path, special={"pad_token": "!"}))
    assert tokenizer.pad_id == 0 != tokenizer.eos_id
    assert np.all(tokenizer([""])[0, 2:] == 0)


def test_trained_ids_are_in_clips_order(directory, tokenizer):
    vocab = json.loads((directory / "vocab.json").read_text())
    assert sorted(vocab.values()) == list(range(600)) and tokenizer.vocab_size == 600
    assert (vocab["!"], vocab["!</w>"], vocab[BOS], vocab[EOS]) == (0, 256, 598, 599)
    assert tokenizer.eos_id == 599


def test_training_makes_captions_shorter_and_repeats_in_another_process(directory, tmp_path):
    small = train_tokenizer(captions(), NUM_BASE, 64, tmp_path / "small")
    large = train_tokenizer(captions(), 2000, 64, tmp_path / "large")
    lengths = [np.sum(t(captions()) != t.eos_id) for t in (small, large)]
    assert lengths[1] < lengths[0] / 3
    assert small.vocab_size == NUM_BASE < large.vocab_size < 2000
    assert len(large.backend.encode("green triangle").ids) == 4
    source = (
        "import sys; sys.path[:0] = sys.argv[2:]; from test_tokenizer import *; "
        "train_tokenizer(captions(), 600, 16, sys.argv[1])"
    )
    again = tmp_path / "again"
    paths = [str(again), *filter(None, sys.path)]
    subprocess.run([sys.executable, "-c", source, *paths], check=True)
    for file in ("tokenizer.json", "vocab.json", "merges.txt"):
        assert (again / file).read_bytes() == (directory / file).read_bytes()


def test_the_part_that_is_cut_off_is_reported(tokenizer):
    assert tokenizer.truncated("a red circle") == ""
    caption = " ".join(WORDS)
    rest = tokenizer.truncated(caption)
    assert rest and caption.endswith(rest)
    kept = caption.removesuffix(rest)
    np.testing.assert_array_equal(tokenizer([kept]), tokenizer([caption]))
    assert tokenizer.truncated(kept) == ""


def test_a_longest_caption_that_fits_is_not_cut(tokenizer):
    caption = " ".join("a" * 14)
    assert tokenizer.truncated(caption) == "" and tokenizer.truncated(caption + " a") == "a"
    np.testing.assert_array_equal(tokenizer([caption]), tokenizer([caption + " a"]))


def test_a_tokenizer_can_be_pickled(tokenizer):
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(tokenizer))(ODD), tokenizer(ODD))


def test_lengths_can_be_chosen_and_no_captions_are_no_rows(directory):
    tokenizer = Tokenizer.from_directory(directory, max_length=5)
    assert tokenizer(ODD).shape == (len(ODD), 5) and tokenizer([]).shape == (0, 5)


def test_incomplete_directories_are_refused_in_one_sentence(directory, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"or spiece.model; there is nothing"):
        Tokenizer.from_directory(tmp_path / "absent")
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"looked for tokenizer.json.*there is vocab.json"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        Tokenizer.from_directory(tmp_path)
    path = copied(directory, tmp_path)
    special = {"pad_token": "<none>"}
    with pytest.raises(ValueError, match="has no token '<none>'"):
        Tokenizer.from_directory(copied(directory, tmp_path / "2", special))
    (path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="sets no model_max_length"):
        Tokenizer.from_directory(path)
    (path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        Tokenizer.from_directory(path)


@pytest.mark.parametrize("content", [b"", b"\x0a\x03\x0a\x01a\x12\x02\x18\x02", b"\x0a\x7fgarbage"])
def test_pieces_of_another_kind_are_refused(tmp_path, content):
    """An empty file, one piece of a model that merges byte pairs, and a file that is something else."""
    (tmp_path / "spiece.model").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read"):
        Tokenizer.from_directory(tmp_path, max_length=8)


def test_bad_arguments_are_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="list of captions"):
        tokenizer("a red circle")
    with pytest.raises(ValueError, match="vocab_size is 100; it is at least 514"):
        train_tokenizer([], 100, 8, tmp_path)
