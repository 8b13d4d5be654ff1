"""Shared fixtures. JAX reads XLA_FLAGS once, so they are set before it is imported."""

import importlib
import os
import tempfile
from pathlib import Path

_DEVICES = "--xla_force_host_platform_device_count=8"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()

# libtpu reads its flags once, when the first test of the TPU compiler loads it: the size of its
# stacks (why is told in `mpjax/_compile_target.py`). There is no TPU host that it could ask.
_STACKS = "--fibers_default_thread_stack_size=1048576"
os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {_STACKS}".strip()
os.environ["TPU_SKIP_MDS_QUERY"] = "1"

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

import mpjax as mp  # noqa: E402

# Many tests compile programs alike, in functions of their own: each process compiles one once.
_COMPILED = tempfile.TemporaryDirectory(prefix="mpjax-tests-")
jax.config.update("jax_compilation_cache_dir", _COMPILED.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# No test is of how fast a machine is, or what else it does.
hypothesis.settings.register_profile(
    "patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("patient")


@pytest.fixture
def strict_promotion():
    """Makes implicit dtype promotion an error. Opt-in: Flax's norms and optax rely on it."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def key():
    """A PRNG key, the same in every run."""
    return jax.random.key(0)


@pytest.fixture(scope="module")
def example():
    """Imports a file of `examples/` by its name, as the script beside it would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
        yield importlib.import_module


@pytest.fixture(autouse=True)
def restore_the_global_policy():
    """The process-wide policy is the same after a test as before it."""
    before = mp.dtype_policy()
    yield
    mp.set_dtype_policy(before)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """What a file compiled is let go after it: all of them together take 5 GB."""
    yield
    jax.clear_caches()
