"""From the user's word to sources: kinds, options, weights, parts, and what is said of a wrong word."""

import json
import sys
import types
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from configs import default
from dit_jax import build
from dit_jax.data.cache import files as cache_files
from dit_jax.data.cache.gather import Cache, in_memory
from dit_jax.data.cache.parts import Pictures, Texts, tabulate, units
from dit_jax.data.shapes_world import ShapesWorld
from dit_jax.data.sources.catalogue import KINDS, Part, open_source, parse
from dit_jax.data.sources.folder import Folder
from dit_jax.data.sources.records import parts_of, split
from dit_jax.errors import ConfigError, DataError


def no_shapes():
    raise AssertionError("nobody asked for shapes")


def test_a_kind_has_its_options_unless_the_user_says_otherwise():
    assert parse("shapes") == [Part(1.0, "shapes", "", {})]
    assert parse("folder:~/my cats/2024") == [Part(1.0, "folder", "~/my cats/2024", {})]
    assert parse("jsonl:a.jsonl?caption=alt") == [Part(1.0, "jsonl", "a.jsonl", {"image": "", "caption": "alt"})]
    (part,) = parse("hf:owner/name@v1?split=test&template=what is a {}?")
    assert (part.place, part.options["split"], part.options["template"]) == ("owner/name@v1", "test", "what is a {}?")
    assert parse("tfds:coco_captions/2014:1.1.0")[0].place == "coco_captions/2014:1.1.0"


def test_sources_are_mixed_by_weight():
    parts = parse("0.7*folder:cats + 3*wds:dogs/*.tar?" + " + shapes")
    assert [(part.weight, part.kind, part.place) for part in parts] == [
        (0.7, "folder", "cats"),
        (3.0, "wds", "dogs/*.tar"),
        (1.0, "shapes", ""),
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "data.source is ''; it can be shapes, folder:PATH, jsonl:FILE, csv:FILE, parquet:FILE_OR_FOLDER, coco:"),
        ("foldr:cats", "(did you mean 'folder'?); it can be shapes, folder:PATH"),
        ("folder:", "data.source is 'folder:'; it can be"),
        ("folder", "data.source is 'folder'; it can be"),
        ("shapes:7", "data.source is 'shapes:7'; it can be"),
        ("folder:a + ", "data.source is 'folder:a + '; it can be"),
        ("folder:a?caption=b", "'caption=b' is no option of folder; it has none"),
        ("jsonl:a?captoin=b", "'captoin=b' is no option of jsonl; its options are image=, caption="),
        ("jsonl:a?caption", "'caption' is no option of jsonl"),
        ("0*folder:a", "the weight '0' must be a number above 0"),
        ("x*folder:a", "the weight 'x' must be"),
        ("nan*folder:a", "the weight 'nan' must be"),
        ("-1*folder:a", "the weight '-1' must be"),
    ],
)
def test_a_wrong_word_is_told_in_one_line(text, told):
    with pytest.raises(ConfigError) as error:
        parse(text)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_a_place_without_its_kind_is_answered_with_the_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("my_pictures", "encoded"):
        (tmp_path / folder).mkdir()
    for file in ("encoded/manifest.json", "a.jsonl", "a.TSV", "a.parquet", "captions.json", "00000.tar"):
        (tmp_path / file).touch()
    kinds = {
        "my_pictures": "folder",
        str(tmp_path / "my_pictures"): "folder",
        "encoded": "cache",
        "a.jsonl": "jsonl",
        "a.TSV": "csv",
        "a.parquet": "parquet",
        "captions.json": "coco",
        "00000.tar": "wds",
    }
    for place, kind in kinds.items():
        with pytest.raises(ConfigError, match=rf"did you mean {kind}:{place}\?"):
            parse(place)


def test_every_kind_takes_exactly_its_options(monkeypatch):
    """Each opener is called as `open_source` does it, on a place that is not there: no TypeError."""
    for kind, (_, open_it, options) in KINDS.items():
        if kind in ("tfds", "hf"):
            name, opener = f"dit_jax.data.sources.{kind}", f"open_{kind}"
            monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**{opener: refuse}))
        with pytest.raises(DataError):
            open_it("/no/such/place", **options)


def refuse(name, *, split, image, caption, label, template, subset="", data_dir=""):
    assert (name, split, template) == ("/no/such/place", "train", "a photo of a {}")
    raise DataError("refused")


@pytest.fixture
def pictures(tmp_path):
    """Forty pictures in the folder ``a`` and twenty in ``b``."""
    for name, count in (("a", 40), ("b", 20)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / name / f"{i}.png")
        rows = [json.dumps({"file_name": f"{i}.png", "text": f"{name} {i}"}) for i in range(count)]
        (tmp_path / name / "metadata.jsonl").write_text("\n".join(rows))
    return tmp_path


