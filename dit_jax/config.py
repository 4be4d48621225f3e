"""Configs before they become objects: read from a file or a run, changed by key, compared with those of a run.

`load_config` and `read_run` give a ``ConfigDict`` with the keys of ``configs/default.py``, `to_json` is how a run keeps
it, and `take_over` holds a resumed run to what it was. Whether the values make sense is what `dit_jax.build` finds out.
"""

import ast
import difflib
import json
import re
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dit_jax import files
from dit_jax.errors import CheckpointError, ConfigError

SECTIONS = ("latents", "data", "diffusion", "model", "sample")  # of the first release

# The keys of the first release, by what they hold. What came later is in ADDED, and holds what it says there.
FIRST: dict[type, str] = {
    int: """
        seed total_steps total_epochs stop_at_step batch_size accumulate warmup_steps
        log_every save_every sample_every keep_latest keep_every
        data.image_size data.num_pictures data.max_objects data.workers
        model.hidden_size model.num_layers model.num_heads model.attention_head_dim model.patch_size
        model.in_channels model.out_channels model.text_length model.text_width model.pooled_width
        sample.steps""",
    float: """
        learning_rate adam_b1 adam_b2 muon_momentum weight_decay clip_norm ema_decay caption_dropout
        data.validation_fraction data.max_bad_fraction
        diffusion.shift diffusion.logit_mean diffusion.logit_std
        model.mlp_ratio model.dropout model.time_scale
        sample.eta sample.guidance_scale""",
    str: """
        optimizer learning_rate_schedule dtype wandb_project vae text_encoder latents.normalize
        data.source data.crop data.flip data.encode diffusion.schedule diffusion.prediction diffusion.times
        model.text_mode model.text_pool model.modulation model.remat sample.sampler""",
    tuple: "latents.shift latents.scale sample.prompts",
}
# What keys mean that the config.json of an older run does not have.
ADDED = {
    "init_from": "",
    "preview_vae": "",
    "deterministic": False,
    "max_hours": 0.0,
    "mesh.fsdp": 1,
    "mesh.tensor": 1,
    "max_skipped_in_a_row": 10,  # of 1: the first one ended the run
    "stall_patience": 600.0,
    "validate_every": 0,
    "keep_best": 0,
    "verify_checkpoints": "full",
    "moment_dtype": "float32",
    "data.storage_dtype": "float32",
    "data.buckets": 0,
    "data.patience": 600.0,
    "model.mlp": "silu",
    "model.norm": "layer",
    "model.qk_norm": False,
    "model.positions": "learned",
    "model.rope": False,
    "model.base_grid": 0,
    "model.num_registers": 0,
    "data.validation_records": 512,  # of any number: nothing was scored
    "diffusion.noise_mean": -1.2,
    "diffusion.noise_std": 1.2,
    "diffusion.weighting": "uniform",
    "diffusion.min_snr_gamma": 5.0,
    "diffusion.sigmoid_bias": 0.0,
    "diffusion.variance_weight": 0.001,
    "sample.grid": "uniform",
    "sample.grid_shift": 3.0,
    "sample.grid_rho": 7.0,
    "sample.guidance_interval": (0.0, 1.0),
    "sample.guidance_rescale": 0.0,
    "sample.apg_parallel": 1.0,
    "sample.apg_norm": 0.0,
    "sample.strength": 0.6,
}
KINDS = {key: kind for kind, keys in FIRST.items() for key in keys.split()}
KINDS |= {key: type(value) for key, value in ADDED.items()}
LENGTH = ("total_steps:", "total_epochs:", "warmup_steps:")  # how `differences` of a run that became longer begin
WORDS = ("sample.prompts",)  # tuples that hold text; all others hold numbers
LARGEST = 2**53  # of whole numbers: JSON has larger ones, no config needs them
FORMATS = ("safetensors", "orbax", "diffusers")  # of an export's parameters
TRAINED = "trained"  # what the config.json of an export says beside the config: see dit_jax.stored

# What a run that is resumed may change; every other key must be what it was.
CHANGEABLE = (
    "stop_at_step",
    "deterministic",
    "max_hours",
    "mesh.fsdp",
    "mesh.tensor",
    "stall_patience",
    "log_every",
    "save_every",
    "sample_every",
    "validate_every",  # but not data.validation_records: all figures of a run are of the same records
    "keep_latest",
    "keep_every",
    "keep_best",
    "verify_checkpoints",
    "wandb_project",
    "model.remat",
    # where things lie; what they hold is compared by hash
    "vae",
    "text_encoder",
    "preview_vae",
    "data.source",
    "data.workers",
    "data.patience",
    "sample.sampler",
    "sample.eta",
    "sample.steps",
    "sample.grid",
    "sample.grid_shift",
    "sample.grid_rho",
    "sample.guidance_scale",
    "sample.guidance_interval",
    "sample.guidance_rescale",
    "sample.apg_parallel",
    "sample.apg_norm",
    "sample.strength",
    "sample.prompts",
)


