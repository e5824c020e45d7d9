"""The frozen networks of a run: what the directory `config.pretrained` holds."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from ldm_jax.evals.networks import SCORING, ScoringNetwork
from ldm_jax.models import weights
from ldm_jax.models.axes import TABLE
from ldm_jax.models.clip import CLIPTextConfig
from ldm_jax.models.networks import described, make_network
from ldm_jax.models.released import AUTOENCODER, TEXT
from ldm_jax.models.t5 import T5Config
from ldm_jax.models.text import T5_LENGTH, Ids, Text
from ldm_jax.models.tiling import decode_tiled
from ldm_jax.models.tokenizer import Tokenizer
from ldm_jax.parallel import shardings
from ldm_jax.runs.config import EMBEDDED, RunConfig
from ldm_jax.types import Cond, Images, Latent, Params, Tokens


class Network(NamedTuple):
    """A frozen network: its config, its functions, its parameters, and the tokenizer of its own directory, if any."""

    config: Any
    apply: Callable[..., Any]
    params: Params
    tokenizer: Tokenizer | None = None


ScoringNetworks = Mapping[str, Network]  # by name, rows of `SCORING`


class Pretrained(NamedTuple):
    """The frozen networks of a run; of those that score (`SCORING`) the ones that are there."""

    autoencoder: Network
    text: Text
    text_params: tuple[Params, ...]
    scoring: ScoringNetworks
    tile: int  # latent rows and columns that are decoded at a time; 0: all
    beside: Mapping[str, Network] = MappingProxyType(
        {}
    )  # those that the objective asks for, by name

    @property
    def params(self) -> Params:
        """The parameters of all networks, an argument of the jitted programs."""
        scoring = {name: network.params for name, network in self.scoring.items()}
        beside = {name: network.params for name, network in self.beside.items()}
        own = {"autoencoder": self.autoencoder.params, "text": self.text_params}
        return {**scoring, **beside, **own}

    def encode(self, frozen: Params, text: Tokens | Cond) -> Cond:
        """Tokens through the text encoders; text that is encoded already as it is."""
        return text if isinstance(text, Cond) else self.text.encode(frozen["text"], text)

    def encode_images(self, frozen: Params, images: Images) -> Latent:
        """Images in [-1, 1] to scaled latents."""
        return self.autoencoder.apply(frozen["autoencoder"], images, method="encode_mode")

    def decode(self, frozen: Params, latents: Latent) -> Images:
        """Scaled latents to images, in tiles that overlap by a quarter where `sampling.tile` says so."""
        apply, factor = self.autoencoder.apply, self.autoencoder.config.downsampling
        decode = functools.partial(apply, frozen["autoencoder"], method="decode")
        if not self.tile:
            return decode(latents)
        return decode_tiled(decode, latents, tile=self.tile, overlap=self.tile // 4, factor=factor)


def load_pretrained(config: RunConfig, mesh: Mesh, scoring: ScoringNetworks) -> Pretrained:
    """Reads the directory `config.pretrained`, in Stable Diffusion's layout as diffusers writes it, onto the mesh.

    That is `vae`, `text_encoder` and `tokenizer`, and in SDXL's case `text_encoder_2` and `tokenizer_2`; `scoring` is
    what `load_scoring` returns. The text encoders are read as `config.text_precision` and compute in it; all else is
    float32.

    Raises:
      FileNotFoundError, ValueError: no such directory, weights that are missing or of another shape, or a
        tokenizer that does not fit its text encoder.
    """
    directory, load = pretrained_directory(config), _loader(config, mesh)
    text, text_params = _load_text(directory, config, load)
    autoencoder = load(directory / "vae")
    return Pretrained(autoencoder, text, text_params, scoring, config.sampling.tile)


def load_scoring(config: RunConfig, mesh: Mesh) -> ScoringNetworks:
    """Reads the networks that score, those of `SCORING` that are there, by name.

    Each is a directory in the layout of transformers or of `ldm_jax.convert`: the one that `eval.networks` names, or
    the one of its name in `config.pretrained`. Embedded are `clip` and `reader`, which answers questions about scenes.

    Raises:
      FileNotFoundError, ValueError: as `load_pretrained`; or a directory that the config names is not there.
    """
    directory, load = pretrained_directory(config), _loader(config, mesh)
    networks = {}
    for name, row in SCORING.items():
        named = getattr(config.eval.networks, name)
        path = Path(named or directory / name)
        if path.is_dir():
            networks[name] = _load_scoring(name, row, path, load)
        elif named:
            raise FileNotFoundError(
                f"eval.networks.{name} is {named!r}, and there is no such directory"
            )
    return networks


def _load_scoring(
    name: str, row: ScoringNetwork, path: Path, load: Callable[..., Network]
) -> Network:
    network = load(path)
    if not isinstance(network.config, row.config):
        kind = type(network.config).__name__.removesuffix("Config")
        raise ValueError(f"{path} holds a network of the kind {kind}, and is to be the {name}")
    if row.text is None:
        return network
    text = row.text(network.config)
    tokenizer = Tokenizer.from_directory(path, positions=text.max_position_embeddings)
    _check_tokenizer(path, tokenizer, text)
    return network._replace(tokenizer=tokenizer)


def _loader(config: RunConfig, mesh: Mesh) -> Callable[..., Network]:
    place = functools.partial(shardings, table=TABLE, rules=config.mesh.pairs, mesh=mesh)
    return functools.partial(_load, place=place)


def abstract_pretrained(config: RunConfig, mesh: Mesh) -> tuple[Pretrained, str]:
    """As `load_pretrained`, of shapes alone, with all that training and sampling need; and where the shapes are from.

    Of a directory the files config.json are enough. The embedded networks stand for none: where the backbone reads
    another width of text than theirs, the networks are those of the released pipeline that has it.

    Raises:
      FileNotFoundError, ValueError: as `load_pretrained`; or no released pipeline has this width of text.
    """
    directory, released = pretrained_directory(config), TEXT.get(config.backbone.text_width)
    autoencoder, texts = AUTOENCODER, ()
    if config.pretrained != EMBEDDED or released is None:
        origin = str(config.pretrained)
        autoencoder = described(directory / "vae")[1]
        parts = (directory / f"text_encoder{number}" for number in ("", "_2"))
        texts = [described(part)[1] for part in parts if part.is_dir()]
    else:
        origin, texts = released
    texts = [dataclasses.replace(text, dtype=config.text_precision) for text in texts]
    place = functools.partial(shardings, table=TABLE, rules=config.mesh.pairs, mesh=mesh)
    vae = _abstract(autoencoder, "float32", place)
    networks = [_abstract(text, config.text_precision, place) for text in texts]
    ids = tuple(
        Ids(T5_LENGTH) if isinstance(text, T5Config) else Ids(text.max_position_embeddings)
        for text in texts
    )
    text, params = _as_one(ids, networks, config)
    return Pretrained(vae, text, params, {}, config.sampling.tile), origin


def _abstract(config: Any, dtype: str, place: Callable[[Params], Any]) -> Network:
    init, apply = make_network(config)
    shapes = jax.eval_shape(init, jax.random.key(0))
    params = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=where),
        *(shapes, place(shapes)),
    )
    return Network(config, apply, params)


def _load_text(
    directory: Path, config: RunConfig, load: Callable[..., Network]
) -> tuple[Text, tuple[Params, ...]]:
    """The text encoders, of which a directory has one or two, and their parameters."""
    networks, tokenizers = [], []
    for number in ("", "_2"):
        path = directory / f"text_encoder{number}"
        if number and not path.is_dir():
            continue
        network = load(path, config.text_precision)
        if isinstance(network.config, T5Config):
            length = {"max_length": T5_LENGTH}
        else:
            length = {"positions": network.config.max_position_embeddings}
        tokenizer = Tokenizer.from_directory(directory / f"tokenizer{number}", **length)
        _check_tokenizer(directory, tokenizer, network.config)
        networks.append(network)
        tokenizers.append(tokenizer)
    return _as_one(tokenizers, networks, config)


def _as_one(
    tokenizers: Sequence[Tokenizer | Ids], networks: Sequence[Network], config: RunConfig
) -> tuple[Text, tuple[Params, ...]]:
    """Joins text encoders and their tokenizers; returns their parameters beside them."""
    configs, applies = [each.config for each in networks], [each.apply for each in networks]
    text = Text(tuple(tokenizers), tuple(configs), tuple(applies), config.data.size)
    return text, tuple(network.params for network in networks)


def _check_tokenizer(
    directory: Path, tokenizer: Tokenizer, text: CLIPTextConfig | T5Config
) -> None:
    """An id that the network does not embed would become NaN without a word."""
    checks = [("vocabulary", tokenizer.vocab_size, text.vocab_size)]
    if isinstance(text, CLIPTextConfig):
        checks.append(("model_max_length", tokenizer.max_length, text.max_position_embeddings))
    for name, given, allowed in checks:
        if given > allowed:
            raise ValueError(
                f"{directory}: the tokenizer's {name} is {given}, and the text encoder has embeddings for {allowed}"
            )


def pretrained_directory(config: RunConfig) -> Path:
    """Where the frozen networks are."""
    if config.pretrained == EMBEDDED:
        return Path(__file__).parents[1] / "assets" / "scenes"
    directory = Path(config.pretrained)
    if not directory.is_dir():
        raise FileNotFoundError(
            f"config.pretrained is {config.pretrained!r}, which is no directory; give one in Stable Diffusion's "
            f"layout (vae, text_encoder, tokenizer), or {EMBEDDED!r}"
        )
    return directory


def _load(directory: Path, dtype: str = "float32", *, place: Callable[[Params], Any]) -> Network:
    """The network, placed by the mesh's rules, its parameters and its computation in `dtype`."""
    kind, config = described(directory)
    if dtype != "float32":
        config = dataclasses.replace(config, dtype=dtype)
    init, apply = make_network(config)
    shapes = jax.eval_shape(init, jax.random.key(0))
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)
    params = weights.load(directory, like, kind.names(config), shardings=place(like))
    return Network(config, apply, params)
