"""Drawing: a picture depends on its prompt and seed alone, and the program says what it does."""

import argparse
import functools
import json

import jax
import numpy as np
import pytest
from PIL import Image

from dit_jax import sample
from dit_jax.drawing import pictures
from dit_jax.errors import CheckpointError, ConfigError
from dit_jax.models.dit import DiT
from dit_jax.sample import Pipeline
from tests.tiny_run import tiny_config

PROMPTS = ["a large red circle", "a small blue square", "a small green star above a large pink cross"]


@pytest.fixture(scope="module")
def pipe(tiny_run) -> Pipeline:
    return Pipeline.load(tiny_run)


def arrays(images):
    return np.stack([np.asarray(image, np.int32) for image in images])


def test_pictures_are_uint8_of_the_models_size_and_know_their_origin(pipe):
    images = pipe(PROMPTS, seed=5, num_images=2)
    assert len(images) == 6 and all(image.size == (64, 64) and image.mode == "RGB" for image in images)
    assert [image.info["seed"] for image in images] == ["5", "6", "7", "8", "9", "10"]
    assert [image.info["prompt"] for image in images[:3]] == [PROMPTS[0], PROMPTS[0], PROMPTS[1]]
    assert images[0].info["step"] == "20"


def test_picture_i_is_the_same_alone_and_in_a_batch(pipe):
    together = arrays(pipe(PROMPTS, seed=5))
    alone = arrays([pipe([prompt], seed=5 + i)[0] for i, prompt in enumerate(PROMPTS)])
    assert np.abs(together - alone).max() <= 1  # one level of 255: sums of another batch size round differently
    assert np.abs(together[0] - together[1]).max() > 1


def test_text_states_draw_what_their_captions_draw(pipe):
    seeds = range(len(PROMPTS))
    drawn = pipe.draw(pipe.text_encoder(PROMPTS), seeds)
    assert np.abs(drawn.astype(int) - pipe.draw(PROMPTS, seeds)).max() <= 1  # encoded in a batch of another size
    with pytest.raises(ConfigError, match=f"1 seeds for {len(PROMPTS)} pictures"):
        pipe.draw(pipe.text_encoder(PROMPTS), [0])


def test_seed_guidance_sampler_steps_and_negative_prompt_all_act(pipe):
    base = arrays(pipe(PROMPTS[:1], guidance_scale=3.0))
    assert (arrays(pipe(PROMPTS[:1], guidance_scale=3.0)) == base).all()
    for change in (
        {"seed": 1},
        {"guidance_scale": 20.0},
        {"guidance_scale": 20.0, "negative_prompt": "a large red circle"},
        {"sampler": "heun"},
        {"sampler": "euler"},
        {"steps": 5},
        {"grid": "shifted"},
        {"guidance_interval": (0.0, 0.6)},
        {"guidance_rescale": 1.0},
        {"apg_parallel": 0.0},
        {"apg_norm": 0.5},
        {"sampler": "ddim", "eta": 0.5},  # 1 is ddpm
        {"grid": "shifted", "grid_shift": 9.0},
    ):
        assert np.abs(arrays(pipe(PROMPTS[:1], **{"guidance_scale": 3.0, **change})) - base).max() > 1, change


def count_flops(pipe, monkeypatch, scale, optimized=True, **settings):
    """Of the sampler of one picture with its steps unrolled: the counter takes the body of a loop once."""
    lowered = []

    def only_lowered(recipe):
        def latents(*args):
            lowered.append(pipe._compile(recipe).lower(*args))
            return np.zeros((1, 8, 8, 4), np.float32)

        return latents

    with monkeypatch.context() as patch:
        patch.setattr(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True))
        patch.setattr(pipe, "_compiled", only_lowered)
        pipe.draw(PROMPTS[:1], [0], guidance_scale=scale, steps=8, **settings)
    return (lowered[0].compile() if optimized else lowered[0]).cost_analysis()["flops"]