# ------------------------------------------------------------------------------------------- reading and writing


def load_config(spec: str, overrides: Mapping[str, str]) -> ConfigDict:
    """A config from ``FILE.py[:key=value,...]`` or a run's ``config.json``, with overrides by dotted key.

    Raises:
      ConfigError: a missing file, an unknown key or a value of the wrong type.
    """
    name, colon, inline = spec.partition(":") if ":" in spec[2:] else (spec, "", "")
    path = Path(name).expanduser()
    if not path.is_file():
        presets = [str(p) for p in sorted(Path("configs").rglob("*.py")) if p.stem not in ("__init__", "default")]
        there_are = f"there are {', '.join(presets)}" if presets else "give its full path"
        raise ConfigError(f"no config file {name} in {Path.cwd()}; {there_are}")
    config = _fresh(read_json(path)) if path.suffix == ".json" else _run_config_file(path)
    pairs = [item.partition("=") for item in inline.split(",")] if colon else []
    apply_overrides(config, {key: value for key, _, value in pairs} | dict(overrides))
    return config


def name_of(spec: str) -> str:
    """What folders of what is made with a config are called: as its file, and with a ``config.json`` as its folder."""
    path = Path(spec.partition(":")[0]).expanduser()
    return path.absolute().parent.name if path.suffix == ".json" else path.stem


def default_file() -> Path | None:
    """The file that sets every key; None where the package lies without its configs."""
    path = Path(__file__).parents[1] / "configs" / "default.py"
    beside = path.is_file() and (path.parents[1] / "setup.cfg").is_file()  # not another's, beside an installed wheel
    return path if beside else None


def defaults() -> dict[str, Any] | None:
    """What every key means that no config sets, by dotted key; None where the package lies without its configs."""
    if (path := default_file()) is None:
        return None
    try:
        return files.flatten(_run_config_file(path))
    except ConfigError:  # somebody is changing it; who starts from it is told
        return None


