"""How XLA compiles in the tests: arrays are small, and nearly all the time goes into compiling, so with little care."""

CARELESS = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",  # without optimisation the older emitters are done in half the time
)


def flags(devices: int) -> str:
    """``XLA_FLAGS`` of a program with so many fake devices."""
    return " ".join([f"--xla_force_host_platform_device_count={devices}", *CARELESS])
