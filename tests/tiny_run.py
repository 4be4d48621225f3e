"""A real run, as small as it can be: the quickstart config with one narrow layer and few pictures."""

from pathlib import Path

from ml_collections import ConfigDict

from dit_jax import train
from dit_jax.config import load_config

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.py"
SHIPPED = sorted(path for path in CONFIG.parent.rglob("*.py") if path.stem not in ("__init__", "default"))
TINY = {
    "total_steps": "20",
    "batch_size": "8",
    "warmup_steps": "2",
    "learning_rate": "0.02",  # so that 20 steps change something
    "log_every": "3",
    "save_every": "5",
    "sample_every": "10",
    "keep_latest": "9",
    "data.num_pictures": "28",  # an epoch ends inside a batch
    "model.hidden_size": "16",
    "model.num_layers": "1",
    "model.num_heads": "2",
    "model.attention_head_dim": "8",
    "model.dropout": "0.1",
    "sample.steps": "2",
}


def tiny_config(**changes: str) -> ConfigDict:
    """The config, with further overrides; dots of keys are written as double underscores."""
    overrides = {key.replace("__", "."): value for key, value in changes.items()}
    return load_config(str(CONFIG), {**TINY, **overrides})


def tiny_flags(workdir: Path, **changes: str) -> list[str]:
    """The same run as arguments of ``dit_jax.main``."""
    overrides = {**TINY, **{key.replace("__", "."): value for key, value in changes.items()}}
    return [f"--config={CONFIG}", f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in overrides.items())]


def train_tiny(workdir: Path, **changes: str) -> Path:
    """Train it in this process."""
    train.run(tiny_config(**changes), workdir)
    return workdir
