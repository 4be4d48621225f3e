"""Data sets of TensorFlow Datasets as a source, read without TensorFlow.

TFDS keeps a prepared data set as ArrayRecord files, whose records have random access. A record is a
``tf.train.Example``: names with lists of bytes or numbers, one of them the file of the picture, which we decode
ourselves. TensorFlow is needed to prepare a data set, not to read it.
"""

import contextlib
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.data.sources.features import Choice, check_template, choose, label_caption, one_line
from dit_jax.data.sources.manifests import Columns, usable_rows
from dit_jax.data.sources.records import BadRecord
from dit_jax.data.sources.rows import Entry, Listed, make_entry
from dit_jax.errors import ConfigError, DataError, FetchError
from dit_jax.files import read_json

# name/config:version, but not owner:name, for which TFDS would load code from elsewhere.
NAME = re.compile(r"\w+(/[\w.+-]+)*(:[\d.*]+)?", re.ASCII)
OWN_CLASSES = "tensorflow_datasets."
TOGETHER = 256  # records that are read at once for their captions


def open_tfds(name: str, split: str, image: str, caption: str, label: str, template: str, data_dir: str) -> "Examples":
    """Opens a data set; where it is not prepared yet and TensorFlow is installed, prepares it first.

    Args:
      name: such as ``mnist``, ``coco_captions/2014`` or ``mnist:3.0.1``.
      split: such as ``train``, ``train+test`` or ``train[:10%]``.
      image: name of the feature of pictures; empty for a usual one or the only one.
      caption: name of the feature of captions, one or several, such as ``captions/text``; empty for a usual one.
      label: name of a feature of classes to make captions of; empty for a usual one or the only one, where there are no
        captions.
      template: the caption of a class, with ``{}`` for its name.
      data_dir: where prepared data sets lie; empty for what TFDS takes, TFDS_DATA_DIR or ``~/tensorflow_datasets``.

    Raises:
      ConfigError: TFDS is not installed, or TensorFlow where it is needed; there is no such split or feature; the
        template has no place for the name.
      DataError: no such data set, files that cannot be read one by one or not at all, not one usable record.
      FetchError: it could not be prepared.
    """
    check_template(template)
    if not NAME.fullmatch(name):
        raise ConfigError(f"tfds:{name} is not a name like mnist, coco_captions/2014 or mnist:3.0.1")
    return Examples(f"tfds:{name}", _builder(name, data_dir), split, (image, caption, label), template)


class Examples(Listed):
    """The records of one split; an id is the split and the number of the record.

    A record is read whole, with its picture: opening reads all files once, for the captions.

    Args:
      name: what the user called it.
      builder: TFDS's object for the data set, which is prepared.
      split: which records.
      wanted: features of picture, caption and label that the user named, or empty.
      template: the caption of a class.
    """

    def __init__(self, name: str, builder: Any, split: str, wanted: tuple[str, str, str], template: str):
        kinds = dict(sorted(_flat("", builder.info.features)))  # TFDS keeps no order
        labels = [key for key, kind in kinds.items() if isinstance(kind, _library().features.ClassLabel)]
        images = [key for key, kind in kinds.items() if _is_picture(kind)]
        texts = [key for key, kind in kinds.items() if np.dtype(kind.np_dtype).kind in "OSU"]
        chosen = choose(name, wanted, images, texts, labels)
        self._image, self.name = chosen.image, name  # a name for errors while the entries are read
        self._examples = _open(name, builder, split)
        self._lengths = array("q")  # bytes of every picture, -1 where there is none
        names = kinds[chosen.text].int2str if chosen.text in labels else None
        entries = self._entries(split, chosen, names, template)
        super().__init__(name, usable_rows(entries, Path(name), Columns((chosen.image,), (chosen.text,))))

    def _entries(
        self, split: str, chosen: Choice, name_of: Callable[[int], str] | None, template: str
    ) -> Iterator[Entry]:
        """All records; fills in how long their pictures are."""
        for start in range(0, len(self._examples), TOGETHER):
            numbers = range(start, min(start + TOGETHER, len(self._examples)))
            with _damage(self.name):
                examples = [_fields(record) for record in self._examples.__getitems__(numbers)]
            for i, example in zip(numbers, examples, strict=True):
                picture = next(iter(_values(example, chosen.image)), None)
                self._lengths.append(-1 if picture is None else len(picture))
                texts = [_text(value, name_of) for value in _values(example, chosen.text)]
                if chosen.is_label:
                    texts = [text and label_caption(template, text) for text in texts]
                yield make_entry(f"{split}/{i}", texts)

    def content(self, index: int, length: int | None) -> bytes:
        """The file of the picture."""
        with _damage(self.name):
            pictures = _values(_fields(self._examples[index]), self._image)
        if not pictures:
            raise BadRecord(self.rows.ids[index], "no picture")
        return pictures[0][:length]

    def stamp(self, index: int) -> int:
        """The number of bytes of the picture, -1 where there is none."""
        return self._lengths[index]


# --- features -----------------------------------------------------------------------------------------------


def _flat(path: str, kind: Any) -> Iterator[tuple[str, Any]]:
    """The features in all depths, with their path, which is their name in a record: ``captions/text``.

    Of sequences only texts are taken: the caption of a picture is one of several, its pixels and its class are not.
    """
    features = _library().features
    if isinstance(kind, features.FeaturesDict):
        for key, inner in kind.items():
            yield from _flat(f"{path}/{key}".removeprefix("/"), inner)
    elif isinstance(kind, features.Sequence) and not isinstance(kind, features.Dataset):
        inner = kind.feature
        yield from ((key, part) for key, part in _flat(path, inner) if isinstance(part, features.Text))
    else:
        yield path, kind


