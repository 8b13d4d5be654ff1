"""What the tests share that ask what the real NVIDIA compiler makes of a program."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

CONFIG = Path(__file__).parent / "data" / "h200_target_config.textproto"


def h200_compiler() -> Callable[..., Any]:
    """Compiles a function of some arguments for an H200; returns the optimized program.

    Keywords are options of the compiler.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "--xla_gpu_autotune_level=0" not in flags:  # autotuning runs kernels on the GPU
        pytest.fail("it needs XLA_FLAGS=--xla_gpu_autotune_level=0: run `make test-gpu`")
    try:
        topology = topologies.get_topology_desc(
            "1x1x1", "cuda", topology="1x1x1", target_config=CONFIG.read_text()
        )
    except Exception as error:
        pytest.fail(f"no NVIDIA compiler: run `make test-gpu`, which installs it. {error}")
    sharding = SingleDeviceSharding(topology.devices[0])

    def compile(function, *args, **options):
        jitted = jax.jit(function, in_shardings=sharding, out_shardings=sharding)
        return jitted.lower(*args).compile(compiler_options=options).as_text()

    return compile


def multiplied(text: str) -> list[tuple[str, str]]:
    """The dtypes of the operands of every matrix product, wherever it is fused."""
    dtypes = dict(re.findall(r"(%[\w.-]+) = (\w+)\[", text))
    pairs = re.findall(r" dot\((%[\w.-]+), (%[\w.-]+)\)", text)
    return sorted((dtypes[left], dtypes[right]) for left, right in pairs)
