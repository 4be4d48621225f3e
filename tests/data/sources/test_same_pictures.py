"""The same pictures as sources of several kinds are the same records, in the same order."""

import datasets
import numpy as np
import pytest

from dit_jax.data.sources.catalogue import open_source
from tests.data import same_pictures


def open_word(word):
    return open_source(word, lambda: None, 0.0, "all")


@pytest.mark.parametrize("kind", ["wds", "tfds", "hf"])
def test_pictures_and_captions_are_those_of_the_folder(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write = {"wds": same_pictures.write_wds, "hf": same_pictures.write_hf, "tfds": lambda _: same_pictures.TFDS}[kind]
    folder = open_word(same_pictures.write_folder(tmp_path / "folder"))
    source = open_word(write(tmp_path / kind))
    assert len(source) == len(folder) == 8
    assert list(source.captions()) == list(folder.captions())
    for i in range(8):
        assert source.content(i, None) == folder.content(i, None) and source.content(i, 9) == folder.content(i, 9)
        assert np.array_equal(source[i].image, folder[i].image) and source.size(i) == folder.size(i) == (32, 32)
