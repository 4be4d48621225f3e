"""Draws docs/images/architecture.svg from the shapes of the code: ``python -m tools.draw_architecture``.

The network of configs/small.py is called on shapes alone. Every module's output and number of parameters in the figure
is what was found there; a test draws it again and compares. The file opens by itself and follows the reader's light or
dark.
"""

import math
from html import escape
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dit_jax import build
from dit_jax.arrays import TextStates
from dit_jax.config import load_config
from dit_jax.resolve import resolve
from dit_jax.trees import count_parameters, named_leaves

REPOSITORY = Path(__file__).resolve().parents[1]
FIGURE = REPOSITORY / "docs" / "images" / "architecture.svg"
CONFIG = REPOSITORY / "configs" / "small.py"
B = 3  # a side that nothing else has

WIDTH, STEP, HEIGHT = 480, 78, 56  # of the page; from box to box; of a box
HALF = HEIGHT // 2
LEFT, RIGHT, WIDE = 12, 262, 206  # where the two columns begin, and their width

STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #1f2933; text-anchor: middle }
  .small { font-size: 11.5px; fill: #52606d }
  .title { font-weight: 600; font-size: 15px; text-anchor: start }
  rect { rx: 8px; stroke-width: 1.2px }
  .data { fill: none; stroke: none }
  .frozen { fill: #eef2f6; stroke: #9aa5b1; stroke-dasharray: 4 3 }
  .module { fill: #e3f0fb; stroke: #3c7fb8 }
  .block { fill: #fdf0dc; stroke: #c47f17 }
  path { fill: none; stroke: #7b8794; stroke-width: 1.4px; marker-end: url(#arrow) }
  #arrow path { fill: #7b8794; stroke: none; marker-end: none }
  @media (prefers-color-scheme: dark) {
    text { fill: #e4e7eb } .small { fill: #9fb3c8 }
    .frozen { fill: #2a3440 } .module { fill: #17354f } .block { fill: #46330f }
  }
"""


class Network(NamedTuple):
    """What there is to know of a network without a number in it.

    Attributes:
      model: the network.
      outputs: shape of what every module gives, by its name; B stands for the batch.
      params: shapes of its parameters.
      image: side of the pictures.
    """

    model: object
    outputs: dict[str, str]
    params: object
    image: int

    def parameters(self, module: str) -> str:
        """How many a module has."""
        leaves = named_leaves(self.params).items()
        return f"{sum(math.prod(leaf.shape) for name, leaf in leaves if name.startswith(f'{module}/')):,} parameters"


def look_at(config_file: Path) -> Network:
    """Calls the network of a config on shapes alone."""
    config = load_config(str(config_file), {})
    vae, text_encoder = build.describe_encoders(config)
    resolve(config, 1, vae, text_encoder, 1)
    model = build.make_model(config, jnp.float32)
    side = config.data.image_size // vae.factor

    def call(key: jax.Array) -> tuple[object, object]:
        text = TextStates(
            jnp.zeros((B, model.text_length, model.text_width)),
            jnp.zeros((B, model.pooled_width)),
            jnp.ones((B, model.text_length), bool),
        )
        inputs = (jnp.zeros((B, side, side, model.in_channels)), jnp.zeros(B), text)
        variables = model.init(key, *inputs, train=False)
        return variables["params"], model.apply(variables, *inputs, train=False, capture_intermediates=True)

    params, (prediction, found) = jax.eval_shape(call, jax.random.key(0))
    outputs = {"": shape(prediction)}
    for path, leaf in named_leaves(found["intermediates"]).items():
        outputs.setdefault(path.split("/__call__")[0], shape(leaf))
    return Network(model, outputs, params, config.data.image_size)


def shape(array: jax.ShapeDtypeStruct) -> str:
    """As the page writes it: ``[B, 256, 384]``."""
    return f"[{', '.join('B' if i == 0 else str(side) for i, side in enumerate(array.shape))}]"


class Box(NamedTuple):
    """A part of the figure: where its upper left corner is, what it is, and the lines in it."""

    x: int
    y: int
    kind: str
    lines: tuple[str, ...]

    def draw(self) -> str:
        """Its rectangle and text; the lines after the first are small."""
        middle = self.y + HEIGHT / 2 - 7.5 * (len(self.lines) - 1) + 4.5
        x, text = self.x + WIDE // 2, ""
        for i, line in enumerate(self.lines):
            text += f'<text class="{"small" if i else "name"}" x="{x}" y="{middle + 15 * i:g}">{escape(line)}</text>'
        return f'<rect class="{self.kind}" x="{self.x}" y="{self.y}" width="{WIDE}" height="{HEIGHT}"/>{text}'


def column(x: int, top: int, parts: list[tuple[str, ...]]) -> list[Box]:
    """Boxes one below the other: each a kind and its lines; of no kind, an empty place."""
    return [Box(x, top + STEP * i, kind, tuple(lines)) for i, (kind, *lines) in enumerate(parts) if kind]


def arrow(*points: tuple[float, float]) -> str:
    """Through these points, to the last."""
    return f'<path d="M{" L".join(f"{x:g} {y:g}" for x, y in points)}"/>'


def down(boxes: list[Box]) -> list[str]:
    """An arrow from each box to the one below it."""
    middle = boxes[0].x + WIDE // 2
    return [arrow((middle, a.y + HEIGHT), (middle, b.y - 2)) for a, b in zip(boxes, boxes[1:], strict=False)]


def draw(net: Network) -> str:
    """The figure: the way of a picture through the network, and one block."""
    m, out, count = net.model, net.outputs, net.parameters
    p = m.patch_size
    path = column(
        LEFT,
        44,
        [
            ("frozen", "VAE, frozen", f"picture [B, {net.image}, {net.image}, 3]"),
            ("data", "latents with noise", out[""].replace(f"{m.out_channels}]", f"{m.in_channels}]")),
            ("module", f"x_embedder: {p} x {p} patches", out["x_embedder"], count("x_embedder")),
            ("module", "pos_embed, added", f"positions of {out['x_embedder']}", count("pos_embed")),
            ("block", f"blocks_0 ... blocks_{m.num_layers - 1}", out["blocks_0"], f"each {count('blocks_0')}"),
            ("module", "final_layer", out["final_layer"], count("final_layer")),
            ("data", "prediction", out[""]),
        ],
    )
    condition = column(
        RIGHT,
        44,
        [
            ("frozen", "CLIP, frozen", f"tokens [B, {m.text_length}, {m.text_width}]", f"pooled [B, {m.pooled_width}]"),
            ("module", "y_embedder", out["y_embedder"], count("y_embedder")),
            ("data", "time t", "[B]"),
            ("module", "t_embedder", out["t_embedder"], count("t_embedder")),
            ("data", "condition c = time + caption", out["t_embedder"]),
        ],
    )
    clip, caption, time, embedded, c = condition
    beside, right = RIGHT + WIDE + 3, RIGHT + WIDE
    blocks, final = path[4], path[5]
    arrows = [
        *down(path),
        *down([clip, caption]),
        *down([time, embedded, c]),
        arrow((right, caption.y + HALF), (beside, caption.y + HALF), (beside, c.y + HALF), (right - 4, c.y + HALF)),
        arrow((RIGHT, c.y + HALF), (LEFT + WIDE + 3, blocks.y + HALF)),
        arrow((RIGHT + 60, c.y + HEIGHT), (RIGHT + 60, final.y + HALF), (LEFT + WIDE + 3, final.y + HALF)),
    ]

    top = path[-1].y + STEP + 34
    proj = "blocks_0/adaln/proj"
    inside = column(
        LEFT,
        top + 44,
        [
            ("data", "tokens x", out["blocks_0"]),
            ("module", "norm, scale, shift", "(1 + gamma_1) norm(x) + beta_1"),
            (
                "module",
                "attention/qkv",
                f"3 x {m.num_heads} heads of {m.attention_head_dim}",
                count("blocks_0/attention/qkv"),
            ),
            ("module", "attention/out", out["blocks_0/attention/out"], count("blocks_0/attention/out")),
            ("data", "x + attention", out["blocks_0"]),
            ("module", "norm, scale, shift", "(1 + gamma_2) norm(x) + beta_2"),
            ("module", "mlp/fc_in", out["blocks_0/mlp/fc_in"], count("blocks_0/mlp/fc_in")),
            ("module", "mlp/fc_out", out["blocks_0/mlp/fc_out"], count("blocks_0/mlp/fc_out")),
            ("data", "x + MLP", out["blocks_0"]),
        ],
    )
    vectors = column(
        RIGHT,
        top + 44,
        [
            ("data", "condition c", out["t_embedder"]),
            ("module", "adaln/proj", out[proj], count(proj)),
            ("",),
            ("",),
            ("",),
            ("data", "gamma_2 and beta_2", f"each {out['t_embedder']}"),
        ],
    )
    given, adaln, each = vectors
    edge, spine = LEFT + WIDE, RIGHT + WIDE // 2
    arrows += [
        *down(inside),
        *down([given, adaln]),
        arrow((RIGHT, adaln.y + HALF), (edge + 3, inside[1].y + HALF)),
        arrow((spine, adaln.y + HEIGHT), (spine, each.y - 2)),
        arrow((RIGHT + 28, each.y + HALF), (edge + 3, inside[5].y + HALF)),
        *(
            arrow(
                (edge - 40, a.y + HALF),
                (edge + 24, a.y + HALF),
                (edge + 24, b.y + HALF - 8),
                (edge - 40, b.y + HALF - 8),
            )
            for a, b in ((inside[0], inside[4]), (inside[4], inside[8]))
        ),
    ]
    height = inside[-1].y + HEIGHT + 12
    parts = [
        f'<text class="title" x="{LEFT}" y="28">The network of configs/{CONFIG.name}</text>',
        f'<text class="small" x="{RIGHT + WIDE // 2 + 30}" y="28">{count_parameters(net.params):,} parameters</text>',
        f'<text class="title" x="{LEFT}" y="{top + 28}">One of its {m.num_layers} blocks</text>',
        *arrows,
        *(box.draw() for box in (*path, *condition, *inside, *vectors)),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">\n'
        f"<title>The network of configs/{CONFIG.name}, and one of its blocks</title>\n<style>{STYLE}</style>\n"
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z"/></marker></defs>\n' + "\n".join(parts) + "\n</svg>\n"
    )


if __name__ == "__main__":
    FIGURE.write_text(draw(look_at(CONFIG)), encoding="utf-8")
    print(f"wrote {FIGURE.relative_to(REPOSITORY)}")
