"""What a dry run says: figures that add up, advice that is true by its own estimate, and nothing left behind."""

import re

import jax
import pytest

from dit_jax import dry_run as dry_run_module
from dit_jax import main
from dit_jax.config import load_config
from dit_jax.dry_run import Need
from dit_jax.training.memory import Activations
from tests.tiny_run import CONFIG, tiny_flags

SMALL = "--config=configs/small.py"


def dry_run(capsys, *flags: str) -> str:
    """The page."""
    main.main(["--dry_run", *flags])
    return capsys.readouterr().out


def table(page: str) -> dict[str, tuple[float, float]]:
    """The rows of the predicted memory: at one image, at the config's batch."""
    found = re.findall(r"^  (\D+?) +(\d+\.\d+) +(\d+\.\d+)$", page, re.MULTILINE)
    return {name: (float(one), float(all_of_it)) for name, one, all_of_it in found}


def test_the_command_of_a_stranger_with_a_4090(capsys, tmp_path, monkeypatch):
    """No weights, no pictures, no network; every word that users.md asks for; and not a file is written."""
    config = f"--config={CONFIG.parent / 'small.py'}"
    monkeypatch.chdir(tmp_path)
    page = dry_run(capsys, config, "--device=4090", "--config.learning_rate=3e-4")
    assert not list(tmp_path.iterdir())
    assert "learning_rate = 0.0003" in page and "model.text_width = 768" in page
    assert "19,863,568 (blocks 18,914,304, embedders 647,424, final layer 301,840)" in page
    assert "latents 32x32x4 -> 256 tokens" in page
    assert "8.07 G forward, 24.2 G in training" in page and "multiply-adds: 4.04 G" in page
    assert "estimate" in page and "bfloat16" in page and "fits: batch_size=128" in page


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_parts_of_the_memory_add_up(capsys, optimizer):
    rows = table(dry_run(capsys, SMALL, "--device=4090", f"--config.optimizer={optimizer}"))
    total = rows.pop("total")
    for column in (0, 1):
        assert sum(row[column] for row in rows.values()) == pytest.approx(total[column], abs=0.005)
    assert rows["parameters"] == rows["gradients"] == rows["moving average"]
    of_parameters = rows[f"optimizer ({optimizer})"][0] / rows["parameters"][0]
    assert of_parameters == pytest.approx({"adamw": 2.0, "muon": 1.05}[optimizer], abs=0.06)
    assert rows["activations"][1] == pytest.approx(128 * rows["activations"][0], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--config=configs/base.py", "--device=4090", "--config.accumulate=1"),
        ("--config=configs/xl.py", "--device=4090", "--config.accumulate=1"),
        ("--config=configs/xl.py", "--device=v5e", "--config.dtype=float32"),
        ("--config=configs/small.py", "--device=t4", "--config.dtype=float32"),
    ],
)
def test_the_advice_fits_when_it_is_taken(capsys, flags):
    page = dry_run(capsys, *flags)
    assert "does NOT fit" in page
    advice = [line.split() for line in page.splitlines() if line.startswith("    --config.")]
    assert advice
    for changes in advice:
        assert "  fits: batch_size=" in dry_run(capsys, *flags, *changes), changes


@pytest.mark.parametrize(("num_devices", "limit"), [(1, None), (1, 500), (8, None), (8, 140)])
def test_a_run_that_was_out_of_memory_is_advised_what_needs_less(monkeypatch, num_devices, limit):
    """Less than it did by the estimate, and not more than the devices have."""
    per_image = {"none": 10, "dots": 4, "full": 2}

    class Device:
        def memory_stats(self):
            return limit and {"bytes_limit": limit + dry_run_module.ENCODERS}

    def need(config, plan, remat="none"):
        activations = Activations(fixed=20, per_image=per_image[remat])
        return Need({"parameters": 10, "gradients": 10}, activations, config.accumulate, num_devices)

    def total(config):
        images = config.batch_size // (config.accumulate * num_devices)
        return need(config, None, config.model.remat).total(images)

    config = load_config("configs/small.py", {"batch_size": "64"})
    monkeypatch.setattr(jax, "devices", lambda: [Device()] * num_devices)
    monkeypatch.setattr(dry_run_module, "make_plan", lambda *_: None)
    monkeypatch.setattr(dry_run_module.build, "make_mesh", lambda *_: None)
    monkeypatch.setattr(dry_run_module, "predict_with", need)
    monkeypatch.setattr(dry_run_module.build, "compute_dtype", lambda *_: None)
    line = dry_run_module.advice(config)
    assert line.startswith("by the estimate of --dry_run each of these alone mends it: --config.")
    found = [dict(re.findall(r"--config\.([\w.]+)=(\w+)", one)) for one in line.split(", or ")]
    assert {"accumulate"} in map(set, found) and {"batch_size"} in map(set, found)
    for overrides in found:
        changed = load_config("configs/small.py", {"batch_size": "64", **overrides})
        assert changed.batch_size % (changed.accumulate * num_devices) == 0
        assert total(changed) <= min(total(config) - 1, limit or total(config)), overrides
    monkeypatch.setattr(Device, "memory_stats", lambda _: {"bytes_limit": dry_run_module.ENCODERS + 30})
    assert dry_run_module.advice(config).startswith("by the estimate of --dry_run it fits at no batch size")


