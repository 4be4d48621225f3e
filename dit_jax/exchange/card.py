"""The README of an export: what the model is, what it came from, how good it is, and how it is loaded.

All of it is read from the run: its config, its last numbers, its scores and its newest grid of samples. What only a
person can say, the licence and what the model is for, is left to fill in.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dit_jax import __version__
from dit_jax.exchange.components import MODULE, SCRIPT
from dit_jax.exchange.schedulers import Scheduler
from dit_jax.files import flatten, read_json, read_rows
from dit_jax.workdir import METRICS

CARD, PICTURE = "README.md", "samples.png"
RECIPE = (
    "data.source", "data.image_size", "batch_size", "optimizer", "learning_rate", "learning_rate_schedule",
    "warmup_steps", "weight_decay", "ema_decay", "caption_dropout", "diffusion.schedule", "diffusion.shift",
    "diffusion.prediction", "diffusion.times", "diffusion.weighting", "latents.normalize", "seed",
)  # fmt: skip
MODEL = (
    "hidden_size", "num_layers", "num_heads", "attention_head_dim", "patch_size", "mlp", "norm", "positions", "rope",
    "text_mode", "text_pool", "modulation",
)  # fmt: skip
TO_FILL_IN = "To fill in: the licence of the weights, that of the data, and what the model is not for."
SAMPLING = ("sampler", "grid", "steps", "guidance_scale", "guidance_interval")
EXACT = {
    "discrete": "the same times as in dit_jax where the number of steps divides 1,000; diffusers rounds others",
    "flow": f"the same times as in dit_jax, set by `{SCRIPT}`: diffusers would choose others",
    "edm": "the same times as in dit_jax",
}


@dataclass(frozen=True)
class Facts:
    """What a card is made from.

    Attributes:
      name: of the model.
      form: of the export.
      config: resolved, of the run.
      trained: ``step``, ``parameters`` and the sha256 of ``data``, ``vae`` and ``text_encoder``.
      count: of the parameters.
      scheduler: of an export for diffusers, else None.
      run: its folder on this machine, else None.
    """

    name: str
    form: str
    config: ConfigDict
    trained: Mapping[str, Any]
    count: int
    scheduler: Scheduler | None
    run: Path | None


def write_card(folder: Path, facts: Facts) -> None:
    """Write the card, and the picture that it shows, into the folder of an otherwise complete export."""
    picture = _newest_grid(facts)
    if picture:
        shutil.copyfile(picture, folder / PICTURE)
    config, trained, values = facts.config, facts.trained, flatten(facts.config)
    prompts = ", ".join(config.sample.prompts)
    head = f"""\
---
license: # fill in
library_name: {"diffusers" if facts.scheduler else "dit_jax"}
pipeline_tag: text-to-image
---

# {facts.name}

A Diffusion Transformer that draws pictures of {config.data.image_size} px from prompts: {facts.count:,} parameters,
{"averaged" if trained["parameters"] == "ema" else "as they were"} after step {trained["step"]:,} of \
{config.total_steps:,}, trained with dit_jax {__version__}.
"""
    parts = [head]
    if picture:
        parts.append(f"![samples]({PICTURE})\n\nNot picked{f': {prompts}' if prompts else ''}.\n")
    parts.append("## Use\n\n" + (_use_in_torch(folder, facts, facts.scheduler) if facts.scheduler else _use(facts)))
    parts.append("## Training\n\n" + _table({key: values[key] for key in RECIPE}))
    parts.append(f"sha256 of the list of records: `{trained['data']}`.\n")
    parts.append("## Model\n\n" + _table({f"model.{key}": config.model[key] for key in MODEL}))
    encoders = {kind: f"{_named(config[kind])}, sha256 {trained[kind]}" for kind in ("vae", "text_encoder")}
    parts.append(_table(encoders))
    parts.append("Drawn with, unless told otherwise:\n\n" + _table({f"sample.{k}": config.sample[k] for k in SAMPLING}))
    parts.append("## Scores\n\n" + (_scores(facts) or "None were measured.\n"))
    parts.append(f"## Licence and limits\n\n{TO_FILL_IN}\n")
    (folder / CARD).write_text("\n".join(parts), encoding="utf-8")


def _use(facts: Facts) -> str:
    return f"""\