def test_outside_the_interval_the_second_pass_is_not_computed(pipe, monkeypatch):
    never = count_flops(pipe, monkeypatch, 1.0)
    always = count_flops(pipe, monkeypatch, 3.0)
    assert 1.8 * never < always < 2.2 * never
    some = count_flops(pipe, monkeypatch, 3.0, guidance_interval=(0.3, 0.8))  # t = 0.75, 0.625, 0.5, 0.375 of 8
    # the negative text is prepared once in both; a step more or less would be 8 %
    assert some == pytest.approx(never + 4 / 8 * (always - never), rel=0.04)


def test_text_is_prepared_once_and_not_at_every_step(pipe, monkeypatch):
    once = count_flops(pipe, monkeypatch, 1.0, optimized=False)
    prepare = DiT.prepare_text
    monkeypatch.setattr(DiT, "predict", lambda self, x, t, text, train, predict=DiT.predict: predict(
        self, x, t, prepare(self, text), train))  # fmt: skip
    monkeypatch.setattr(DiT, "prepare_text", lambda self, text: text)
    every_step = count_flops(pipe, monkeypatch, 1.0, optimized=False)
    m = pipe.config.model
    S, E, D, width = m.text_length, m.text_width, m.hidden_size, m.num_heads * m.attention_head_dim
    text = 2 * (S * E * D + m.num_layers * S * D * 2 * width)  # projection of the tokens; keys and values of each block
    assert every_step - once == pytest.approx(7 * text, rel=0.2)  # biases and the pooled vector come on top


def test_raw_and_averaged_parameters_differ(tiny_run, pipe):
    raw = Pipeline.load(tiny_run, ema="raw")
    assert np.abs(arrays(raw(PROMPTS[:1])) - arrays(pipe(PROMPTS[:1]))).max() > 1


def test_another_picture_size(pipe):
    assert pipe(PROMPTS[:1], height=32, width=96)[0].size == (96, 32)
    with pytest.raises(ConfigError, match="65 x 64: height and width must be multiples of 16"):
        pipe(PROMPTS[:1], height=65)


def test_a_checkpoint_that_is_not_there_is_an_error(tiny_run, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint of step 7.*there are 5, 10, 15, 20"):
        Pipeline.load(tiny_run, step=7)
    with pytest.raises(CheckpointError, match="no run in"):
        Pipeline.load(tmp_path)


def test_the_program_writes_pictures_and_a_grid(tiny_run, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[1:]) + "\n\n")
    sample.main([
        f"--model={tiny_run}", f"--prompt={PROMPTS[0]}", f"--prompts_file={tmp_path / 'prompts.txt'}",
        "--num_images=2", "--seed=5", f"--output={tmp_path / 'out'}",
    ])  # fmt: skip
    out = capsys.readouterr().out
    assert "seed=10" in out and str(tmp_path / "out" / "grid.png") in out
    with Image.open(tmp_path / "out" / "00003.png") as image:
        assert len(image.info.pop("digest")) == 64
        assert image.info == {"prompt": PROMPTS[1], "seed": "8", "step": "20"}
        expected = Pipeline.load(tiny_run)([PROMPTS[1]], seed=8)[0]
        assert np.abs(arrays([image]) - arrays([expected])).max() <= 1
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.size == (2 * 64, 3 * 64)


