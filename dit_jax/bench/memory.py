"""What each ``model.remat`` saves.

For every one, what the backward pass keeps of the forward one, and what the compiled train step sets aside on each
device; with the batch size, picture size and dtype of the config. It needs neither data nor the weights of the
encoders.
"""

from dit_jax.config import load_config

MIB = 2**20


def memory(spec: str, overrides: dict[str, str]) -> None:
    """Print a row per remat policy, in MiB, as a Markdown table."""
    import jax
    import numpy as np

    from dit_jax import build
    from dit_jax.models.dit import REMAT_POLICIES
    from dit_jax.resolve import resolve
    from dit_jax.sharding import batch_sharding, batch_shards, with_sharding
    from dit_jax.training.memory import abstract_batch, compiled_bytes, saved_bytes
    from dit_jax.training.state import abstract_state

    config = load_config(spec, overrides)
    mesh = build.make_mesh(config, jax.devices())
    vae, text_encoder = build.describe_encoders(config)
    resolve(config, config.batch_size, vae, text_encoder, batch_shards(mesh))
    config.latents.shift = config.latents.scale = (1.0,) * config.model.in_channels  # any: they change no shape
    side = config.data.image_size // vae.factor
    B, dtype = config.batch_size, build.compute_dtype(config.dtype, jax.devices()[0])
    steps = {}
    for remat in REMAT_POLICIES:
        config.model.remat = remat
        model, process = build.make_model(config, dtype, mesh), build.make_process(config)
        steps[remat] = build.make_step(config, model, process, *build.make_optimizer(config))
    print(
        f"batch {B} on {mesh.size} x {jax.devices()[0].device_kind}, accumulate {config.accumulate},"
        f" {np.dtype(dtype).name}, MiB a device"
    )
    print("| remat | kept for the backward pass | temporaries of the compiled step | the step in all |")
    print("|---|---|---|---|", flush=True)
    for remat, step in steps.items():
        kept = saved_bytes(step, B // config.accumulate // batch_shards(mesh), side, side)
        state = abstract_state(step.model, step.optimizer, side, side, mesh)
        batch = abstract_batch(step.model, B, side, side, config.data.storage_dtype)
        batch = with_sharding(batch, batch_sharding(mesh))
        found = compiled_bytes(step.compile(state, batch))
        row = [kept, found["temporaries"], found["total"]]
        print(f"| {remat} | " + " | ".join(f"{n / MIB:,.0f}" for n in row) + " |", flush=True)
