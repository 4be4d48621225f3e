"""Which column of a data set with types is the picture and which the caption, and captions made of class names.

What the sources have in common that read with another library: `hf` and `tfds`.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dit_jax.errors import ConfigError

# Names that are looked for first, in this order.
IMAGE_NAMES = ("image", "img", "picture", "jpg", "png", "webp", "jpeg")
CAPTION_NAMES = ("text", "caption", "captions", "prompt", "txt", "sentences", "description", "captions/text")
LABEL_NAMES = ("label", "labels", "class")

LONGEST_LINE = 500  # characters of what a library says of an error


class Choice(NamedTuple):
    """Names of columns.

    Attributes:
      image: that of pictures.
      text: that of captions, or of labels.
      is_label: whether ``text`` is a label.
    """

    image: str
    text: str
    is_label: bool


def choose(
    where: str, wanted: Sequence[str], images: Sequence[str], texts: Sequence[str], labels: Sequence[str]
) -> Choice:
    """Chooses the columns of pictures and captions.

    Args:
      where: what the user called the data set, for the errors.
      wanted: names that the user gave for ``image``, ``caption`` and ``label``; empty where the usual ones are meant.
      images: columns that hold pictures.
      texts: columns that hold text.
      labels: columns that hold the number of a class whose name is known.

    Raises:
      ConfigError: a name that the user gave is not such a column, or several or none could be meant.
    """
    image, caption, label = wanted
    if caption and label:
        raise ConfigError(f"{where}: captions are either caption={caption} or made of label={label}; leave one away")
    picture = _named(where, "image", image, images) if image else _usual(images, IMAGE_NAMES)
    if not picture:
        raise ConfigError(f"{where}: which column holds the pictures? Set image= to one of {_list(images)}")
    if caption:
        text = _named(where, "caption", caption, [*texts, *labels])
        return Choice(picture, text, text in labels)
    if label:
        return Choice(picture, _named(where, "label", label, [*labels, *texts]), True)
    if text := next((name for name in CAPTION_NAMES if name in texts), ""):
        return Choice(picture, text, False)
    if text := _usual(labels, LABEL_NAMES):
        return Choice(picture, text, True)
    raise ConfigError(
        f"{where}: which column holds the captions? Set caption= to one of {_list(texts)}, or label= to one of "
        f"{_list(labels)}"
    )


def _named(where: str, option: str, name: str, fitting: Sequence[str]) -> str:
    """A name that the user gave, where it fits."""
    if name not in fitting:
        raise ConfigError(f"{where} has no column {name!r} that can be its {option}; choose among {_list(fitting)}")
    return name


def _usual(fitting: Sequence[str], usual: Sequence[str]) -> str:
    """The first of the usual names, else the only one; empty where neither is there."""
    return next((name for name in usual if name in fitting), fitting[0] if len(fitting) == 1 else "")


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) or "(there is none)"


def check_template(template: str) -> None:
    """Refuses a template without a place for the name.

    Raises:
      ConfigError: as said.
    """
    if "{}" not in template:
        raise ConfigError(f"template {template!r} has no {{}}, where the name of the class is put")


def label_caption(template: str, name: str) -> str:
    """The caption of a class: ``a photo of a {}`` and ``polar_bear`` are "a photo of a polar bear"."""
    return template.replace("{}", name.replace("_", " "))


def flatten(value: object) -> Iterator[object]:
    """The texts of a value: itself, or what lists in it hold, however deep."""
    if isinstance(value, list | tuple):
        for part in value:
            yield from flatten(part)
    else:
        yield value


def one_line(error: BaseException) -> str:
    """What a library says of an error and of its cause, in one line."""
    causes = [fault for fault in (error, error.__cause__) if fault]
    return ", from ".join(f"{type(fault).__name__}: {' '.join(str(fault).split())}" for fault in causes)[:LONGEST_LINE]
