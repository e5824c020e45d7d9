"""A TensorFlow dataset that was prepared as ArrayRecord, `coco_captions` being the model case."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from ldm_jax.data.sources import Item
from ldm_jax.data.text import decode


@dataclasses.dataclass(frozen=True)
class Tfds:
    """One split of a prepared dataset: `tfds:coco_captions?split=train&caption=captions/text`.

    Nothing is downloaded: `tfds build coco_captions --file_format=array_record` prepares it first.

    Attributes:
      name: the dataset, with its config and version if there are several ("coco_captions/2014:1.1.0").
      split: the split, or a part of one ("train[:1000]").
      image: the feature that holds the image; a slash leads into a nested feature.
      caption: the feature that holds the caption, or several: the main one, then alternatives.
      data_dir: where datasets are; empty for TFDS's own default.
    """

    name: str
    split: str = "train"
    image: str = "image"
    caption: str = "captions/text"
    data_dir: str = ""

    def __post_init__(self) -> None:
        if not len(self):
            raise ValueError(f"tfds: split {self.split!r} of {self.name} is empty")
        features = self._builder.info.features.get_tensor_info()
        for option in ("image", "caption"):
            path = getattr(self, option)
            try:
                feature = _find(features, path)
            except KeyError as error:
                raise ValueError(
                    f"tfds: {self.name} has no feature {path!r} for option {option!r};"
                    f" it has {', '.join(sorted(_paths(features)))}"
                ) from error
            if option == "image" and len(getattr(feature, "shape", ())) != 3:
                raise ValueError(f"tfds: feature {path!r} of {self.name} is no image")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Item:
        example = self._records[index]
        captions = _find(example, self.caption)
        captions = (captions,) if isinstance(captions, bytes) else captions
        texts = tuple(map(decode, captions))
        return Item(f"{self.name}/{self.split}/{index}", _find(example, self.image), texts)

    @property
    def identity(self) -> str:
        """The dataset's full name with its version, and its size."""
        info = self._builder.info
        return f"{info.full_name}, {int(info.dataset_size)} bytes"

    @functools.cached_property
    def _builder(self) -> Any:
        # `tfds.builder` would look for a dataset in a bucket, and download what it cannot find here.
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core import read_only_builder

        try:
            directory = self.data_dir or None
            return read_only_builder.builder_from_files(self.name, data_dir=directory)
        except tfds.core.DatasetNotFoundError as error:
            raise ValueError(
                f"tfds: {self.name} is not prepared in {self.data_dir or 'the default data_dir'}:"
                f" run tfds build {self.name} --file_format=array_record"
            ) from error

    @functools.cached_property
    def _records(self) -> Any:
        import tensorflow_datasets as tfds

        # Images stay encoded: one decoder (`images.to_square`) decides for all sources what comes out right.
        decoders: Any = tfds.decode.SkipDecoding()
        for name in reversed(self.image.split("/")):
            decoders = {name: decoders}
        try:
            return self._builder.as_data_source(self.split, decoders=decoders)
        except NotImplementedError as error:
            raise ValueError(
                f"tfds: {self.name} is prepared in another format than ArrayRecord:"
                f" run tfds build {self.name} --file_format=array_record"
            ) from error


def _find(example: Any, path: str) -> Any:
    if not isinstance(example, Mapping):
        raise KeyError(path)
    if path in example:  # before the split, because names hold slashes too: "image/filename"
        return example[path]
    name, _, rest = path.partition("/")
    return _find(example[name], rest)


def _paths(example: Any, prefix: str = "") -> Iterator[str]:
    for name, value in example.items():
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{name}/")
        else:
            yield prefix + name