def _run_config_file(path: Path) -> ConfigDict:
    """Import a config file and call its ``get_config``; `configs`, which it lies in, can be imported from it."""
    folder = path.resolve().parent
    folder = next((above for above in (folder, *folder.parents) if above.name == "configs"), folder)
    root = str(folder.parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    try:
        names = runpy.run_path(str(path))
        config = names["get_config"]() if "get_config" in names else None
    except Exception as error:  # it is the user's program, and may raise anything
        raise ConfigError(f"{path} does not make a config: {_reason(error)}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"{path} does not make a config: it needs a get_config() that returns a ConfigDict")
    return _with_sections(config, path)


def _reason(error: Exception) -> str:
    """What an error says, in one line. A ConfigDict that lacks a key packs its words twice and lists all other keys."""
    said: object = error
    while isinstance(said, KeyError | AttributeError) and said.args:
        said = said.args[0]
    text = re.sub(r"Other fields present: .*?(?=Did you mean|$)", "", str(said), flags=re.DOTALL)
    return ": ".join(filter(None, [type(error).__name__, " ".join(text.split())]))


def _with_sections(config: ConfigDict, path: Path) -> ConfigDict:
    """The config that was read from ``path``, if it has the sections that a config has."""
    missing = [name for name in SECTIONS if not isinstance(config.get(name), ConfigDict)]
    if missing:
        raise ConfigError(f"{path} is not a config: it has no section {', '.join(missing)}")
    return config


def _fresh(config: ConfigDict) -> ConfigDict:
    """A run's config without what that run measured and where it was told to stop."""
    config.latents.shift = config.latents.scale = ()
    config.stop_at_step = 0
    return config


def read_json(path: Path) -> ConfigDict:
    """A resolved config, as a run or an export keeps it.

    Raises:
      ConfigError: it is none: too large, too deep, without a key or with one more, or a value of another type.
    """
    found = _tuples(_read_object(path))
    try:
        config = _with_sections(ConfigDict({key: found[key] for key in found if key != TRAINED}), path)
        for section in {key.split(".")[0] for key in ADDED if "." in key} - set(config):
            config[section] = ConfigDict()
        for key in ADDED.keys() - files.flatten(config).keys():
            _set(config, key, ADDED[key])
    except (ValueError, TypeError, AttributeError, KeyError) as error:  # as ConfigDict says what cannot be a name in it
        raise ConfigError(f"{path} is not a config: {_reason(error)}") from error
    _check_kinds(config, path)
    return config


def _check_kinds(config: ConfigDict, path: Path) -> None:
    """Raises ConfigError where a config that was read has other keys than a config, or values of other types."""
    values = files.flatten(config)
    if missing := sorted(KINDS.keys() - values.keys()):
        raise ConfigError(f"{path} is not a config: it has no {', '.join(missing[:3])}")
    if unknown := sorted(values.keys() - KINDS.keys()):
        raise ConfigError(
            f"{path} has keys that this release does not know, {ascii(', '.join(unknown[:3]))[:200]}: a later one wrote"
            " it, or it is no config"
        )
    for key, value in values.items():
        kind, one = KINDS[key], str if key in WORDS else float
        parts = value if kind is tuple and isinstance(value, tuple) else ()
        if not _is(value, kind) or not all(_is(part, one) for part in parts):
            raise ConfigError(f"{path} is not a config: {key} is {value!a:.100}, and should be a {kind.__name__}")


def _is(value: Any, kind: type) -> bool:
    """Whether a value that was read has a type; a whole number may stand for a float."""
    if isinstance(value, int) and not -LARGEST <= value <= LARGEST:
        return False
    return type(value) is kind or (kind is float and type(value) is int)


def _read_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file; empty if the file holds something else."""
    try:
        found = files.read_json(path)
    except ValueError as error:
        raise ConfigError(f"{path} is not a config: {error}") from error
    return found if isinstance(found, dict) else {}


def read_run(workdir: Path) -> ConfigDict:
    """The config that a run was started with, from its folder or that of its export."""
    path = workdir / "config.json"
    if not path.is_file():
        raise CheckpointError(f"no run in {workdir}: there is no {path}")
    return read_json(path)


def mend_run(workdir: Path, saved: dict[str, Any] | None) -> str:
    """Write the config of a run again, as a checkpoint ``saved`` it, where it is lost or damaged; returns what was so.

    Raises:
      ConfigError, CheckpointError: it is, and the checkpoint does not have it.
    """
    try:
        read_run(workdir)
    except (ConfigError, CheckpointError) as error:
        if not saved:
            raise
        files.write_whole(workdir / "config.json", json.dumps(saved, indent=2) + "\n")
        return str(error)
    return ""


def is_export(path: Path) -> bool:
    """Whether a ``config.json`` is that of an export; False where there is none."""
    return path.is_file() and TRAINED in _read_object(path)


def to_json(config: ConfigDict) -> str:
    """A config as JSON text; `read_json` reads it back."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


# ----------------------------------------------------------------------------------------------- changing values


def apply_overrides(config: ConfigDict, overrides: Mapping[str, str]) -> None:
    """Set values from text, each read as the type of the value that it replaces."""
    known = files.flatten(config)
    for key, text in overrides.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ConfigError(f"unknown key {key!r}{hint}")
        _set(config, key, _parse(key, text, known[key]))


def _set(config: ConfigDict, key: str, value: Any) -> None:
    """Set a value by its dotted key."""
    *parents, last = key.split(".")
    section = config
    for parent in parents:
        section = section[parent]
    section[last] = value


def _parse(key: str, text: str, old: Any) -> Any:
    """``text`` as a value of the type of ``old``."""
    kind = type(old)
    try:
        if kind is str:
            return text
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        if kind is tuple:
            value = ast.literal_eval(text) if text[:1] in ("(", "[") else tuple(text.split(",")) if text else ()
            values = value if isinstance(value, tuple | list) else [value]
            return tuple((str if key in WORDS else float)(one) for one in values)
        return kind(text.replace("_", "") if kind is int else text)
    except (ValueError, KeyError, SyntaxError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        article = "an" if kind is int else "a"
        raise ConfigError(f"{key} takes {article} {kind.__name__}, not {text!r:.200} (it is {old!r})") from error


# ----------------------------------------------------------------------------------------------------- comparing


def take_over(config: ConfigDict, workdir: Path, extend: bool) -> None:
    """Compare with the config of the run that is resumed, and fill gaps with what it measured.

    Args:
      config: of the process that goes on; its gaps are filled in place.
      workdir: the folder of the run.
      extend: whether the run may become longer: what was learnt so far was by the schedule of the shorter one.

    Raises:
      ConfigError: a key differs that a resumed run may not change.
    """
    old = read_run(workdir)
    if not config.latents.scale and config.latents.normalize == old.latents.normalize:
        config.latents = old.latents
    longer = config.total_steps > old.total_steps
    if longer and extend:
        if old.warmup_steps == old.total_steps // 10:  # it was cut to that, and is over
            config.warmup_steps = old.warmup_steps
        old.total_steps, old.total_epochs = config.total_steps, config.total_epochs
    changed = differences(old, config)
    if longer and not extend and all(one.startswith(LENGTH) for one in changed):
        raise ConfigError(
            f"{workdir} belongs to a run of {old.total_steps} steps, not {config.total_steps}: add --extend to make it"
            " longer (the learning rate then goes on as if it had been from the start), or set total_steps back"
        )
    if changed:
        raise ConfigError(
            f"{workdir} belongs to a run with another config ({'; '.join(changed)});"
            " set the keys back, or give another --workdir (init_from begins a new run with these parameters)"
        )


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Keys that differ between a run's config and another, other than those that may change, as ``key: old -> new``."""
    a, b = files.flatten(old), files.flatten(new)
    changed = [key for key in sorted(a.keys() | b.keys()) if key not in CHANGEABLE and a.get(key) != b.get(key)]
    return [f"{key}: {a.get(key)!r} -> {b.get(key)!r}" for key in changed]
