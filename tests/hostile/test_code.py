"""Nothing that is loaded runs code, however it is called and wherever it lies."""

import json
import os
import pickle
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from dit_jax import main, runtime
from dit_jax.config import load_config
from dit_jax.data.sources.catalogue import open_source
from dit_jax.encoders import load_text_encoder, load_vae
from dit_jax.errors import ConfigError, DataError, UserError
from dit_jax.export import export
from dit_jax.sample import Pipeline
from dit_jax.stored import open_stored
from tests.data.same_pictures import GOLDEN as DATA
from tests.encoders.test_tokenizer import GOLDEN
from tests.tiny_run import CONFIG, tiny_flags

REPOSITORY = Path(__file__).resolve().parents[2]


class Planted:
    """Writes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.fixture
def plant(tmp_path):
    """Writes a pickle to a file; at the end of the test it has not been loaded."""
    mark = tmp_path / "it was run"

    def write(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(pickle.dumps(Planted(mark)))

    write(tmp_path / "proof")
    pickle.loads((tmp_path / "proof").read_bytes())
    assert mark.exists()  # so it would be seen
    mark.unlink()
    yield write
    assert not mark.exists()


PICKLES = ("pytorch_model.bin", "diffusion_pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl")


@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.parametrize(("load", "case"), [(load_vae, "vae_plain"), (load_text_encoder, "text_sd1")])
def test_weights_that_are_only_pickled_are_refused_with_the_command_that_converts_them(
    load, case, name, plant, tmp_path
):
    folder = shutil.copytree(GOLDEN / case, tmp_path / "encoder")
    next(folder.glob("*.safetensors")).unlink()
    plant(folder / name)
    with pytest.raises(
        ValueError, match=r"only pickled weights \(.*\), which can run code and are not read; .*save_file"
    ):
        load(folder)


FILES = ("config.json", "model.safetensors", "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize("name", [*FILES, "flax_model.msgpack", "model.safetensors.index.json"])
def test_pickles_by_other_names_are_damaged_files(name, plant, tmp_path):
    folder = shutil.copytree(GOLDEN / "text_sd1", tmp_path / "encoder")
    if name.endswith((".msgpack", ".index.json")):
        (folder / "model.safetensors").unlink()
    plant(folder / name)
    with pytest.raises(ValueError, match="damaged"):
        load_text_encoder(folder)


def test_the_program_ends_in_one_line(plant, tmp_path, capsys):
    folder = shutil.copytree(GOLDEN / "vae_plain", tmp_path / "encoder")
    next(folder.glob("*.safetensors")).unlink()
    plant(folder / "pytorch_model.bin")
    with pytest.raises(SystemExit) as exit:
        main.main(tiny_flags(tmp_path / "run", vae=str(folder)))
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and "pytorch_model.bin" in error and "save_file" in error


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax's other reads
@pytest.mark.parametrize("form", ["run", "safetensors", "orbax"])
def test_models_any_file_of_which_is_a_pickle(form, plant, tiny_run, tmp_path):
    """An export has no hashes: its files are what they are."""
    folder = tmp_path / "model"
    if form == "run":
        shutil.copytree(tiny_run / "checkpoints" / "20", folder / "checkpoints" / "20")
        shutil.copy(tiny_run / "config.json", folder)
        for item in ("params", "optimizer"):  # which are not read
            shutil.rmtree(folder / "checkpoints" / "20" / item)
    else:
        export(Pipeline.load(tiny_run), folder, form, "float32", copy_encoders=False)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    assert len(files) > (1 if form == "safetensors" else 4)
    for file in files:
        whole = file.read_bytes()
        plant(file)
        try:
            open_stored(folder, None, 20).restore(8)
        except UserError as error:
            assert "\n" not in str(error)
        file.write_bytes(whole)
    open_stored(folder, None, 20).restore(8)


@pytest.mark.parametrize(
    "word",
    ["jsonl:x.jsonl", "csv:x.csv", "parquet:x.parquet", "coco:x.json", "wds:x.tar", "folder:x", "cache:x", "hf:x"],
)
def test_data_that_are_pickles(word, plant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"folder:x": ["metadata.jsonl"], "cache:x": ["manifest.json", "table.safetensors"],
             "hf:x": ["dataset_info.json", "state.json", "data.arrow", "x.py", "train.parquet"]}  # fmt: skip
    for name in names.get(word, [""]):
        plant(tmp_path / word.partition(":")[2] / name)
    with pytest.raises((DataError, ConfigError)):
        open_source(word, lambda: None, 0.0, "all")


def test_the_classes_that_a_data_set_of_tfds_names_are_not_imported(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    shutil.copytree(DATA / "tfds" / "golden_shapes", tmp_path / "golden_shapes")
    (tmp_path / "planted.py").write_text("from pathlib import Path\nPath('it was run').touch()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (features,) = tmp_path.rglob("features.json")
    found = json.loads(features.read_text())
    found["featuresDict"]["features"]["label"]["pythonClassName"] = "planted.Label"
    features.write_text(json.dumps(found))
    with pytest.raises(DataError, match="names the class 'planted.Label', which is not of TFDS: it is not imported"):
        open_source(f"tfds:golden_shapes?data_dir={tmp_path}", lambda: None, 0.0, "all")
    assert not (tmp_path / "it was run").exists() and "planted" not in sys.modules


# --- the compile cache --------------------------------------------------------------------------------------


def test_what_is_compiled_is_kept_for_this_user_alone(tmp_path):
    """What is in the cache is run as code."""
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    environment["XDG_CACHE_HOME"] = str(tmp_path)
    (tmp_path / "dit_jax" / "compiled").mkdir(parents=True)
    (tmp_path / "dit_jax" / "compiled").chmod(0o777)
    program = """
from dit_jax.runtime import set_up
set_up(True, False)
import jax
print(jax.config.jax_compilation_cache_dir)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
    )
    cache = tmp_path / "dit_jax" / "compiled"
    assert done.stdout.strip() == str(cache) and stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_the_compile_cache_of_another_user_is_not_used(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.warns(UserWarning, match="nothing that is compiled is kept: .*another user's"):
        runtime.set_up(True, True)


def test_a_config_is_data_unless_it_is_python(tmp_path):
    """``--config=FILE.py`` is the user's own program; the config of a run or of a stranger's export is JSON."""
    (tmp_path / "config.json").write_text(CONFIG.read_text())
    with pytest.raises(ConfigError, match="config.json is not a config"):
        load_config(str(tmp_path / "config.json"), {})