@pytest.mark.filterwarnings("default:.*longer than:UserWarning")
def test_a_prompt_of_200_words_draws_with_a_warning_or_is_an_error(tiny_run, tmp_path, capsys):
    flags = [f"--model={tiny_run}", f"--prompt=red{' very' * 199}", f"--output={tmp_path}"]
    sample.main(flags)
    told = capsys.readouterr()
    assert (tmp_path / "00000.png").is_file()
    assert "longer than 32 tokens" in told.err and "very very" in told.err and told.err.count("\n") == 1
    with pytest.raises(SystemExit) as exit:
        sample.main([*flags, "--long_prompt=error"])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and "longer than 32 tokens" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["--prompt=x", "--model=nowhere"], 5, "no run in nowhere"),
        (["--prompt=x", "--model=runs/mistyped"], 5, "no run in runs/mistyped"),
        (["--prompt=x", "--model=here/mistyped"], 5, "there is no folder here/mistyped; a folder 'here' lies here, so"),
        (["--prompt=x", "--model=run/mistyped"], 7, "there is no folder run/mistyped here, and the hub id run/mist"),
        (["--prompt=x", "--model=own--er/name"], 2, "'own--er/name' is no hub id"),
        (["--prompt=x", "--model=owner/name@.."], 2, "'owner/name@..' is no hub id"),
        ([], 2, "nothing to draw"),
        (["--prompts_file=none.txt"], 2, "no prompts file none.txt"),
        (["--prompt=x", "--steps=0"], 2, "steps is 0"),
        (["--prompt=x", "--height=0"], 2, "a picture of 0 x 64"),
        (["--prompt=x", "--seed=-1"], 2, "seeds from -1 to -1; they must be in [0, 2**32)"),
        (["--prompt=x", "--seed=4294967295", "--num_images=2"], 2, "seeds from 4294967295 to 4294967296"),
        (["--prompt=x", "--num_images=0"], 2, "--num_images is 0"),
        (["--prompt=x", "--num_images=3", "--seed", "1", "2"], 2, "2 seeds for 3 pictures; give one, or as many as"),
        (["--prompt=x", "--mask=none.png"], 2, "a mask without a picture"),
        (["--prompt=x", "--init_image=none.png"], 2, "init_image: no picture none.png"),
        (["--prompt=x", "--init_image=here/broken.png"], 3, "init_image: here/broken.png: not a picture that can be"),
        (["--prompt=x", "--strength=0.5"], 2, "strength 0.5 is of a picture to start from; there is no init_image"),
        (["--prompt=x", "--init_image=here/broken.png", "--output=here"], 2, "lies in --output and could be replaced"),
        (["--prompt=x", "--output=here"], 2, "here holds 00000.png, which no drawing wrote; choose another --output"),
        (
            ["--prompt=x", "--sampler=magic"],
            2,
            "sampler is 'magic'; it can be ddpm, ddim, dpmpp_2m, euler, euler_ancestral, heun",
        ),
    ],
)
def test_mistakes_end_in_one_line(tiny_run, tmp_path, capsys, monkeypatch, flags, code, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "here").mkdir()
    for name in ("00000.png", "broken.png"):
        (tmp_path / "here" / name).write_bytes(b"no picture")
    with pytest.raises(SystemExit) as exit:
        sample.main([f"--model={tiny_run}", *flags])
    error = capsys.readouterr().err
    assert exit.value.code == code and says in error and error.count("\n") == 1


def test_a_prompts_file_of_another_encoding_ends_in_one_line(tmp_path, capsys):
    path = tmp_path / "prompts.txt"
    path.write_bytes("ein grüner Stern\n".encode("latin-1"))
    with pytest.raises(SystemExit) as exit:
        sample.main(["--model=nowhere", f"--prompts_file={path}"])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and f"prompts file {path} is not UTF-8" in error and error.count("\n") == 1
    path.write_text("ein grüner Stern\n", encoding="utf-8-sig")  # as Windows writes it
    assert sample.read_prompts(path) == [("ein grüner Stern", None)]


