"""The documents: the two languages say the same, and what they name is there.

A fact of a document that can be looked up is looked up: commands and their flags, keys of the config, files, names of
the code, shapes and parameters, the layers of the house. Numbers and names in backticks must be the same in both
languages, section by section.
"""

import re
import tokenize
import xml.etree.ElementTree
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from PIL import Image

from configs import default
from dit_jax import build
from dit_jax.arrays import TextStates
from dit_jax.config import load_config
from dit_jax.files import flatten
from dit_jax.resolve import resolve
from dit_jax.trees import count_parameters, named_leaves
from tests import test_layers
from tests.command_lines import commands_in, parse
from tools import draw_architecture

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "dit_jax"
TWINS = {"README.md": "README.zh-CN.md", "docs/architecture.md": "docs/zh/模型架构.md"}
DOCUMENTS = [
    *TWINS,
    *TWINS.values(),
    "docs/index.md",
    "docs/pictures.md",
    "docs/diffusion.md",
    "docs/encoders.md",
    "docs/clusters.md",
    "docs/faq.md",
    "docs/changes.md",
    "docs/data.md",
    "docs/exports.md",
    "docs/sampling.md",
    "docs/validation.md",
    "docs/recipes.md",
    "docs/reliability.md",
    "docs/report.md",
]
WRITTEN = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")]
SOURCES = [*PACKAGE.rglob("*.py"), *(REPOSITORY / "configs").rglob("*.py")]
KEYS = flatten(default.get_config())
SECTIONS = "|".join({key.split(".")[0] for key in KEYS if "." in key})
FOLDERS = "|".join(
    ["configs", "dit_jax", "docs", "launch", "notebooks", "tests", "tools", *test_layers.LIBRARIES, *test_layers.ROOMS]
)


twins = pytest.mark.parametrize(("english", "chinese"), TWINS.items(), ids=TWINS)
each_document = pytest.mark.parametrize("document", DOCUMENTS)

FENCE = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TICKS = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)#]+)\)")
FLAG = re.compile(r"--([a-z_]+(?:\.[a-z_]+)*)")


def read(document: str) -> str:
    return (REPOSITORY / document).read_text(encoding="utf-8")


def sections(document: str) -> list[str]:
    """The text of every section without code blocks and the targets of links."""
    return re.split(r"^#+ .*$", LINK.sub("]", FENCE.sub("", read(document))), flags=re.MULTILINE)


def code(document: str) -> list[list[tuple[str, bool]]]:
    """Of every code block, its lines: what is before a comment, and whether there is one."""
    blocks = FENCE.findall(read(document))
    return [[(line.split(" #")[0].rstrip(), " #" in line) for line in block.splitlines()] for block in blocks]


def numbers(text: str) -> Counter[str]:
    return Counter(re.findall(r"\d+(?:[.,]\d+)*", text))


