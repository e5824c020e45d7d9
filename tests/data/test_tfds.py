"""A dataset that TFDS has prepared as ArrayRecord, made here as `coco_captions` is laid out."""

import io
import shutil
import warnings

import numpy as np
import pytest
from PIL import Image

from ldm_jax.data import open_source
from ldm_jax.data.images import to_square

COUNT = 5
COLOURS = [(200, 10, 10), (10, 200, 10), (10, 10, 200), (200, 200, 10), (90, 90, 90)]


def jpeg(index):
    file = io.BytesIO()
    Image.new("RGB", (48, 32), COLOURS[index]).save(file, "JPEG", quality=95)
    return file.getvalue()


def example(i):
    return {
        "image": io.BytesIO(jpeg(i)),
        "image/filename": f"{i}.jpg",
        "image/id": i,
        "captions": [{"id": j, "text": f"caption {j} of {i}"} for j in range(1 + i)],
        "title": f"café {i}",
        "nested": {"picture": io.BytesIO(jpeg(i))},
    }


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A data set as ArrayRecord. TensorFlow, which TFDS needs to write one, takes seconds to import."""
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        url_infos = {}  # noqa: RUF012

        def _info(self):
            text = tfds.features.Text()
            picture = tfds.features.Image(encoding_format="jpeg")
            features = {
                "image": picture,
                "image/filename": text,
                "image/id": np.int64,
                "captions": tfds.features.Sequence({"id": np.int64, "text": text}),
                "title": text,
                "nested": {"picture": picture},
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            return ((i, example(i)) for i in range(COUNT))

    data_dir = tmp_path_factory.mktemp("tfds")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorFlow's own
        Tiny(data_dir=data_dir, file_format="array_record").download_and_prepare()
    return data_dir


@pytest.fixture
def source(data_dir):
    return open_source(f"tfds:tiny?data_dir={data_dir}")


def test_items_have_the_encoded_image_and_all_captions(source):
    assert len(source) == COUNT
    for index in (4, 0, 2):
        item = source[index]
        assert item.key == f"tiny/train/{index}"
        assert item.captions == tuple(f"caption {j} of {index}" for j in range(1 + index))
        np.testing.assert_allclose(
            to_square(item.image, 32), np.full((32, 32, 3), COLOURS[index]), atol=3
        )


def test_features_are_options(data_dir):
    source = open_source(f"tfds:tiny?data_dir={data_dir}&caption=title&image=nested/picture")
    assert source[3].captions == ("café 3",)
    assert source[3].image == jpeg(3)
    names = open_source(f"tfds:tiny?data_dir={data_dir}&caption=image/filename")
    assert names[1].captions == ("1.jpg",)


def test_a_part_of_a_split_is_a_source(data_dir):
    source = open_source(f"tfds:tiny?data_dir={data_dir}&split=train[1:3]")
    assert [len(source[i].captions) for i in range(len(source))] == [2, 3]


def test_the_identity_names_the_version(source):
    assert source.identity.endswith(" bytes")
    assert source.identity.startswith("tiny/1.0.0, ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("caption=text", "tiny has no feature 'text' for option 'caption'; it has captions/id"),
        ("image=title", "feature 'title' of tiny is no image"),
        ("image=photo", "tiny has no feature 'photo' for option 'image'"),
        ("split=valid", "Unknown split 'valid'"),
    ],
)
def test_a_wrong_option_says_what_there_is(data_dir, options, message):
    with pytest.raises(ValueError, match=message):
        open_source(f"tfds:tiny?data_dir={data_dir}&{options}")


def test_what_is_not_prepared_is_refused_without_a_download(data_dir):
    with pytest.raises(ValueError, match="run tfds build coco_captions --file_format=array_record"):
        open_source(f"tfds:coco_captions?data_dir={data_dir}")


def test_another_format_is_refused(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path, dirs_exist_ok=True)
    info = tmp_path / "tiny/1.0.0/dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(ValueError, match="tiny is prepared in another format than ArrayRecord"):
        open_source(f"tfds:tiny?data_dir={tmp_path}")