def test_an_output_that_is_no_folder_is_refused_before_anything_is_drawn(tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Pipeline, "draw", lambda *args: pytest.fail("drew all the same"))
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as exit:
        sample.main([f"--model={tiny_run}", "--prompt=x", f"--output={tmp_path / 'file'}"])
    error = capsys.readouterr().err
    assert exit.value.code == 8 and f"cannot write to {tmp_path / 'file'}" in error and error.count("\n") == 1


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["out", "x.npz"])
def test_a_killed_command_goes_on_where_it_stopped(tiny_run, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(pictures, "BATCH", 2)
    rows = [{"prompt": PROMPTS[0]}, {"prompt": PROMPTS[1], "seed": 70}, {"prompt": PROMPTS[2]}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [f"--model={tiny_run}", f"--prompts_file={tmp_path / 'prompts.jsonl'}", "--steps=2", "--seed=5"]
    (tmp_path / "whole").mkdir()
    sample.main([*flags, f"--output={tmp_path / 'whole' / name}"])
    out = capsys.readouterr().out
    assert name == "x.npz" or [line.split()[1] for line in out.splitlines() if "seed=" in line] == [
        "seed=5", "seed=70", "seed=7"]  # fmt: skip
    draw, calls = Pipeline.draw, []

    def draw_once(self, *args, **settings):
        calls.append(args[0])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(self, *args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "draw", draw_once)
        patch.setattr(sample, "run_program", lambda main, *_: main())
        with pytest.raises(KeyboardInterrupt):
            sample.main([*flags, f"--output={tmp_path / 'again' / name}"])
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "draw", lambda self, *args, **settings: calls.append(args[0]) or draw(
            self, *args, **settings))  # fmt: skip
        sample.main([*flags, f"--output={tmp_path / 'again' / name}"])
    assert calls == [PROMPTS[:2], PROMPTS[2:], PROMPTS[2:]]
    assert "2 of 3 pictures are there already" in capsys.readouterr().out
    ours, theirs = tmp_path / "again", tmp_path / "whole"
    assert contents(ours / name if name == "out" else ours) == contents(theirs / name if name == "out" else theirs)


def test_prompts_of_a_jsonl_file(tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": "b", "seed": 3}\n')
    assert sample.read_prompts(path) == [("a", None), ("b", 3)]
    for line in ("[1]", '{"seed": 3}', '{"prompt": "a", "seed": "3"}', '{"prompt": "a", "negative_prompt": "b"}', "{"):
        path.write_text('{"prompt": "a"}\n' + line)
        with pytest.raises(ConfigError, match=f"line 2 of {path} (must be|is not JSON)"):
            sample.read_prompts(path)
    path.write_text('{"prompt": "a", "seed": 3}')
    with pytest.raises(SystemExit) as exit:
        sample.main(["--model=nowhere", f"--prompts_file={path}", "--num_images=2", "--seed", "1", "2"])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and "2 seeds, and others in" in error and error.count("\n") == 1


def test_every_key_of_how_pictures_are_drawn_has_its_flag():
    parser = argparse.ArgumentParser()
    sample.add_settings_flags(parser)
    none = sample.settings_of(parser.parse_args([]))
    assert set(none) == set(tiny_config().sample) - {"prompts", "strength"} and set(none.values()) == {None}
    given = ["--eta=0.5", "--grid_shift=2", "--grid_rho=5", "--guidance_interval", "0.1", "0.9"]
    found = {key: value for key, value in sample.settings_of(parser.parse_args(given)).items() if value is not None}
    assert found == {"eta": 0.5, "grid_shift": 2.0, "grid_rho": 5.0, "guidance_interval": (0.1, 0.9)}


def test_an_edit_by_flags_is_that_of_the_pipeline(tiny_run, tmp_path):
    picture = np.full((64, 64, 3), 90, np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    mask = np.zeros((64, 64), bool)
    mask[:32] = True
    Image.fromarray(mask).save(tmp_path / "mask.png")
    sample.main([
        f"--model={tiny_run}", f"--prompt={PROMPTS[0]}", "--seed", "8", "4", "--num_images=2", "--steps=4",
        f"--init_image={tmp_path / 'picture.png'}", f"--mask={tmp_path / 'mask.png'}", "--strength=0.5",
        f"--output={tmp_path / 'out'}",
    ])  # fmt: skip
    expected = Pipeline.load(tiny_run)(
        [PROMPTS[0]], seed=[8, 4], num_images=2, steps=4, init_image=picture, mask=mask, strength=0.5
    )
    drawn = [Image.open(tmp_path / "out" / f"0000{i}.png") for i in range(2)]
    np.testing.assert_array_equal(arrays(drawn), arrays(expected))
