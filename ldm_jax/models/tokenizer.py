"""Captions to token ids: tokenizer directories as transformers writes them, and a trainer of small ones."""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int32
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"
NUM_BASE = 2 * 256 + 2  # every byte, inside a word and at its end, and the two special tokens

_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_UNLIMITED = 10**6  # transformers writes 10**30 for a model without a limit
_Merges = list[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Captions to ids of one length; can be pickled, so that data workers can have it.

    `pad_id` is the end token's in SD1.5 and the one of "!" in SD2.1, `vocab_size` the embeddings it needs.
    """

    backend: tokenizers.Tokenizer
    max_length: int
    pad_id: int
    eos_id: int

    @classmethod
    def from_directory(cls, path: str | os.PathLike, max_length: int | None = None) -> "Tokenizer":
        """Reads tokenizer.json, or CLIP's vocab.json and merges.txt, and what transformers keeps beside them.

        `max_length` is that of tokenizer_config.json unless it is given. Raises FileNotFoundError where the
        files are missing, ValueError where nothing says the length or a file is not what its name says.
        """
        directory = Path(path)
        config = _config(directory)
        backend = _backend(directory, config)
        backend.no_padding()
        backend.no_truncation()
        special = {name: config[name] for name in _SPECIAL if config.get(name)}
        ids = {name: _id(backend, token, directory) for name, token in special.items()}
        backend.add_special_tokens([_added(token) for token in special.values()])
        length = max_length or config.get("model_max_length", _UNLIMITED)
        if length >= _UNLIMITED:
            raise ValueError(f"{directory}/tokenizer_config.json sets no model_max_length")
        eos = ids["eos_token"] if "eos_token" in ids else _id(backend, EOS, directory)
        return cls(backend, length, ids.get("pad_token", eos), eos)

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return max(self.backend.get_vocab().values()) + 1

    def __call__(self, captions: Sequence[str]) -> Int32[np.ndarray, "B L"]:
        """Ids padded to `max_length`; a caption that is too long loses its end, but not its end token."""
        if isinstance(captions, str):
            raise ValueError(
                f"a tokenizer takes a list of captions, not the one caption {captions!r}"
            )
        tokens = np.full((len(captions), self.max_length), self.pad_id, np.int32)
        for row, encoding in zip(tokens, self.backend.encode_batch(list(captions)), strict=True):
            ids = encoding.ids
            kept = ids if len(ids) <= len(row) else ids[: len(row) - 1] + ids[-1:]
            row[: len(kept)] = kept
        return tokens

    def truncated(self, caption: str) -> str:
        """The part of the caption that does not fit; mostly nothing."""
        encoding = self.backend.encode(caption)
        if len(encoding.ids) <= self.max_length:
            return ""
        return caption[encoding.offsets[self.max_length - 1][0] :]


def train_tokenizer(
    captions: Iterable[str], vocab_size: int, max_length: int, directory: str | os.PathLike
) -> Tokenizer:
    """Learns byte pairs (Sennrich et al. 2016) from captions and writes a directory for CLIPTokenizer.

    Ids are in CLIP's order: bytes, bytes at the end of a word, pairs as they were found, start, end. There are
    `vocab_size` of them, or fewer if the captions hold no more pairs. Raises ValueError if there is no room for
    the bytes.
    """
    if vocab_size < NUM_BASE:
        raise ValueError(
            f"vocab_size is {vocab_size}; it is at least {NUM_BASE}: bytes and special tokens"
        )
    vocab, merges = _vocabulary(_learn_merges(captions, vocab_size), vocab_size - 2)
    vocab |= {BOS: len(vocab), EOS: len(vocab) + 1}
    names = dict(zip(_SPECIAL, (BOS, EOS, EOS, EOS), strict=True))
    config = {**names, "tokenizer_class": "CLIPTokenizer", "model_max_length": max_length}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _clip(vocab, merges, names).save(str(directory / "tokenizer.json"))
    _write_json(directory / "vocab.json", vocab)
    _write_json(directory / "tokenizer_config.json", config)
    _write_json(directory / "special_tokens_map.json", names)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Tokenizer.from_directory(directory)


def _learn_merges(captions: Iterable[str], vocab_size: int) -> _Merges:
    learner = tokenizers.Tokenizer(_byte_pairs())
    learner.normalizer, learner.pre_tokenizer = _normalizer(), _pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    return [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]


def _vocabulary(merges: _Merges, size: int) -> tuple[dict[str, int], _Merges]:
    """The ids, and the merges that there is room for; two merges may give the same token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys([*alphabet, *(byte + END_OF_WORD for byte in alphabet)])
    kept = []
    for pair in merges:
        if "".join(pair) not in tokens and len(tokens) == size:
            break
        tokens["".join(pair)] = None
        kept.append(pair)
    return {token: i for i, token in enumerate(tokens)}, kept


def _backend(directory: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    whole, vocab, merges = (
        directory / name for name in ("tokenizer.json", "vocab.json", "merges.txt")
    )
    try:
        if whole.is_file():
            return tokenizers.Tokenizer.from_file(str(whole))
        if vocab.is_file() and merges.is_file():
            return _clip(*models.BPE.read_file(str(vocab), str(merges)), config)
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"the tokenizer in {directory} cannot be read: {error}") from None
    found = sorted(file.name for file in directory.iterdir()) if directory.is_dir() else []
    raise FileNotFoundError(
        f"no tokenizer in {directory}: looked for tokenizer.json, or vocab.json and merges.txt; "
        f"there is {', '.join(found) or 'nothing'}"
    )


def _clip(
    vocab: Mapping[str, int], merges: _Merges, names: Mapping[str, Any]
) -> tokenizers.Tokenizer:
    """CLIP's way from text to ids: lower case, words, bytes, byte pairs, between a start and an end token."""
    bos, eos, unk = (
        _content(names.get(name, default))
        for name, default in (("bos_token", BOS), ("eos_token", EOS), ("unk_token", EOS))
    )
    backend = tokenizers.Tokenizer(_byte_pairs(vocab=vocab, merges=merges, unk_token=unk))
    backend.normalizer, backend.pre_tokenizer = _normalizer(), _pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.RobertaProcessing(
        (eos, vocab[eos]), (bos, vocab[bos]), trim_offsets=False, add_prefix_space=False
    )
    backend.add_special_tokens([_added(token) for token in (bos, eos)])
    return backend


def _byte_pairs(**values: Any) -> models.BPE:
    return models.BPE(continuing_subword_prefix="", end_of_word_suffix=END_OF_WORD, **values)


def _normalizer() -> normalizers.Normalizer:
    spaces = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    return normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="removed", invert=True)
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def _config(directory: Path) -> dict[str, Any]:
    """As transformers does: special_tokens_map.json has the last word in files older than `added_tokens_decoder`.

    That is how SD2.1 comes to pad with "!" although its tokenizer_config.json says otherwise.
    """
    config = _read_json(directory / "tokenizer_config.json")
    if "added_tokens_decoder" in config:
        return config
    return {**config, **_read_json(directory / "special_tokens_map.json")}


def _added(token: str | Mapping[str, Any]) -> tokenizers.AddedToken:
    if isinstance(token, str):
        return tokenizers.AddedToken(token, special=True, normalized=False)
    flags = {
        name: token[name]
        for name in ("lstrip", "rstrip", "single_word", "normalized")
        if name in token
    }
    return tokenizers.AddedToken(token["content"], special=True, **flags)


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _id(backend: tokenizers.Tokenizer, token: str | Mapping[str, Any], directory: Path) -> int:
    found = backend.token_to_id(_content(token))
    if found is None:
        raise ValueError(f"the tokenizer in {directory} has no token {_content(token)!r}")
    return found


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
