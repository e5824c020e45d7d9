"""One command line for all commands: `--config=configs/x.py --config.a.b=value --workdir=RUN`.

A config file is Python with `get_config() -> ConfigDict` (or `get_config(argument)`, reached by
`--config=configs/x.py:argument`), made by `settings.schema.to_config_dict`. Without `--config` the
config is the one that the run in the working directory was started with. What a user got wrong is
said in one line on standard error, with exit code 2 for the command line and 1 for all else.
"""

import argparse
import contextlib
import functools
import importlib.util
import inspect
import logging
import os
import re
import shutil
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, TypeVar

from etils import epath
from ml_collections import config_dict

import ldm_jax
from ldm_jax.settings import fields, schema
from ldm_jax.settings.paths import home_path
from ldm_jax.settings.reading import read_value
from ldm_jax.settings.schema import CONFIG_FILE, Setting
from ldm_jax.settings.suggestions import same_name, unknown_setting

HELP_COLUMN = 46
_MISSING_KEY = re.compile(r"^(Key \W)?(?P<key>\w+)(\W does not exist|$)")
_NEAREST_KEY = re.compile(r"Did you mean \W(\w+)")
USER_ERRORS = (ValueError, OSError, FloatingPointError)

Value = TypeVar("Value")
AddFlags = Callable[[argparse.ArgumentParser], None]
ConfigOf = Callable[[argparse.Namespace], Any]


class UsageError(ValueError):
    """The command line, or the config file that it names, cannot be used."""


