"""Feature extractors: what frozen networks see in images, on the mesh. One pass serves all scores that are made of it.

`features(params, images, read)` takes images in [-1, 1] and what the extractor reads beside each: its tokens of the
prompt, or the image that it should be.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from ldm_jax.metrics import pairs, resize
from ldm_jax.models import clip, dinov2
from ldm_jax.types import Images, Params, Tokens


@runtime_checkable
class Extractor(Protocol):
    """Features of images, each [B, ...], by name.

    `preprocessing` says what is done to images before the network, for the provenance of what is made of them.
    """

    preprocessing: str

    def features(self, params: Params, images: Images, read: Any) -> dict[str, Float[Array, "B _"]]:
        """Features of images and of what is read beside them."""
        ...


@dataclasses.dataclass(frozen=True)
class CLIPFeatures:
    """`image` and `text`: features of unit norm in CLIP's shared space, float32.

    Attributes:
      apply: a CLIP as `functional(CLIP)` gives it.
      size: side of the images that its image tower takes, in pixels.
    """

    apply: Any
    size: int

    preprocessing = "bicubic, antialiased, centre crop"

    @classmethod
    def of(cls, config: Any, apply: Any) -> "CLIPFeatures":
        """The extractor of a network."""
        return cls(apply, config.vision.image_size)

    def features(
        self, params: Params, images: Images, read: Tokens | None
    ) -> dict[str, Float[Array, "B P"]]:
        """Of images, and of prompts as CLIP's own tokens, where there are any."""
        seen = self.apply(params, clip.preprocess(images, self.size), method="image_features")
        found = {"image": clip.unit_norm(seen)}
        if read is not None:
            told = self.apply(params, read, method="text_features")
            found["text"] = clip.unit_norm(told)
        return found


@dataclasses.dataclass(frozen=True)
class OfNetwork:
    """What extractors of one network share: `apply`, as `functional` gives it."""

    apply: Any

    preprocessing = "none"

    @classmethod
    def of(cls, config: Any, apply: Any) -> "OfNetwork":
        """The extractor of a network."""
        return cls(apply)


class InceptionFeatures(OfNetwork):
    """`image`: pooled features of FID's Inception-v3; `logits` without their bias; `apply` is the network.

    Images are resized as TensorFlow 1 did for the first FID, and torch-fidelity does.
    """

    preprocessing = "TensorFlow 1 bilinear, 299 pixels"

    def features(
        self, params: Params, images: Images, read: None = None
    ) -> dict[str, Float[Array, "B _"]]:
        """Of images alone."""
        found = self.apply(params, self.resized(images))
        return {"image": found.pooled, "logits": found.unbiased}

    def resized(self, images: Images) -> Images:
        """Images in [-1, 1] at the size that the network takes."""
        return resize.as_torch_fidelity(images)


class CleanInceptionFeatures(InceptionFeatures):
    """The same of images that are resized as clean-fid does (Parmar et al. 2022, arXiv:2104.11222)."""

    preprocessing = "Pillow bicubic, antialiased, 299 pixels"

    def resized(self, images: Images) -> Images:
        """Images in [-1, 1] at the size that the network takes."""
        return resize.as_clean_fid(images)


class DINOv2Features(OfNetwork):
    """`image`: the class token of a DINOv2, for FD-DINOv2 (Stein et al. 2023, arXiv:2306.04675)."""

    preprocessing = "bicubic, antialiased, 224 pixels"

    def features(
        self, params: Params, images: Images, read: None = None
    ) -> dict[str, Float[Array, "B D"]]:
        """Of images alone."""
        return {"image": self.apply(params, dinov2.preprocess(images))}


class ReaderFeatures(OfNetwork):
    """`logits`: the answers that a reader of scenes gives; it does not see the prompt."""

    def features(
        self, params: Params, images: Images, read: None = None
    ) -> dict[str, Float[Array, "B outputs"]]:
        """Of images alone."""
        return {"logits": self.apply(params, images)}


@dataclasses.dataclass(frozen=True)
class PairFeatures:
    """`psnr` and `ssim` of each image and the one that it should be, which is read beside it; there is no network."""

    preprocessing = "none"

    @classmethod
    def of(cls, config: None, apply: None) -> "PairFeatures":
        """The extractor."""
        return cls()

    def features(self, params: None, images: Images, read: Images) -> dict[str, Float[Array, " B"]]:
        """Of images and the ones that they should be; PSNR is at most `pairs.MOST_DECIBELS`, so that means are finite.

        Raises ValueError as `pairs.psnr` and `pairs.ssim`.
        """
        psnr = jnp.minimum(pairs.psnr(images, read), pairs.MOST_DECIBELS)
        return {"psnr": psnr, "ssim": pairs.ssim(images, read)}


class LPIPSFeatures(OfNetwork):
    """`lpips` of each image and the one that it should be; `apply` is the network."""

    def features(
        self, params: Params, images: Images, read: Images
    ) -> dict[str, Float[Array, " B"]]:
        """Of images and the ones that they should be. Raises ValueError for different shapes."""
        return {"lpips": self.apply(params, *pairs.paired(images, read))}


class Row(NamedTuple):
    """An extractor, the network that it is made of by its name among the frozen ones ("": none), and what it reads."""

    kind: type
    network: str
    reads: str = ""


TOKENS, TRUTH = "tokens", "truth"  # of the prompt; the image that should be

EXTRACTORS: dict[str, Row] = {
    "clip": Row(CLIPFeatures, "clip", TOKENS),
    "inception": Row(InceptionFeatures, "inception"),
    "inception_clean": Row(CleanInceptionFeatures, "inception"),
    "dinov2": Row(DINOv2Features, "dinov2"),
    "reader": Row(ReaderFeatures, "reader"),
    "pairs": Row(PairFeatures, "", TRUTH),
    "lpips": Row(LPIPSFeatures, "lpips", TRUTH),
}