def test_an_unknown_text_encoder_of_a_hub_needs_its_three_numbers(capsys, tmp_path, monkeypatch):
    config = f"--config={CONFIG.parent / 'small.py'}"
    monkeypatch.chdir(tmp_path)
    flags = [config, "--device=4090", "--config.text_encoder=nobody/nothing", "--config.model.text_length=20"]
    flags += ["--config.model.text_width=24"]
    with pytest.raises(SystemExit) as exit:
        main.main(["--dry_run", *flags])
    assert exit.value.code == 2 and "set model.text_length, model.text_width and" in capsys.readouterr().err
    assert "20 tokens of width 24" in dry_run(capsys, *flags, "--config.model.pooled_width=28")


@pytest.mark.slow
def test_the_largest_batch_is_the_largest(capsys):
    flags = (SMALL, "--device=t4")
    most = int(re.search(r"remat=none +([\d,]+)", dry_run(capsys, *flags))[1].replace(",", ""))
    assert "  fits:" in dry_run(capsys, *flags, f"--config.batch_size={most}")
    assert "does NOT fit" in dry_run(capsys, *flags, f"--config.batch_size={most + 1}")


def test_devices_that_share_parameters_hold_a_share_each(capsys):
    flags = ("--config=configs/xl.py", "--device=4090")
    pages = [dry_run(capsys, *flags, f"--config.mesh.fsdp={n}") for n in (1, 8)]
    one, eight = (float(re.search(r"moving average +([\d.]+)", page)[1]) for page in pages)
    assert one / 8 < eight < one / 7  # what lies outside the blocks is whole
    assert "fit on each of 8 RTX 4090" in pages[1]


def test_what_cannot_fit_is_not_given_advice(capsys):
    page = dry_run(capsys, "--config=configs/xl.py", "--device=t4")
    assert "does NOT fit, at no batch size" in page and "    --config." not in page


@pytest.mark.parametrize(("device", "dtype"), [("t4", "float16"), ("h100", "bfloat16")])
def test_auto_is_what_the_named_device_computes_in(capsys, device, dtype):
    assert f"compute in {dtype}," in dry_run(capsys, SMALL, "--config.model.num_layers=1", f"--device={device}")


def test_with_data_it_compiles_and_measures_the_real_step(capsys, tmp_path):
    page = dry_run(capsys, *tiny_flags(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    assert "shapes: 28 pictures; an epoch is 3.5 steps" in page
    compiled, off = re.search(r"compiled memory ([\d.]+) GiB .*; the estimate is ([+-]\d+)% off", page).groups()
    assert table(page)["total"][1] == pytest.approx(float(compiled) * (1 + int(off) / 100), abs=0.001)
    assert re.search(r"[\d.]+ s a step, .* 20 steps take \d+s", page)


def test_it_says_how_many_records_validate(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(dry_run_module, "say_measured", lambda *args: None)
    page = dry_run(capsys, *tiny_flags(tmp_path, data__validation_fraction="0.5", validate_every="1000"))
    trained, held_out = re.search(
        r"shapes: (\d+) pictures; .*\n  (\d+) others are set aside and validate every 1,000 steps", page
    ).groups()
    assert int(trained) + int(held_out) == 28 and 5 < int(held_out) < 23


def test_without_data_it_says_so_and_goes_on(capsys, tmp_path):
    page = dry_run(capsys, *tiny_flags(tmp_path / "run", data__source=f"folder:{tmp_path / 'gone'}"))
    assert "predicted memory" in page and f"{tmp_path / 'gone'} does not exist" in page and "s a step" not in page
    page = dry_run(capsys, SMALL, "--config.total_steps=0", "--config.total_epochs=3")
    assert "data.source is not set" in page and "total_steps is 0 here" in page and "warmup_steps = 500" in page


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--dry_run", SMALL, "--device=3090"], "--device is '3090'; it can be 4090, t4, h100, h200, v5e"),
        ([SMALL, "--device=4090"], "--device goes with --dry_run"),
        (["--dry_run", SMALL, "--config.learning_rat=1"], "did you mean 'learning_rate'?"),
        (["--dry_run", SMALL, "--config.batch_size=0"], "batch_size is 0; it must be 1 or more"),
        (["--dry_run", SMALL, "--config.model.modulation=film"], "it can be adaln, adaln_zero"),
        (["--dry_run", SMALL, "--config.sample.sampler=magic", "--device=4090"], "sampler is 'magic'"),
    ],
)
def test_mistakes_end_as_in_training(capsys, flags, says):
    with pytest.raises(SystemExit) as exit:
        main.main(flags)
    assert exit.value.code == 2 and says in capsys.readouterr().err