def run_command(
    main: Callable[[argparse.Namespace], None],
    cls: type | None = None,
    *,
    description: str,
    add_flags: AddFlags | None = None,
    in_workdir: bool = True,
    config_of: ConfigOf | None = None,
) -> NoReturn:
    """Parses the command line, runs `main(flags)` and ends the process with its exit code.

    `cls` is the dataclass of the config, for commands that take one: `flags.config` is its
    instance. `in_workdir` says whether the command has a working directory. A `ValueError`,
    `OSError` or `FloatingPointError` is meant for the user and shown as one line (`--traceback`
    shows the stack as well); anything else is a defect and keeps its stack.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    logging.getLogger("jax").setLevel(logging.WARNING)  # or it lists the platforms it does not find
    options = {"description": description, "add_flags": add_flags, "in_workdir": in_workdir}
    options["config_of"] = config_of
    try:
        with _bucket_errors():
            flags = parse(sys.argv[1:], cls, **options)
    except UsageError as error:
        if "--traceback" in sys.argv:
            raise
        _fail(error, 2)
    except BrokenPipeError:  # the reader of --help has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        _fail(_sentence(error), 1)
    command = signal.getsignal(signal.SIGINT) is ldm_jax.end_interrupted
    try:
        if command:  # from here on there may be something to tidy up
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with _bucket_errors():
            main(flags)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except USER_ERRORS as error:
        if flags.traceback:
            raise
        _fail(_sentence(error), 2 if isinstance(error, UsageError) else 1)
    finally:
        if command:  # or Python's own tidying up shows stacks
            signal.signal(signal.SIGINT, ldm_jax.end_interrupted)
    sys.exit(0)


def parse(
    argv: Sequence[str],
    cls: type | None = None,
    *,
    description: str = "",
    add_flags: AddFlags | None = None,
    in_workdir: bool = True,
    config_of: ConfigOf | None = None,
) -> argparse.Namespace:
    """The flags; `config` is an instance of `cls`, `workdir` a path. `--help` prints and exits.

    `config_of(flags)` gives the config where other flags of the command name it, or else None; the working directory is
    then not required.

    Raises:
      UsageError: in one sentence, what was given, and what is allowed.
    """
    overrides, rest = _split(argv)
    parser = _parser(description, cls, add_flags, in_workdir, required=config_of is None)
    if "--help" in rest or "-h" in rest:
        print(_help(parser, rest, cls), flush=True)
        sys.exit(0)
    flags, unknown = parser.parse_known_args(rest)
    if unknown or (overrides and cls is None):
        first = unknown[0] if unknown else f"--config.{overrides[0][0]}"
        raise UsageError(
            f"there is no {first} here; --help lists what can be given{same_name(first, cls)}"
        )
    if cls is not None:
        given = config_of(flags) if config_of and flags.config is None else None
        flags.config = _config(flags, overrides, cls, given)
    return flags


def load_config(reference: str) -> config_dict.ConfigDict:
    """What `get_config` in the file returns; a reference is `path.py` or `path.py:argument`.

    Raises:
      UsageError: no such file, no `get_config` in it, or an error in it (with the line).
    """
    path, colon, argument = home_path(reference).partition(":")
    if not Path(path).is_file():
        raise UsageError(f"--config={reference}: there is no file {path}")
    try:
        get_config = getattr(_module(path), "get_config", None)
        if get_config is None:
            raise UsageError(f"--config={reference}: {path} defines no get_config()")
        if colon and not inspect.signature(get_config).parameters:
            raise UsageError(f"--config={reference}: get_config() of {path} takes no argument")
        config = get_config(argument) if colon else get_config()
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(_in_file(error, path)) from error
    if not isinstance(config, config_dict.ConfigDict):
        kind = type(config).__name__
        raise UsageError(f"--config={reference}: get_config() returned {kind}, not a ConfigDict")
    return config


def in_words(read: Callable[[str], Value]) -> Callable[[str], Value]:
    """A type of flags for argparse, which shows what a ValueError of `read` says."""

    @functools.wraps(read)
    def typed(text: str) -> Value:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(error) from error

    return typed


@in_words
def any_path(text: str) -> epath.Path:
    """A flag's path, on a disk or in a bucket."""
    if "://" in text and not text.startswith("gs://"):
        raise ValueError(f"{text!r} is neither on a disk nor gs://BUCKET/...")
    return epath.Path(home_path(text))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _split(argv: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """The pairs of `--config.a.b=value` (or `--config.a.b value`), and all other words."""
    overrides, rest = [], []
    words = iter(argv)
    for word in words:
        if not word.startswith("--config."):
            rest.append(word)
            continue
        path, equals, text = word.removeprefix("--config.").partition("=")
        value = text if equals else next(words, None)
        if value is None:
            raise UsageError(f"{word} needs a value: {word}=VALUE")
        overrides.append((path, value))
    return overrides, rest


def _parser(
    description: str,
    cls: type | None,
    add_flags: AddFlags | None,
    in_workdir: bool,
    *,
    required: bool,
) -> _Parser:
    parser = _Parser(
        prog=f"python -m {_program()}" if _specification() else _program(),
        description=description.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    if cls is not None:
        text = "Python file with get_config(); without it, the config of the run in --workdir"
        parser.add_argument("--config", metavar="FILE[:ARGUMENT]", help=text)
        text = "another value for one setting of the config (listed below)"
        parser.add_argument("--config.KEY", metavar="VALUE", help=text)
    if in_workdir:
        text = "directory of the run, on a disk or gs://BUCKET/DIRECTORY"
        kind = {"type": any_path, "metavar": "DIRECTORY"}
        parser.add_argument("--workdir", required=required, **kind, help=text)
    if add_flags is not None:
        add_flags(parser)
    text = "show the stack of an error too"
    parser.add_argument("--traceback", action="store_true", help=text)
    parser.add_argument("--help", "-h", action="store_true", help="this text")
    return parser


def _config(
    flags: argparse.Namespace, overrides: list[tuple[str, str]], cls: type, given: Any = None
) -> Any:
    if given is not None:
        config = schema.to_config_dict(given)
    elif flags.config is not None:
        config = _complete(load_config(flags.config), schema.to_config_dict(cls()))
    elif not hasattr(flags, "workdir"):
        return None  # the command says whether it wants one
    elif flags.workdir is None:
        raise UsageError("--workdir=DIRECTORY is missing; --help lists what can be given")
    elif (stored := flags.workdir / CONFIG_FILE).is_file():
        config = schema.to_config_dict(_stored(stored, cls))
    else:
        raise UsageError(f"--config is missing, and {flags.workdir} has no {CONFIG_FILE} to go by")
    table = {setting.path: setting for setting in schema.settings(cls)}
    try:
        for path, text in overrides:
            _override(config, path, text, table)
        for path, _ in overrides:
            _require_chosen(config, path, table)
        return schema.with_absolute_paths(schema.from_config_dict(config, cls))
    except ValueError as error:
        raise UsageError(error) from error


def _complete(
    config: config_dict.ConfigDict, defaults: config_dict.ConfigDict
) -> config_dict.ConfigDict:
    """The config with defaults for the settings that its file leaves out, so that they can be overridden."""
    with config.unlocked():
        for key, default in defaults.items():
            if key not in config:
                config[key] = defaults.get_ref(key)  # which knows its type even where it is None
            elif isinstance(default, config_dict.ConfigDict) and isinstance(
                config[key], config_dict.ConfigDict
            ):
                _complete(config[key], default)
    return config


def _stored(path: epath.Path, cls: type) -> Any:
    try:
        return schema.from_json(path.read_text(), cls)
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error


def _override(
    config: config_dict.ConfigDict, path: str, text: str, table: dict[str, Setting]
) -> None:
    if path not in table:
        raise UsageError(unknown_setting(path, list(table)))
    *sections, leaf = path.split(".")
    for section in sections:
        config = config[section]
    config[leaf] = _value(text, table[path])


def _value(text: str, setting: Setting) -> Any:
    where = f"--config.{setting.path}"
    if setting.kind is str and setting.names is not None:
        return fields.check_name(text, setting.names, where)
    value = read_value(text, setting.kind, where)
    fields.check_value(value, setting.metadata, where)
    return value


def _require_chosen(config: config_dict.ConfigDict, path: str, table: dict[str, Setting]) -> None:
    """Raises UsageError for a setting of a row that is not chosen: it would count for nothing."""
    keys = path.split(".")
    for depth, key in enumerate(keys):
        name = ".".join([*keys[:depth], "name"])
        rows = table[name].names if name in table else None
        if key in (rows or ()) and config["name"] != key:
            raise UsageError(
                f"--config.{path} counts only where --config.{name} is {key!r}, and it is {config['name']!r}; add"
                f" --config.{name}={key}"
            )
        config = config[key]


def _module(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("config_file", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _in_file(error: Exception, path: str) -> str:
    """An error in a config file in one line: where, the source line, what is wrong."""
    if isinstance(error, SyntaxError):
        return f"{path}, line {error.lineno}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).resolve() == Path(path).resolve()]
    place = f"{path}, line {own[-1].lineno}, {own[-1].line}" if own else path
    return f"{place}: {_reason(error)}"


def _reason(error: Exception) -> str:
    """An error's first line; ConfigDict's word for a missing key, a page of values, is shortened."""
    text = str(error.args[0] if error.args else type(error).__name__)
    found = _MISSING_KEY.search(text.strip("'\""))
    if found and isinstance(error, KeyError | AttributeError):
        key, nearest = found["key"], _NEAREST_KEY.search(text)
        return f"there is no key {key!r}" + (f" (did you mean {nearest[1]!r}?)" if nearest else "")
    return text.partition("\n")[0]


def _help(parser: argparse.ArgumentParser, rest: list[str], cls: type | None) -> str:
    text = parser.format_help()
    if cls is None:
        return text.rstrip()
    file = parser.parse_known_args([*rest, "--workdir=."])[0].config
    defaults = schema.to_config_dict(cls())
    config = _complete(load_config(file), defaults) if file else defaults
    values = f"as {file} has them" if file else "with the defaults"
    return f"{text}\nsettings, {values}:{''.join(_setting_lines(config, cls))}"


def _setting_lines(config: config_dict.ConfigDict, cls: type) -> Iterator[str]:
    section = None
    for setting in schema.settings(cls):
        if section != (section := setting.path.rpartition(".")[0]):
            yield "\n"
        value = config
        for key in setting.path.split("."):
            value = value[key]
        yield _row(
            f"--config.{setting.path}={value}", f"{setting.help} [{setting.allowed}]".strip()
        )


def _row(left: str, right: str) -> str:
    """Two columns; the right one is wrapped, and begins a line lower where the left one is long."""
    width = max(80, shutil.get_terminal_size((100, 24)).columns)
    lines = textwrap.wrap(right, width - HELP_COLUMN, break_on_hyphens=False)
    head = f"  {left}"
    if len(head) < HELP_COLUMN:
        head, lines = f"{head:<{HELP_COLUMN}}{lines[0]}", lines[1:]
    return "\n".join(["", head, *(" " * HELP_COLUMN + line for line in lines)])


@contextlib.contextmanager
def _bucket_errors() -> Iterator[None]:
    """Makes an OSError of what TensorFlow, which reads and writes buckets for `epath`, says of one."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.startswith("tensorflow."):
            raise OSError(str(error)) from error
        raise


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _program() -> str:
    spec = _specification()
    return spec.name if spec else Path(sys.argv[0]).name


def _specification() -> ModuleSpec | None:
    """What `python -m` was given; None for a script."""
    return getattr(sys.modules["__main__"], "__spec__", None)


def _fail(message: object, code: int) -> NoReturn:
    print(f"{_program()}: {message}", file=sys.stderr)
    sys.exit(code)
