"""The scores: what is counted, what is printed, and that a perfect painter gets all of it."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict

from dit_jax import evaluate
from dit_jax.build import make_validation_source
from dit_jax.data.shapes_world import EVALUATION_CLASSES, evaluation_scenes, render
from dit_jax.errors import CheckpointError, ConfigError
from dit_jax.precompute import precompute
from dit_jax.sample import Pipeline
from dit_jax.stored import Trained
from tests.noise_pictures import SQUARE, draw_noise
from tests.tiny_run import tiny_config, train_tiny

COUNT = 20


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(evaluate, "QUICK", COUNT)
    monkeypatch.setattr(evaluate, "CAPTIONS", COUNT)


class Painter:
    """Stands in for a pipeline: paints what each prompt says, from a table."""

    def __init__(self, pictures: dict[str, np.ndarray], config: ConfigDict, data: str = ""):
        self.config, self._pictures = config, pictures
        self.trained = Trained(7, "ema", data, "", "")

    def draw(self, prompts, seeds):
        assert list(seeds) == list(range(len(prompts)))
        return np.stack([self._pictures[prompt] for prompt in prompts])


def shapes_painter(*fails: str) -> Painter:
    white = np.full((64, 64, 3), 255, np.uint8)
    scenes = [(name, scene) for name in EVALUATION_CLASSES for scene in evaluation_scenes(name, COUNT)]
    return Painter({s.caption: white if name in fails else render(s) for name, s in scenes}, tiny_config())


def test_a_perfect_painter_scores_one_and_an_empty_canvas_zero():
    scores, grid, line = evaluate.score_shapes(shapes_painter(), full=False)
    assert {name: parts["right"] for name, parts in scores.items()} == dict.fromkeys(EVALUATION_CLASSES, 1.0)
    assert line == "shapes: one_object=1.00 two_objects=1.00 new_combinations=1.00"
    assert grid.size == (8 * 64, 6 * 64)
    scores, _, line = evaluate.score_shapes(shapes_painter("two_objects"), full=False)
    assert scores["one_object"]["right"] == 1.0 and scores["one_object"]["prompts"] == COUNT
    assert scores["two_objects"]["right"] == scores["two_objects"]["object"] == 0.0
    assert line == "shapes: one_object=1.00 two_objects=0.00 new_combinations=1.00"


def test_a_model_of_another_size_is_refused():
    painter = shapes_painter()
    painter.config.data.image_size = 128
    with pytest.raises(ConfigError, match="draws 128 px; the shapes checker reads 64 px"):
        evaluate.score_shapes(painter, full=False)


def test_nearest_counts_pictures_that_look_like_their_captions_own():
    from dit_jax.build import make_source

    source = make_source(tiny_config(), "train")
    records = [source[i] for i in range(len(source))]
    rng = np.random.default_rng(0)
    noisy = {
        r.captions[0]: np.clip(r.image + rng.normal(0, 5, r.image.shape), 0, 255).astype(np.uint8) for r in records
    }
    data = source.fingerprint()
    scores, grid, line = evaluate.score_nearest(Painter(noisy, tiny_config(), data))
    assert scores == {"prompts": COUNT, "hits": 1.0} and line == "nearest: hits=1.00"
    assert grid.size == (8 * 64, 3 * 64)
    shuffled = dict(zip(noisy, [*list(noisy.values())[1:], next(iter(noisy.values()))], strict=True))
    scores, _, _ = evaluate.score_nearest(Painter(shuffled, tiny_config(), data))
    assert scores["hits"] < 0.2


def test_nearest_refuses_records_that_the_model_was_not_trained_on(tiny_run):
    pipeline = Pipeline.load(tiny_run)
    pipeline.config.data.num_pictures = 27
    with pytest.raises(CheckpointError, match="trained on other records than data.source=shapes holds now"):
        evaluate.score_nearest(pipeline)


def test_a_model_trained_from_a_cache_is_shown_its_pictures_by_a_flag(tmp_path, monkeypatch, capsys):
    from dit_jax.build import make_source

    precompute(tiny_config(), tmp_path / "cache", 0, 1, 4096)
    source = make_source(tiny_config(), "train")
    own = {record.captions[0]: record.image for record in (source[i] for i in range(len(source)))}
    config = tiny_config(data__source=f"cache:{tmp_path / 'cache'}")
    painter = Painter(own, config, make_source(config, "train").fingerprint())
    monkeypatch.setattr(evaluate, "Pipeline", SimpleNamespace(load=lambda *args: painter))
    flags = [f"--model={tmp_path}", "--metric=nearest"]
    with pytest.raises(SystemExit) as exit:
        evaluate.main(flags)
    assert exit.value.code == 2 and "which holds no pictures; say where they are: --source" in capsys.readouterr().err
    evaluate.main([*flags, "--source=shapes"])
    assert capsys.readouterr().out.splitlines()[-1] == "nearest: hits=1.00"


def test_the_program_writes_the_scores_and_ends_with_their_line(tmp_path, monkeypatch, capsys):
    painter = shapes_painter("new_combinations")
    monkeypatch.setattr(evaluate, "Pipeline", SimpleNamespace(load=lambda *args: painter))
    evaluate.main([f"--model={tmp_path}", "--metric=shapes"])
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "shapes: one_object=1.00 two_objects=1.00 new_combinations=0.00"
    assert any(line.startswith(f"one_object: {COUNT} prompts") for line in out)
    written = json.loads((tmp_path / "evaluation" / "shapes.json").read_text())
    assert written["settings"]["step"] == 7 and written["scores"]["new_combinations"]["right"] == 0.0
    assert (tmp_path / "evaluation" / "shapes.png").is_file()


def test_scores_that_cannot_be_written_are_not_drawn(tmp_path, monkeypatch, capsys):
    (tmp_path / "evaluation").touch()
    monkeypatch.setattr(evaluate, "Pipeline", SimpleNamespace(load=lambda *args: Painter({}, tiny_config())))
    with pytest.raises(SystemExit) as exit:
        evaluate.main([f"--model={tmp_path}"])
    error = capsys.readouterr().err
    assert exit.value.code == 8 and f"cannot write to {tmp_path / 'evaluation'}" in error and error.count("\n") == 1


@pytest.mark.parametrize("metric", ["nearest", "validation"])
def test_only_shapes_has_a_full_set_of_prompts(metric, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        evaluate.main([f"--model={tmp_path}", f"--metric={metric}", "--full"])
    assert exit.value.code == 2 and "--full is for --metric=shapes" in capsys.readouterr().err


def test_shapes_are_not_those_of_another_source(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        evaluate.main([f"--model={tmp_path}", "--source=folder:mine"])
    assert exit.value.code == 2 and "--source is for --metric=nearest" in capsys.readouterr().err


def test_a_folder_without_a_run_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        evaluate.main([f"--model={tmp_path}"])
    assert exit.value.code == 5 and "no run in" in capsys.readouterr().err


# --- validation ---------------------------------------------------------------------------------------------

VALIDATED = {"validate_every": "10", "data__validation_fraction": "0.5", "total_steps": "10", "sample_every": "0"}


@pytest.fixture(scope="module")
def validated(tmp_path_factory):
    return train_tiny(tmp_path_factory.mktemp("runs") / "validated", **VALIDATED)


def scored(model, *flags):
    evaluate.main([f"--model={model}", "--metric=validation", *flags])
    return json.loads((model / "evaluation" / "validation.json").read_text())


def test_validation_of_a_run_is_the_row_that_it_wrote(validated, capsys):
    row = json.loads((validated / "metrics.jsonl").read_text().splitlines()[-1])
    found = scored(validated)
    count = len(make_validation_source(tiny_config(**VALIDATED)))
    assert found["settings"] == {"step": 10, "parameters": "ema"}
    assert found["scores"] == {"source": "shapes", "records": count, "set_aside": True} | {
        name: pytest.approx(value, rel=1e-6) for name, value in row.items() if name != "step"
    }
    out = capsys.readouterr().out.splitlines()
    assert out[-1].startswith(f"validation: x0_error={row['validation_x0_error']:.4f} (log-SNR -5: ")
    assert not (validated / "evaluation" / "validation.png").exists()
    page = (validated / "report.html").read_text(encoding="utf-8")
    assert "<h3>validation</h3>" in page and "set_aside" in page
    raw, early = scored(validated, "--ema=raw"), scored(validated, "--step=5")
    assert len({scores["scores"]["validation_x0_error"] for scores in (found, raw, early)}) == 3


def test_other_pictures_are_scored_whole_and_the_runs_own_never(validated, tmp_path, capsys):
    source = draw_noise(tmp_path / "pictures", [SQUARE] * 5)
    found = scored(validated, f"--source={source}")["scores"]
    assert found["source"] == source and found["records"] == 5 and not found["set_aside"]
    assert f"all records: 5 of {source}" in capsys.readouterr().out
    precompute(tiny_config(**VALIDATED), tmp_path / "cache", 0, 1, 4096)  # the same records in another place
    moved, own = scored(validated, f"--source=cache:{tmp_path / 'cache'}")["scores"], scored(validated)["scores"]
    assert moved["set_aside"] and moved["records"] == own["records"]
    assert moved["validation_x0_error"] == pytest.approx(own["validation_x0_error"], rel=1e-5)


def test_without_records_set_aside_validation_asks_for_a_source(tiny_run, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        scored(tiny_run)
    assert exit.value.code == 2 and "name other captioned pictures: --source" in capsys.readouterr().err
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    assert scored(run, f"--source={draw_noise(tmp_path / 'pictures', [SQUARE] * 3)}")["scores"]["records"] == 3


def test_validation_refuses_data_that_have_changed(validated):
    pipeline = Pipeline.load(validated)
    pipeline.config.data.num_pictures = 27
    with pytest.raises(CheckpointError, match="trained on other records than data.source=shapes holds now"):
        evaluate.score_validation(pipeline, elsewhere=False)