def _is_picture(kind: Any) -> bool:
    """Whether a feature is a picture; maps of depths and of classes are kept as pictures too."""
    features = _library().features
    is_map = isinstance(kind, features.LabeledImage) or np.dtype(kind.np_dtype).kind == "f"
    return isinstance(kind, features.Image) and not is_map


def _fields(record: bytes) -> Mapping[str, Any]:
    """The features of a record by their path."""
    from tensorflow_datasets.proto.tf_example_generated_pb2 import Example

    return Example.FromString(record).features.feature


def _values(fields: Mapping[str, Any], path: str) -> Sequence[Any]:
    """What a record holds under a name: bytes or numbers; nothing where it has no such feature."""
    if path not in fields:
        return ()
    return getattr(fields[path], fields[path].WhichOneof("kind") or "bytes_list").value


def _text(value: Any, name_of: Callable[[int], str] | None) -> str | None:
    """A caption, with lone surrogates where it is not UTF-8, or the name of a class; None where there is none."""
    if name_of is None:
        return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else None
    try:
        return name_of(value)
    except ValueError:
        return None


@contextlib.contextmanager
def _damage(name: str) -> Iterator[None]:
    """Files that the libraries cannot read are told in one line: they let out whatever they trip over."""
    try:
        yield
    except Exception as error:
        raise DataError(f"cannot read {name}: {one_line(error)}") from error


# --- where the data set is ----------------------------------------------------------------------------------


def _library() -> Any:
    try:
        import array_record.python.array_record_data_source  # noqa: F401  # which TFDS imports when it reads
        import tensorflow_datasets
    except ImportError as error:
        raise ConfigError(
            f"data.source=tfds: needs {error.name}: pip install 'dit_jax[tfds]', or, if nothing is to be prepared, "
            "pip install tensorflow-datasets array_record importlib_resources"
        ) from error
    return tensorflow_datasets


def _builder(name: str, data_dir: str) -> Any:
    """TFDS's object for a data set that is prepared; nothing but its files is looked at if it is there."""
    tfds = _library()
    from tensorflow_datasets.core import constants, read_only_builder

    folder = Path(data_dir or constants.DATA_DIR).expanduser()
    for features in sorted((folder / re.split("[/:]", name)[0]).rglob("features.json")):
        _check_classes(features)
    try:
        return read_only_builder.builder_from_files(name, data_dir=folder)
    except tfds.core.DatasetNotFoundError:
        return _prepare(name, folder)
    except Exception as error:
        raise DataError(f"cannot open tfds:{name} in {folder}: {one_line(error)}") from error


def _check_classes(features: Path) -> None:
    """Refuses a ``features.json`` with a class that is not of TFDS, which would import the module that it names."""
    try:
        waiting = [read_json(features)]
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {features}: {error}") from error
    while waiting:
        value = waiting.pop()
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        for key in ("pythonClassName", "type") if isinstance(value, dict) else ():
            if isinstance(named := value.get(key), str) and not named.startswith(OWN_CLASSES):
                raise DataError(f"{features} names the class {named!a:.100}, which is not of TFDS: it is not imported")


def _tensorflow() -> Any:
    """TensorFlow, None where it is not installed."""
    try:
        import tensorflow
    except ImportError:
        return None
    return tensorflow


def _prepare(name: str, folder: Path) -> Any:
    """Downloads a data set and writes it as ArrayRecord."""
    tfds = _library()
    there = sorted({file.relative_to(folder).parts[0] for file in folder.glob("*/**/dataset_info.json")})
    lacks = f"tfds:{name} is not prepared in {folder} (there: {', '.join(there) or 'nothing'})"
    tensorflow = _tensorflow()
    if not tensorflow:
        raise ConfigError(
            f"{lacks}, and preparing it needs TensorFlow: pip install 'dit_jax[tfds]'; or prepare it as array_record "
            "where TensorFlow is, and set data_dir="
        )
    tensorflow.config.set_visible_devices([], "GPU")  # else it takes the memory that training needs
    try:
        builder = tfds.builder(name, data_dir=folder, file_format="array_record")
    except Exception as error:  # an unknown name, config or version: each of these has an exception of its own
        raise DataError(f"{lacks}, and TFDS cannot prepare it: {one_line(error)}") from error
    info = builder.info
    print(f"tfds: preparing {info.full_name} ({info.download_size} from {info.homepage}) in {folder}", flush=True)
    try:
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    except Exception as error:  # whatever its download, its archives and its own code let out
        raise FetchError(f"cannot prepare tfds:{name} in {folder}: {one_line(error)}") from error
    return builder


def _open(name: str, builder: Any, split: str) -> Any:
    """The records of a split, as bytes."""
    from tensorflow_datasets.core.decode import DeserializeMethod

    known = list(builder.info.splits)
    try:
        return builder.as_data_source(split, deserialize_method=DeserializeMethod.RAW_BYTES)
    except NotImplementedError as error:
        raise DataError(
            f"{name} lies in {builder.data_path} as {builder.info.file_format.value}, whose records cannot be read one "
            "by one; set data_dir= to another folder to prepare it anew, or convert it: pip install tensorflow "
            f"apache-beam mlcroissant; tfds convert_format --dataset_version_dir={builder.data_path} "
            "--out_file_format=array_record"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{name} has no split {split!r}; set split= to one of {', '.join(known)}") from error
