"""How arrays lie on meshes, and what travels between eight devices because of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from dit_jax.models.dit import DiT
from dit_jax.sharding import AXES, abstract_mesh, batch_shards, make_mesh, parameter_shardings, state_shardings
from dit_jax.training.optimizer import make_optimizer
from dit_jax.training.state import init_params
from dit_jax.trees import named_leaves
from tests import xla
from tests.models.options import OPTIONS
from tests.toy import SMALL

ROOT = Path(__file__).resolve().parents[1]
L, B, N = 2, 8, 6  # blocks, pictures, tokens of one


def shapes_of(**changes):
    model = DiT(**{**SMALL, **changes})
    return jax.eval_shape(lambda key: init_params(model, key, 4, 6), jax.random.key(0))


def specs(tree) -> dict[str, P]:
    return {name: sharding.spec for name, sharding in named_leaves(tree).items()}


# --- rules ------------------------------------------------------------------------------------------------------


def test_a_mesh_has_three_axes_of_which_two_split_the_batch():
    mesh = make_mesh(jax.devices())
    assert mesh.axis_names == AXES and dict(mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 1}
    assert batch_shards(mesh) == 2
    assert batch_shards(make_mesh(jax.devices(), fsdp=0)) == 2 and batch_shards(abstract_mesh(8, 2)) == 8
    assert dict(make_mesh(jax.devices(), fsdp=0).shape)["fsdp"] == 2
    assert batch_shards(make_mesh(jax.devices(), tensor=2)) == 1


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"tensor": 3}, "tensor is 3; it must divide the 2 devices of a process"),
        ({"fsdp": 3}, "fsdp 3 x tensor 1 must divide the 2 devices"),
        ({"fsdp": 2, "tensor": 2}, "fsdp 2 x tensor 2 must divide the 2 devices"),
    ],
)
def test_a_mesh_that_does_not_go_into_the_devices_is_refused(axes, words):
    with pytest.raises(ValueError, match=words):
        make_mesh(jax.devices(), **axes)


def test_columns_and_then_rows_of_a_block_are_shared_out():
    found = specs(parameter_shardings(shapes_of(text_mode="cross", mlp="swiglu"), abstract_mesh(2, 2)))
    for name, spec in {
        "blocks_0/attention/qkv/kernel": P("fsdp", None, "tensor"),
        "blocks_0/attention/qkv/bias": P(None, "tensor"),
        "blocks_0/attention/out/kernel": P("tensor", "fsdp"),
        "blocks_0/attention/out/bias": P(),
        "blocks_0/cross/q/kernel": P("fsdp", "tensor"),
        "blocks_0/cross/kv/kernel": P("fsdp", None, "tensor"),
        "blocks_0/mlp/fc_in/kernel": P("fsdp", None, "tensor"),
        "blocks_1/mlp/fc_out/kernel": P("tensor", "fsdp"),
        "blocks_1/adaln/proj/kernel": P("fsdp"),
        "y_embedder/null_pooled": P(),
        "final_layer/linear/kernel": P(),
    }.items():
        assert found[name] == spec, name
    silu = specs(parameter_shardings(shapes_of(), abstract_mesh(2, 2)))
    assert silu["blocks_0/mlp/fc_in/kernel"] == P("fsdp", "tensor")
    assert silu["blocks_0/mlp/fc_in/bias"] == P("tensor")


@pytest.mark.parametrize("option", OPTIONS)
def test_every_parameter_of_every_model_has_a_rule(option):
    shapes = shapes_of(**OPTIONS[option])
    shared = [name for name, spec in specs(parameter_shardings(shapes, abstract_mesh(2, 2))).items() if any(spec)]
    large = {name for name, leaf in named_leaves(shapes).items() if "blocks" in name and name.endswith("/kernel")}
    assert large <= set(shared)


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match=r"no rule of dit_jax.sharding is about the parameter blocks_0/new/kernel"):
        parameter_shardings({"blocks_0": {"new": {"kernel": jnp.zeros((4, 4))}}}, abstract_mesh(2, 2))


def test_what_does_not_divide_is_named():
    with pytest.raises(ValueError, match=r"fsdp is 3, and does not divide 16 of blocks_0/adaln/proj/kernel \(16, 96\)"):
        parameter_shardings(shapes_of(), abstract_mesh(3, 1))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_optimizer_lies_as_its_parameters_do(name):
    shapes, mesh = shapes_of(text_mode="joint"), abstract_mesh(2, 2)
    optimizer = make_optimizer(name, b1=0.9, b2=0.99, muon_momentum=0.95, weight_decay=0.1, clip_norm=1.0)
    opt_state = jax.eval_shape(optimizer.init, shapes)
    of_params, of_opt_state = specs(parameter_shardings(shapes, mesh)), specs(state_shardings(opt_state, shapes, mesh))
    moments = 0
    for leaf, spec in of_opt_state.items():
        parameter = next((name for name in of_params if leaf.endswith(f"/{name}")), None)
        assert spec == of_params.get(parameter, P()), leaf
        moments += parameter is not None
    assert moments == len(of_params) * 2 - (name == "muon") * len(
        [n for n in of_params if "block" in n and "kernel" in n]
    )


# --- what travels -----------------------------------------------------------------------------------------------

PROGRAM = """
import functools, json, sys
import jax, numpy as np, optax
from dit_jax.bench.collectives import traffic
from dit_jax.bench.shard import moves
from dit_jax.sharding import batch_shards, make_mesh, put_batch
from dit_jax.training.memory import compiled_bytes
from dit_jax.training.state import abstract_state
from dit_jax.trees import named_leaves
from tests.test_sharding import L, N, WIDE, B
from tests.toy import Toy
from tests.toy_step import make_batch, make_state, make_step

optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1.0, eps=1e-2, weight_decay=0.1))

@functools.cache
def alone(**changes):
    # a model, what it is trained with, and what one device makes of that
    toy, one = Toy(**{**WIDE, **changes}), make_mesh(jax.devices()[:1])
    batch = {key: np.tile(a, (2, *[1] * (a.ndim - 1))) for key, a in make_batch(toy).items()}
    step = make_step(toy, optimizer=optimizer)
    before = jax.device_get(make_state(toy, step))
    after = jax.jit(step)(before, put_batch(batch, one))
    return toy, batch, before, jax.device_get(after)

for fsdp, tensor, changes in json.loads(sys.argv[1]):
    toy, batch, before, (expected, expected_metrics) = alone(**changes)
    mesh = make_mesh(jax.devices(), fsdp, tensor)
    toy.model = toy.model.clone(mesh=mesh)
    shapes = abstract_state(toy.model, optimizer, 4, 6, mesh)
    state = jax.device_put(before, jax.tree.map(lambda a: a.sharding, shapes))
    on_devices = put_batch(batch, mesh)
    compiled = make_step(toy, optimizer=optimizer).compile(state, on_devices)
    held = sum(a.addressable_data(0).nbytes for a in jax.tree.leaves((state, on_devices)))
    state, metrics = compiled(state, on_devices)
    for ours, shape in zip(jax.tree.leaves(state), jax.tree.leaves(shapes), strict=True):
        assert ours.sharding.is_equivalent_to(shape.sharding, ours.ndim)
    for name, theirs in named_leaves((expected, expected_metrics)).items():
        ours = named_leaves((state, metrics))[name]
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-4, err_msg=name)
    shared = [a for a in jax.tree.leaves(state.params) if "fsdp" in a.sharding.spec]
    found = traffic(compiled.as_text())
    print(json.dumps({
        "counts": {kind: each.calls for kind, each in found.items()},
        "numbers": {kind: each.numbers for kind, each in found.items()},
        "formula": moves(shapes.params, mesh, L, B // batch_shards(mesh) * N * WIDE["hidden_size"]),
        "shared": len(shared),
        "gathered": sum(a.addressable_data(0).size * fsdp for a in shared),
        "parameters": sum(a.size for a in jax.tree.leaves(state.params)),
        "held": held,
        "arguments": compiled_bytes(compiled)["arguments"],
    }))
"""

WIDE = {  # so that eight devices can share everything
    "num_layers": L,
    "hidden_size": 16,
    "num_heads": 8,
    "attention_head_dim": 4,
    "mlp_ratio": 2.0,
    "text_mode": "pooled",
    "dropout": 0.0,
}
MESHES = {  # fsdp and tensor of eight devices, and the model
    "data": (1, 1, {}),
    "tensor": (1, 8, {}),
    "data x tensor": (1, 2, {}),
    "data x fsdp": (4, 1, {}),
    "all three, joint, remat": (2, 2, {"text_mode": "joint", "mlp": "swiglu", "qk_norm": True, "remat": "full"}),
}


@pytest.fixture(scope="module")
def travelled():
    """What was found on every mesh; that the state after a step is that of one device, the program asserts."""
    environment = {**os.environ, "XLA_FLAGS": xla.flags(devices=8)}
    command = [sys.executable, "-c", PROGRAM, json.dumps(list(MESHES.values()))]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert not done.returncode, done.stderr
    return dict(zip(MESHES, map(json.loads, done.stdout.splitlines()), strict=True))


def test_data_parallel_reduces_all_gradients_at_once(travelled):
    found = travelled["data"]
    assert found["counts"] == {"all-reduce": 1}
    assert found["numbers"] == {"all-reduce": found["parameters"] + 1}  # and the loss


def test_tensor_parallel_reduces_behind_attention_and_the_mlp_both_ways(travelled):
    """4 L times the tokens of all pictures; the norm of the gradient is in one of them."""
    found, tokens = travelled["tensor"], B * N * WIDE["hidden_size"]
    assert found["counts"] == {"all-reduce": 4 * L}
    assert 4 * L * tokens <= found["numbers"]["all-reduce"] < 4 * L * tokens + 100


def test_data_and_tensor_parallel_reduce_gradients_and_their_norm_beside(travelled):
    assert travelled["data x tensor"]["counts"] == {"all-reduce": 4 * L + 2}


def test_fsdp_gathers_every_shared_parameter_once(travelled):
    found = travelled["data x fsdp"]
    assert found["shared"] == 5 * L  # qkv, out, two of the MLP, the modulation
    assert found["counts"] == {"all-gather": 5 * L, "all-reduce": 2}  # gradients, and their norm
    assert found["numbers"]["all-gather"] == found["gathered"]


def test_where_blocks_are_computed_again_their_parameters_are_gathered_again(travelled):
    found = travelled["all three, joint, remat"]
    assert found["gathered"] < found["numbers"]["all-gather"] <= 2 * found["gathered"]


def test_what_bench_shard_predicts_is_what_is_in_the_program(travelled):
    """But for losses and norms."""
    for name in ("data", "tensor", "data x tensor", "data x fsdp"):
        gathered, gradients, tokens, gathers, sums = travelled[name]["formula"]
        assert travelled[name]["counts"].get("all-gather", 0) == gathers
        assert 0 <= travelled[name]["counts"]["all-reduce"] - sums <= 2
        beside = sum(travelled[name]["numbers"].values()) - (gathered + sum(gradients) + tokens)
        assert 0 < beside < 100, name


def test_nothing_is_dealt_out_anew_whatever_the_model(travelled):
    for found in travelled.values():
        assert not {"all-to-all", "collective-permute"} & set(found["counts"]), found


def test_a_device_holds_its_share_and_no_more(travelled):
    """Of the state and of the batch, in the program as in the arrays; scalars are padded there."""
    for name, found in travelled.items():
        assert found["arguments"] == pytest.approx(found["held"], rel=0.02), name
    whole, shared = travelled["data"], travelled["data x fsdp"]
    numbers = 4 * shared["gathered"]  # parameters, average, two moments
    assert whole["held"] - shared["held"] == 4 * numbers * 3 / 4
