"""What transformers writes beside a tokenizer: its length, its special tokens, and those that were added later."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from ldm_jax.models.json_files import Fields, naming, read_json, typed

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
Token = str | dict[str, Any]

_UNLIMITED = 10**6  # transformers writes 10**30 for a model without a limit
# Types of what transformers writes into tokenizer_config.json and special_tokens_map.json, and of a token in them.
_FIELDS: dict[str, tuple[Any, Any]] = {
    **dict.fromkeys(SPECIAL, (str | dict | None, None)),
    "model_max_length": (int | float | None, None),
    "extra_ids": (int, 100),
    "added_tokens_decoder": (dict | None, None),
    "additional_special_tokens": (tuple[str | dict, ...] | None, None),
    "extra_special_tokens": (tuple[str | dict, ...] | dict | None, None),
}
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
_TOKEN: dict[str, tuple[Any, Any]] = {"content": (str, None), **dict.fromkeys(_FLAGS, (bool, None))}


def read_config(directory: Path) -> dict[str, Any]:
    """Reads what counts here, as transformers does.

    special_tokens_map.json has the last word in files older than `added_tokens_decoder`: so SD2.1 comes to pad with
    "!" although its tokenizer_config.json says otherwise. Raises ValueError for a value of another type, with the
    names of its file and of its field.
    """
    config = _settings(directory / "tokenizer_config.json")
    if "extra_special_tokens" not in config:  # their name in transformers 5
        config["extra_special_tokens"] = config.pop("additional_special_tokens", None)
    if config.get("added_tokens_decoder") is not None:
        return config
    return {**config, **_settings(directory / "special_tokens_map.json")}


def _settings(path: Path) -> dict[str, Any]:
    """The fields of a file that count here, of which it may lack any; no file is an empty one."""
    values = read_json(path) if path.is_file() else {}
    with naming(path):
        settings = _present(values, _FIELDS)
        tokens = [settings.get(name) for name in SPECIAL]
        tokens += settings.get("additional_special_tokens") or ()
        tokens += _listed(settings.get("extra_special_tokens"))
        tokens += (settings.get("added_tokens_decoder") or {}).values()
        for token in tokens:
            _check_token(token)
    return settings


def _present(values: Mapping[str, Any], fields: Fields) -> dict[str, Any]:
    return typed(values, {name: fields[name] for name in fields if name in values}, free=fields)


def _check_token(token: Any) -> None:
    """Raises ValueError for what is neither a text nor an object with one, such as transformers writes a token."""
    if isinstance(token, dict) and "content" in token:
        _present(token, _TOKEN)
    elif not isinstance(token, str | None):
        raise ValueError(
            f"a token is {token!r}; it must be a string, or an object with its content"
        )


def length_of(directory: Path, config: Mapping[str, Any]) -> int | None:
    """Returns `model_max_length`, or None where it is absent or so large that it is no limit."""
    length = config.get("model_max_length")
    if length is None or length >= _UNLIMITED:
        return None
    if not length >= 1 or length % 1:
        raise ValueError(
            f"{directory}/tokenizer_config.json: model_max_length is {length}; it must be a number of tokens from 1 on"
        )
    return int(length)


def _listed(tokens: Sequence[Any] | Mapping[str, Any] | None) -> Sequence[Any]:
    return list(tokens.values() if isinstance(tokens, dict) else tokens or ())


def extra_tokens(config: Mapping[str, Any]) -> Sequence[Token]:
    """Returns the special tokens without a role."""
    return _listed(config.get("extra_special_tokens") or config.get("additional_special_tokens"))


def added_tokens(
    directory: Path, config: Mapping[str, Any], stored: Mapping[int, tokenizers.AddedToken]
) -> dict[int, tokenizers.AddedToken]:
    """Reads the tokens that were added after training, by their ids, from the files that transformers takes.

    That is tokenizer_config.json; beside an older one, added_tokens.json, whose special tokens are matched before a
    text is normalised and the others after it, and tokenizer.json, of which they are `stored`.
    """
    if (decoder := config.get("added_tokens_decoder")) is not None:
        with naming(directory / "tokenizer_config.json"):
            return {_number(key): _as_written(token) for key, token in decoder.items()}
    path = directory / "added_tokens.json"
    values = read_json(path) if path.is_file() else {}
    with naming(path):
        ids = typed(values, dict.fromkeys(values, (int, None)), free=values)
        given = {*ids.items(), *((token.content, number) for number, token in stored.items())}
        if len({number for _, number in given}) < len(given):
            raise ValueError(f"two tokens have one id: {sorted(given)}")
    named = [config[name] for name in SPECIAL if config.get(name)]
    special = {content_of(token) for token in (*named, *_listed(config["extra_special_tokens"]))}
    added = {
        number: tokenizers.AddedToken(content, special=content in special)
        for content, number in ids.items()
    }
    return {**added, **stored}


def _number(key: str) -> int:
    if not (key.isascii() and key.isdecimal() and len(key) < 10):
        raise ValueError(f"added_tokens_decoder has a token of the id {key!r}; it must be a number")
    return int(key)


def _as_written(token: Any) -> tokenizers.AddedToken:
    if not isinstance(token, dict):
        raise ValueError(f"added_tokens_decoder has the token {token!r}; it must be an object")
    flags = {name: token[name] for name in _FLAGS if name in token}
    return tokenizers.AddedToken(token["content"], **flags)


def special_token(token: Token) -> tokenizers.AddedToken:
    """Makes a special token, which is matched as it is written unless it says otherwise."""
    if isinstance(token, str):
        return tokenizers.AddedToken(token, special=True, normalized=False)
    return _as_written({**token, "special": True})


def content_of(token: Token) -> str:
    """Returns a token's text."""
    return token if isinstance(token, str) else token["content"]
