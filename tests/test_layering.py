"""Imports point one way: mpjax_kernels <- mpjax <- its adapters."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def imported(statement: str, *packages: str) -> list[str]:
    """Which of `packages` a fresh interpreter has loaded after `statement`."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    result = subprocess.run(
        [sys.executable, "-c", f"import sys\n{statement}\nprint(*sys.modules)"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    return [package for package in packages if package in result.stdout.split()]


def test_mpjax_loads_no_flax_api_until_one_is_used():
    packages = ("mpjax", "flax.linen", "flax.nnx", "orbax.checkpoint")
    assert imported("import mpjax", *packages) == ["mpjax"]


def test_the_kernels_load_no_framework():
    packages = ("mpjax_kernels", "mpjax", "flax", "optax")
    assert imported("import mpjax_kernels", *packages) == ["mpjax_kernels"]


def test_the_check_itself_can_fail():
    assert imported("import flax.linen", "flax.linen", "optax") == ["flax.linen"]


def ruff(code: str) -> subprocess.CompletedProcess:
    """Lints `code` as a file of mpjax_kernels."""
    pytest.importorskip("ruff", reason="the linter is only in the `dev` extra")
    where = ROOT / "kernels" / "mpjax_kernels" / "_injected.py"
    return subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--stdin-filename", str(where), "-"],
        input=code,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "statement",
    ["import mpjax as x", "from mpjax import x", "import flax.linen as x", "import optax as x"],
)
def test_ruff_flags_an_upward_import_in_the_kernels(statement):
    result = ruff(f"{statement}\n\nprint(x)\n")
    assert result.returncode == 1 and "TID251" in result.stdout


def test_ruff_allows_jax_in_the_kernels():
    result = ruff("import jax as x\n\nprint(x)\n")
    assert result.returncode == 0, result.stdout