def commands(document: str) -> list[str]:
    """Every command of a bash block, on one line and without its comment."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", read(document), re.MULTILINE | re.DOTALL)
    return [line.split(" #")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def words_of_sources() -> set[str]:
    """Every name and every word of a string in the package and its configs; comments do not count."""
    found = set()
    for source in SOURCES:
        with source.open("rb") as file:
            for token in tokenize.tokenize(file.readline):
                if token.type != tokenize.COMMENT:
                    found |= set(re.findall(r"\w+", token.string))
    return found


@twins
def test_the_code_blocks_of_both_languages_are_the_same(english, chinese):
    assert code(english) == code(chinese)


@twins
def test_both_languages_give_the_same_numbers_and_names(english, chinese):
    ours, theirs = sections(english), sections(chinese)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert numbers(one) == numbers(other), one[:100]
        assert Counter(TICKS.findall(one)).keys() == Counter(TICKS.findall(other)).keys(), one[:100]


@each_document
def test_what_is_linked_to_is_there(document):
    for target in LINK.findall(read(document)):
        if not target.startswith("https://"):
            assert ((REPOSITORY / document).parent / target).exists(), target


@pytest.mark.parametrize("document", [path.relative_to(REPOSITORY).as_posix() for path in WRITTEN])
def test_commands_are_such_as_the_programs_take_and_name_keys_and_files_that_exist(document):
    for command in commands(document):
        for program, arguments in commands_in(command):
            parse(program, arguments)
            for key in re.findall(r"--config\.([\w.]+)", " ".join(arguments)):
                assert key in KEYS, command
        for file in re.findall(r"(?:configs|launch|tools)/[\w/]+\.\w+", command):
            assert (REPOSITORY / file).is_file(), command


@pytest.mark.parametrize(
    "document",
    [
        name
        for name in DOCUMENTS
        if "```python" in read(name) and "```diff" not in read(name) and name not in TWINS.values()
    ],
)
def test_blocks_of_python_run(document, tiny_run, tmp_path, monkeypatch):
    """In a folder with a trained model and a picture."""
    for folder in ("runs", "pictures"):
        (tmp_path / folder).mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(tiny_run)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "pictures" / "00000.png")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", read(document), re.MULTILINE | re.DOTALL)
    for block in blocks:
        exec(compile(block, document, "exec"), {"__name__": "block"})
    assert blocks


@each_document
def test_names_in_backticks_exist(document):
    words = words_of_sources() | {path.name for path in (REPOSITORY / "configs").rglob("*.py")}
    flags = '"--help"' + "".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    for name in set(TICKS.findall(FENCE.sub("", read(document)))):
        for flag in FLAG.findall(name):
            key = flag.removeprefix("config.")
            assert f'"--{flag}"' in flags if key == flag else key in {*KEYS, "key"}, name  # --config.key=value: any
        if re.match(rf"(?:{SECTIONS})\.[a-z_]+(?:=\w+)?$", name):
            assert name.partition("=")[0] in KEYS, name
        elif re.match(rf"(?:{FOLDERS})/", name):
            assert (REPOSITORY / name).exists() or (PACKAGE / name).exists(), name
        elif re.fullmatch(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*", name) and name not in words:
            assert set(name.split(".")) <= words, name


@pytest.mark.parametrize("document", ["docs/architecture.md", "docs/zh/模型架构.md"])
def test_the_small_model_has_the_shapes_and_parameters_of_the_table(document):
    config = load_config("configs/small.py", {})
    resolve(config, 1, *build.describe_encoders(config), 1)
    model = build.make_model(config, jnp.bfloat16)
    B, S, E, P = 3, model.text_length, model.text_width, model.pooled_width

    def run(key):
        text = TextStates(jnp.zeros((B, S, E)), jnp.zeros((B, P)), jnp.ones((B, S), bool))
        args = (jnp.zeros((B, 32, 32, model.in_channels)), jnp.zeros(B), text)
        variables = model.init(key, *args, train=False)
        return variables["params"], model.apply(variables, *args, train=False, capture_intermediates=True)[1]

    params, outputs = (named_leaves(tree) for tree in jax.eval_shape(run, jax.random.key(0)))
    rows = re.findall(r"^\| [^|]+ \| `([\w/]+)` \| `\[(.+)\]` \| ([\d,]+) \|$", read(document), re.MULTILINE)
    assert len(rows) == 11
    for name, shape, count in rows:
        output = next(leaf for path, leaf in outputs.items() if path.startswith(f"intermediates/{name}/__call__/0"))
        assert output.shape == tuple(B if side == "B" else int(side) for side in shape.split(", ")), name
        assert sum(leaf.size for path, leaf in params.items() if path.startswith(f"{name}/")) == int(
            count.replace(",", "")
        ), name
    assert f"{count_parameters(params):,}" in read(document)
    keys = re.findall(r"^\| `model\.(\w+)` \| ([\d.]+) \|", read(document), re.MULTILINE)
    assert len(keys) == 9
    assert all(config.model[key] == float(value) for key, value in keys)


def test_the_figure_is_what_the_code_draws_now():
    drawn = draw_architecture.draw(draw_architecture.look_at(draw_architecture.CONFIG))
    assert drawn == draw_architecture.FIGURE.read_text(encoding="utf-8"), "python -m tools.draw_architecture"
    xml.etree.ElementTree.fromstring(drawn)


@pytest.mark.parametrize("document", ["README.md", "README.zh-CN.md"])
def test_the_map_has_every_room_in_its_layer(document):
    rows = re.findall(r"^\| (\d) \| (.+?) \|", read(document), re.MULTILINE)
    layer = {room.rstrip("/"): int(number) for number, cell in rows for room in TICKS.findall(cell)}
    rooms = {test_layers.room_of(source) for source in test_layers.SOURCES} - {"__init__"}
    assert layer.keys() == rooms
    for room in rooms:
        assert all(layer[below] <= layer[room] for below in test_layers.MAY_IMPORT[room] & rooms), room
