"""How XLA compiles in the tests: arrays are small, and nearly all the time goes into compiling, so with little care."""


def flags(devices: int) -> str:
    """``XLA_FLAGS`` of a program with so many fake devices."""
    return (
        f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        " --xla_llvm_disable_expensive_passes=true"
    )
