"""The frozen networks of a run: what the directory `config.pretrained` holds."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from ldm_jax.config import EMBEDDED, RunConfig
from ldm_jax.models import weights
from ldm_jax.models.axes import TABLE
from ldm_jax.models.clip import CLIPConfig, CLIPTextConfig
from ldm_jax.models.dinov2 import Dinov2Config
from ldm_jax.models.inception import InceptionConfig
from ldm_jax.models.lpips import LPIPSConfig
from ldm_jax.models.networks import described, make_network
from ldm_jax.models.reader import ReaderConfig
from ldm_jax.models.released import AUTOENCODER, TEXT
from ldm_jax.models.t5 import T5Config
from ldm_jax.models.text import T5_LENGTH, Ids, Text
from ldm_jax.models.tiling import decode_tiled
from ldm_jax.models.tokenizer import Tokenizer
from ldm_jax.parallel import shardings
from ldm_jax.types import Cond, Images, Latent, Params, Tokens

# The networks that score, by the name of their directory.
SCORING = {
    "clip": CLIPConfig,
    "reader": ReaderConfig,
    "inception": InceptionConfig,
    "dinov2": Dinov2Config,
    "lpips": LPIPSConfig,
}


class Network(NamedTuple):
    """A frozen network: its config, its functions, and its parameters."""

    config: Any
    apply: Callable[..., Any]
    params: Params


class Pretrained(NamedTuple):
    """The frozen networks of a run; of those that score, by name (`SCORING`), the ones that are there."""

    autoencoder: Network
    text: Text
    text_params: tuple[Params, ...]
    scoring: Mapping[str, Network]
    clip_tokenizer: Tokenizer | None
    tile: int  # latent rows and columns that are decoded at a time; 0: all

    @property
    def params(self) -> Params:
        """The parameters of all networks, an argument of the jitted programs."""
        scoring = {name: network.params for name, network in self.scoring.items()}
        return {**scoring, "autoencoder": self.autoencoder.params, "text": self.text_params}

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


def load_pretrained(config: RunConfig, mesh: Mesh) -> Pretrained:
    """Reads the directory `config.pretrained`, in Stable Diffusion's layout as diffusers writes it, onto the mesh.

    That is `vae`, `text_encoder` and `tokenizer`, and in SDXL's case `text_encoder_2` and `tokenizer_2`; what scores is
    as `load_scoring` has it. The text encoders are read as `config.text_precision` and compute in it; all else is
    float32.

    Raises:
      FileNotFoundError, ValueError: no such directory, weights that are missing or of another shape, or a
        tokenizer that does not fit its text encoder.
    """
    directory, load = pretrained_directory(config), _loader(config, mesh)
    scoring, tokenizer = load_scoring(config, mesh)
    text, text_params = _load_text(directory, config, load)
    return Pretrained(
        autoencoder=load(directory / "vae"),
        text=text,
        text_params=text_params,
        scoring=scoring,
        clip_tokenizer=tokenizer,
        tile=config.sampling.tile,
    )


def load_scoring(config: RunConfig, mesh: Mesh) -> tuple[dict[str, Network], Tokenizer | None]:
    """The networks that score, by name, and CLIP's tokenizer: those of `SCORING` that are there.

    Each is a directory in the layout of transformers or of `ldm_jax.convert`: the one that `config.eval` names, or the
    one of its name in `config.pretrained`. Embedded are `clip` and `reader`, which answers questions about scenes.

    Raises:
      FileNotFoundError, ValueError: as `load_pretrained`; or a directory that the config names is not there.
    """
    directory, load = pretrained_directory(config), _loader(config, mesh)
    networks = {}
    for name in SCORING:
        named = getattr(config.eval, name, None)
        path = Path(named or directory / name)
        if path.is_dir():
            networks[name] = load(path)
            _check_kind(networks[name], name, path)
        elif named:
            raise FileNotFoundError(f"eval.{name} is {named!r}, and there is no such directory")
    if "clip" not in networks:
        return networks, None
    path = Path(config.eval.clip or directory / "clip")
    text = networks["clip"].config.text
    tokenizer = Tokenizer.from_directory(path, positions=text.max_position_embeddings)
    _check_tokenizer(path, tokenizer, text)
    return networks, tokenizer


def _check_kind(network: Network, name: str, path: Path) -> None:
    if not isinstance(network.config, SCORING[name]):
        kind = type(network.config).__name__.removesuffix("Config")
        raise ValueError(f"{path} holds a network of the kind {kind}, and is to be the {name}")


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
    configs, applies, params = zip(
        *(_abstract(text, config.text_precision, place) for text in texts), strict=True
    )
    ids = tuple(
        Ids(T5_LENGTH) if isinstance(text, T5Config) else Ids(text.max_position_embeddings)
        for text in texts
    )
    text = Text(ids, configs, applies, config.data.size)
    return Pretrained(vae, text, params, {}, None, config.sampling.tile), origin


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
    configs, applies, params = zip(*networks, strict=True)
    return Text(tuple(tokenizers), configs, applies, config.data.size), params


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
        return Path(__file__).parent / "assets" / "scenes"
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
