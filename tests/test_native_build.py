"""The build of the native kernels: what a compiler is asked for, on which machine."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "kernels" / "mpjax_kernels" / "native"


@pytest.fixture
def hook(monkeypatch):
    """hatch_build.py, of whose base class this needs nothing."""
    plugin = ModuleType("hatchling.builders.hooks.plugin.interface")
    plugin.__dict__["BuildHookInterface"] = object
    monkeypatch.setitem(sys.modules, plugin.__name__, plugin)
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def commands(hook, monkeypatch):
    """What is run, and nothing is; the compiler knows every flag."""
    seen = []

    def run(command, **_):
        seen.append(list(command))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(hook.subprocess, "run", run)
    return seen


@pytest.mark.parametrize("machine", ["aarch64", "arm64", "ppc64le"])
def test_other_machines_get_no_flags_of_x86(hook, commands, machine, monkeypatch, tmp_path):
    monkeypatch.setattr(hook.platform, "machine", lambda: machine)
    hook.build("c++", SOURCES, tmp_path)
    assert len(commands) == len(list(SOURCES.glob("*.cc"))) + 1  # and the library
    flags = {flag for command in commands for flag in command}
    assert not {flag for flag in flags if flag.startswith(("-m", "-DMPJAX_HAS_"))}


def test_every_source_gets_the_flags_of_its_name(hook, commands, monkeypatch, tmp_path):
    monkeypatch.setattr(hook.platform, "machine", lambda: "x86_64")
    hook.build("c++", SOURCES, tmp_path)
    compiled = {c[c.index("-c") + 1]: set(c) for c in commands if "-shared" not in c}
    for source in SOURCES.glob("*.cc"):
        special = {flag for flag in compiled[str(source)] if flag.startswith("-m")}
        known = [
            flags for name, flags in hook.INSTRUCTION_SETS.items() if source.stem.endswith(name)
        ]
        assert special == {flag for flags in known for flag in flags}
        assert len(known) <= 1
        is_plain = not any(f"_{name}" in source.stem for name in ("avx", "sse"))
        assert bool(known) != is_plain