In this folder, with dit_jax installed:

```python
from dit_jax.sample import Pipeline

pipe = Pipeline.load(".")
pipe([{_prompt(facts)!r}], seed=0)[0].save("picture.png")
```
"""


def _use_in_torch(folder: Path, facts: Facts, scheduler: Scheduler) -> str:
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (MODULE, SCRIPT)}
    return f"""\
In this folder, with torch, diffusers and transformers installed:

```bash
python {SCRIPT} --prompt={json.dumps(_prompt(facts))} --output=picture.png
```

```python
from pathlib import Path

from sample import Model

model = Model(Path("."), "cpu")                  # vae, text_encoder, tokenizer, scheduler, transformer
model.draw([{_prompt(facts)!r}], seed=0)[0].save("picture.png")
```

`vae/`, `text_encoder/`, `tokenizer/` and `scheduler/` are read by `from_pretrained` of the classes that
`model_index.json` names. The transformer is no class of diffusers: it is read by `{MODULE}`, which needs torch alone
and which you import yourself; nothing here asks for remote code. Compare before you do:

{_table({name: f"sha256 {digest}" for name, digest in hashes.items()})}
`{scheduler.name}` walks as the sampler of the run: {EXACT[scheduler.times]}. Latents are shifted and scaled by
`latents_shift` and `latents_scale` of `transformer/config.json`. `Pipeline.load(".")` of dit_jax reads this folder too.
"""


def _prompt(facts: Facts) -> str:
    return next(iter(facts.config.sample.prompts), "a photo of a cat")


def _named(encoder: str) -> str:
    """An encoder as the run names it; of a folder on somebody's machine its name alone."""
    return encoder if encoder.count("/") <= 1 and not encoder.startswith(("/", "~")) else Path(encoder).name


def _table(values: Mapping[str, Any]) -> str:
    cells = {key: json.dumps(value) if not isinstance(value, str) else value for key, value in values.items()}
    rows = [f"| `{key}` | {value.replace('|', chr(92) + '|') or '-'} |" for key, value in cells.items()]
    return "\n".join(["| | |", "|---|---|", *rows, ""])


def _scores(facts: Facts) -> str:
    """The newest numbers of the run up to this step, and the evaluations of these very parameters."""
    if facts.run is None:
        return ""
    step, found = facts.trained["step"], []
    metrics = facts.run / METRICS
    newest: dict[str, tuple[int, float]] = {}
    for _, row in read_rows(metrics) if metrics.is_file() else ():
        if type(row.get("step")) is int and row["step"] <= step:
            newest |= {key: (row["step"], value) for key, value in row.items() if isinstance(value, int | float)}
    newest.pop("step", None)
    if newest:
        rows = {key: f"{value:.5g} at step {at}" for key, (at, value) in newest.items()}
        found.append(_table(rows))
    for path in sorted((facts.run / "evaluation").glob("*.json")):
        try:
            report = read_json(path)
            settings, scores = report["settings"], report["scores"]
            same = (settings["step"], settings["parameters"]) == (step, facts.trained["parameters"])
        except (ValueError, KeyError, TypeError):
            continue  # a damaged report is no score
        if same:
            drawn = f", {settings['sampler']} with {settings['steps']} steps" if "sampler" in settings else ""
            found.append(f"`evaluate --metric={path.stem}`{drawn}:\n\n{_table(flatten(scores, ' '))}")
    return "\n".join(found)


def _newest_grid(facts: Facts) -> Path | None:
    """The grid of samples that was drawn last, up to this step."""
    if facts.run is None or not (facts.run / "samples").is_dir():
        return None
    grids = [path for path in (facts.run / "samples").iterdir() if re.fullmatch(r"\d+\.png", path.name)]
    old_enough = [path for path in grids if int(path.stem) <= facts.trained["step"]]
    return max(old_enough, key=lambda path: int(path.stem), default=None)
