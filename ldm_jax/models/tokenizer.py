"""Captions to token ids: tokenizer directories as transformers writes them, and a trainer of small ones."""

import dataclasses
import io
import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int32
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from ldm_jax.models.tokenizer_config import (
    SPECIAL,
    Token,
    added_tokens,
    content_of,
    extra_tokens,
    length_of,
    read_config,
    special_token,
)

BOS, EOS = "<|startoftext|>", "<|endoftext|>"  # CLIP's
END_OF_WORD = "</w>"
NUM_BASE = 2 * 256 + 2  # every byte, inside a word and at its end, and the two special tokens

_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
_T5_SPECIAL = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
_T5_SPACE: dict[str, Any] = {"replacement": "\u2581", "prepend_scheme": "always"}
_Merges = list[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Captions to ids of one length; can be pickled, so that data workers can have it.

    `pad_id` is the end token's in SD1.5, the one of "!", 0, in SD2.1 and in SDXL's second tokenizer, and 0 in T5,
    whose captions have an end token and no start token. `vocab_size` is how many embeddings it needs.
    """

    backend: tokenizers.Tokenizer
    max_length: int
    pad_id: int
    eos_id: int

    @classmethod
    def from_directory(
        cls,
        path: str | os.PathLike,
        max_length: int | None = None,
        *,
        positions: int | None = None,
    ) -> "Tokenizer":
        """Reads tokenizer.json, CLIP's vocab.json and merges.txt, or T5's spiece.model, and what is kept beside them.

        That includes tokens that were added later, as textual inversion does. `max_length` is that of
        tokenizer_config.json unless it is given (PixArt gives T5 120); where neither says it, it is `positions`, of
        which the text encoder has as many. Raises FileNotFoundError where the files are missing, ValueError where
        nothing says the length or a file is not what its name says.
        """
        directory = Path(path)
        config = read_config(directory)
        backend = _backend(directory, config)
        backend.no_padding()
        backend.no_truncation()
        default = _T5_SPECIAL if isinstance(backend.model, models.Unigram) else {"eos_token": EOS}
        given = {name: config.get(name) or default.get(name) for name in SPECIAL}
        special = {name: token for name, token in given.items() if token}
        is_whole = (directory / "tokenizer.json").is_file()
        stored = backend.get_added_tokens_decoder() if is_whole else {}
        added = added_tokens(directory, config, stored)
        _add(backend, added, directory)
        ids = {name: _id(backend, token, directory) for name, token in special.items()}
        seen = {token.content for token in added.values()}
        others = [*special.values(), *extra_tokens(config)]
        backend.add_special_tokens(
            [special_token(token) for token in others if content_of(token) not in seen]
        )
        length = max_length or length_of(directory, config) or positions
        if not length:
            raise ValueError(
                f"{directory}/tokenizer_config.json sets no model_max_length, and no max_length is given"
            )
        eos = ids["eos_token"]
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
    names = dict(zip(SPECIAL, (BOS, EOS, EOS, EOS), strict=True))
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
    names = ("tokenizer.json", "vocab.json", "merges.txt", "spiece.model")
    whole, vocab, merges, pieces = (directory / name for name in names)
    try:
        if whole.is_file():
            return tokenizers.Tokenizer.from_file(str(whole))
        if vocab.is_file() and merges.is_file():
            return _clip(*models.BPE.read_file(str(vocab), str(merges)), config)
        if pieces.is_file():
            return _t5(pieces.read_bytes(), config)
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"the tokenizer in {directory} cannot be read: {error}") from None
    found = sorted(file.name for file in directory.iterdir()) if directory.is_dir() else []
    raise FileNotFoundError(
        f"no tokenizer in {directory}: looked for tokenizer.json, vocab.json and merges.txt, or spiece.model; "
        f"there is {', '.join(found) or 'nothing'}"
    )


def _clip(
    vocab: Mapping[str, int], merges: _Merges, names: Mapping[str, Any]
) -> tokenizers.Tokenizer:
    """CLIP's way from text to ids: lower case, words, bytes, byte pairs, between a start and an end token."""
    bos, eos, unk = (
        content_of(names.get(name, default))
        for name, default in (("bos_token", BOS), ("eos_token", EOS), ("unk_token", EOS))
    )
    backend = tokenizers.Tokenizer(_byte_pairs(vocab=vocab, merges=merges, unk_token=unk))
    backend.normalizer, backend.pre_tokenizer = _normalizer(), _pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.RobertaProcessing(
        (eos, vocab[eos]), (bos, vocab[bos]), trim_offsets=False, add_prefix_space=False
    )
    backend.add_special_tokens([special_token(token) for token in (bos, eos)])
    return backend


def _t5(spiece: bytes, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """T5's way from text to ids: words, each cut into its likeliest pieces (Kudo 2018, arXiv:1804.10959), and an end.

    After the pieces come `extra_ids` tokens, which stand for gaps in the text that T5 itself was trained to fill.
    """
    pieces, unknown, normal_form = _read_spiece(spiece)
    gaps = [f"<extra_id_{i}>" for i in reversed(range(config.get("extra_ids", 100)))]
    backend = tokenizers.Tokenizer(
        models.Unigram([*pieces, *((gap, 0.0) for gap in gaps)], unknown)
    )
    if normal_form:
        backend.normalizer = normalizers.Precompiled(normal_form)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**_T5_SPACE)]
    )
    backend.decoder = decoders.Metaspace(**_T5_SPACE)
    eos = content_of(config.get("eos_token") or _T5_SPECIAL["eos_token"])
    backend.post_processor = processors.TemplateProcessing(
        single=["$A", eos], special_tokens=[(eos, backend.token_to_id(eos))]
    )
    backend.add_special_tokens([special_token(gap) for gap in gaps])
    return backend