def test_one_source_is_the_training_part_of_itself(pictures):
    source = open_source(f"folder:{pictures}/a", no_shapes, 0.25, "train")
    apart = split(Folder(pictures / "a"), 0.25, "train")
    assert list(source.ids()) == list(apart.ids()) and source.fingerprint() == apart.fingerprint()
    assert 20 < len(source) < 40 and source[3].id == list(source.ids())[3]


def test_all_of_a_source_is_the_source(pictures):
    source = open_source(f"folder:{pictures}/a", no_shapes, 0.25, "all")
    assert source.fingerprint() == Folder(pictures / "a").fingerprint() and len(source) == 40


def test_every_source_of_a_mixture_is_split_and_keeps_its_weight(pictures):
    text = f"3*folder:{pictures}/a + folder:{pictures}/b"
    train, validation = (open_source(text, no_shapes, 0.25, part) for part in ("train", "validation"))
    counts = [[len(split(Folder(pictures / name), 0.25, part)) for name in "ab"] for part in ("train", "validation")]
    assert parts_of(train) == [(counts[0][0], 3.0), (counts[0][1], 1.0)]
    assert parts_of(validation) == [(counts[1][0], 3.0), (counts[1][1], 1.0)]
    captions = [caption for part in (train, validation) for (caption,) in part.captions()]
    assert sorted(captions) == sorted([*(f"a {i}" for i in range(40)), *(f"b {i}" for i in range(20))])
    other = open_source(f"2*folder:{pictures}/a + folder:{pictures}/b", no_shapes, 0.25, "train")
    twice = open_source(f"6*folder:{pictures}/a + 2*folder:{pictures}/b", no_shapes, 0.25, "train")
    assert train.fingerprint() == twice.fingerprint() != other.fingerprint()


# --- caches -------------------------------------------------------------------------------------------------


def encode(source):
    """A cache in memory of a source, by encoders that find nothing in it."""
    table = tabulate(source, np.zeros(len(source), np.uint8))
    identity = {
        "data": {"name": source.name, "fingerprint": source.fingerprint(), **table.counts(1)},
        "mirrored": False,
        "buckets": [[8, 8]],
        "vae": {"name": "none", "factor": 8, "channels": 1},
        "text_encoder": {"name": "none", "width": 2, "pooled_width": 2},
        "storage_dtype": "float32",
        "records_per_shard": 16,
        "captions_per_shard": 16,
    }
    shards = [
        Pictures.zeros(identity, unit)
        if unit.kind == "pictures"
        else Texts(
            np.zeros((len(unit), 2), ml_dtypes.bfloat16),
            np.arange(len(unit) + 1),
            np.zeros((len(unit), 2), ml_dtypes.bfloat16),
        )
        for unit in units(identity)
    ]
    return in_memory(identity, table, shards)


@pytest.fixture
def encoded(pictures, monkeypatch):
    """The caches ``a`` and ``b`` of those folders."""
    monkeypatch.setattr(cache_files, "open_cache", lambda place: encode(Folder(pictures / place)))


@pytest.mark.parametrize("part", ["train", "validation", "all"])
@pytest.mark.parametrize("words", ["{}:{}a", "3*{0}:{1}a + {0}:{1}b"])
def test_a_cache_has_the_parts_order_and_fingerprint_of_its_pictures(pictures, encoded, words, part):
    cached = open_source(words.format("cache", ""), no_shapes, 0.25, part)
    raw = open_source(words.format("folder", f"{pictures}/"), no_shapes, 0.25, part)
    assert isinstance(cached, Cache) and not isinstance(raw, Cache)
    assert list(cached.ids()) == list(raw.ids()) and list(cached.captions()) == list(raw.captions())
    assert cached.fingerprint() == raw.fingerprint() and parts_of(cached) == parts_of(raw)


def test_caches_are_mixed_with_caches_only(pictures, encoded):
    with pytest.raises(ConfigError, match="caches can be mixed with caches only"):
        open_source(f"cache:a + folder:{pictures}/b", no_shapes, 0.25, "train")


# --- through the config -------------------------------------------------------------------------------------


def test_shapes_come_from_the_config():
    config = default.get_config()
    config.data.num_pictures, config.seed = 30, 7
    assert build.make_source(config, "all").fingerprint() == ShapesWorld(7, 30, (1, 2), "seen").fingerprint()
    config.data.source = "shapes + 2*shapes"
    assert parts_of(build.make_source(config, "train")) == [(30, 1.0), (30, 2.0)]
    config.data.max_objects = 4
    with pytest.raises(ConfigError, match=r"data\.max_objects is 4; it can be 1, 2, 3"):
        build.make_source(config, "train")


def test_the_comment_in_the_config_lists_every_kind():
    text = Path(default.__file__).read_text(encoding="utf-8")
    comment = text[: text.index("c.data.source =")].rpartition("# ---- data")[2]
    assert f"with {' | '.join(KINDS)};" in comment
