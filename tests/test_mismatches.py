"""What was made with another VAE, text encoder, scale of latents or size of pictures is refused by name, not used.

Caches have tests of their own: ``-k another tests/test_precompute.py tests/data/cache``.
"""

import json
import shutil
from pathlib import Path

import pytest

from dit_jax import train
from dit_jax.errors import CheckpointError, ConfigError
from dit_jax.export import export
from dit_jax.sample import Pipeline
from tests.tiny_run import tiny_config

ASSETS = Path(train.__file__).parent / "assets"
SCALE = {"latents__shift": "0,0,0,0", "latents__scale": "2,2,2,2"}


@pytest.fixture
def others(tmp_path):
    """Copies of the embedded encoders that differ in a byte of their config, as folders by key."""
    folders = {}
    for key, name in {"vae": "tiny_vae", "text_encoder": "tiny_clip"}.items():
        folders[key] = shutil.copytree(ASSETS / name, tmp_path / key)
        config = json.loads((folders[key] / "config.json").read_text())
        (folders[key] / "config.json").write_text(json.dumps(config | {"_name_or_path": "mine"}))
    return folders


@pytest.mark.parametrize("key", ["vae", "text_encoder"])
def test_a_run_does_not_go_on_or_begin_with_another_encoder(key, others, tiny_run, tmp_path):
    with pytest.raises(ConfigError, match=f"the run was begun with another {key} .compared by hash"):
        train.run(tiny_config(**{key: str(others[key])}), tiny_run)
    with pytest.raises(ConfigError, match=f"init_from={tiny_run} was trained with another {key} .its own: {key} emb"):
        train.run(tiny_config(init_from=str(tiny_run), **{key: str(others[key])}), tmp_path / "new")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (SCALE, r"latents\.scale: \(.*\) -> \(2\.0, 2\.0, 2\.0, 2\.0\)"),
        ({"latents__normalize": "vae"}, "latents.normalize: 'measured' -> 'vae'"),
        ({"data__image_size": "32"}, "data.image_size: 64 -> 32"),
    ],
)
def test_a_run_does_not_go_on_with_another_scale_or_size(changes, said, tiny_run):
    with pytest.raises(ConfigError, match=said):
        train.run(tiny_config(**changes), tiny_run)


def test_a_run_does_not_begin_with_parameters_for_another_scale(tiny_run, tmp_path):
    with pytest.raises(ConfigError, match=r"init_from=.* with latents\.shift .* this run has .*2\.0.*leave both empty"):
        train.run(tiny_config(init_from=str(tiny_run), **SCALE), tmp_path / "new")


@pytest.mark.parametrize("key", ["vae", "text_encoder"])
def test_nothing_is_drawn_with_another_encoder(key, others, tiny_run, tmp_path):
    """Of a run, whose config names it, and of an export, which holds it."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {key: str(others[key])}))
    export(Pipeline.load(tiny_run), tmp_path / "export", "safetensors", "float32", copy_encoders=True)
    shutil.copytree(others[key], tmp_path / "export" / key, dirs_exist_ok=True)
    for folder in (run, tmp_path / "export"):
        with pytest.raises(CheckpointError, match=f"{folder} was trained with another {key} than .*put the files back"):
            Pipeline.load(folder)