def _read_spiece(data: bytes) -> tuple[list[tuple[str, float]], int, bytes]:
    """Pieces and their log probabilities, the id of the unknown one, and the rules of the normal form, compiled.

    The numbers of the fields are those of SentencePiece's sentencepiece_model.proto. Raises ValueError for a model of
    another kind than T5's.
    """
    model = _fields(data)
    trainer, normalizer = (_fields(model.get(number, [b""])[-1]) for number in (2, 3))
    if 1 not in model or trainer.get(3, [1])[-1] != 1:
        raise ValueError("spiece.model holds no unigram model")
    pieces = []
    for piece in map(_fields, model[1]):
        (score,) = struct.unpack("<f", piece.get(2, [bytes(4)])[-1])
        pieces.append((piece[1][-1].decode(), score))
    return pieces, trainer.get(40, [0])[-1], normalizer.get(2, [b""])[-1]


def _fields(message: bytes) -> dict[int, list[Any]]:
    """The fields of a Protocol Buffers message by their numbers: integers as such, everything else as bytes."""
    fields, data = {}, io.BytesIO(message)
    while tag := _varint(data):
        number, kind = tag >> 3, tag & 7
        value = _varint(data) if kind == 0 else data.read({1: 8, 5: 4}.get(kind) or _varint(data))
        fields.setdefault(number, []).append(value)
    return fields


def _varint(data: io.BytesIO) -> int:
    """Seven bits a byte, the lowest first; the highest bit says that more follow. 0 at the end of the data."""
    value, shift = 0, 0
    while byte := data.read(1):
        value |= (byte[0] & 127) << shift
        shift += 7
        if byte[0] < 128:
            break
    return value


def _byte_pairs(**values: Any) -> models.BPE:
    return models.BPE(continuing_subword_prefix="", end_of_word_suffix=END_OF_WORD, **values)


def _normalizer() -> normalizers.Normalizer:
    spaces = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    return normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="removed", invert=True)
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def _add(
    backend: tokenizers.Tokenizer, added: Mapping[int, tokenizers.AddedToken], directory: Path
) -> None:
    """Adds tokens in the order of their ids, and checks that each gets its own.

    Raises ValueError where one does not: its embedding would be another token's.
    """
    backend.add_tokens([added[number] for number in sorted(added)])
    for number, token in added.items():
        if (found := backend.token_to_id(token.content)) != number:
            raise ValueError(
                f"the tokenizer in {directory} gives the added token {token.content!r} the id {number}, and"
                f" its vocabulary gives it {found}"
            )


def _id(backend: tokenizers.Tokenizer, token: Token, directory: Path) -> int:
    found = backend.token_to_id(content_of(token))
    if found is None:
        raise ValueError(f"the tokenizer in {directory} has no token {content_of(token)!r}")
    return found


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
