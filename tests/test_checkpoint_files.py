"""Checkpoints on disk: whole or not there at all, the newest kept, and damage noticed."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax as mp

ROOT = Path(__file__).parent.parent


def test_the_newest_are_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mp.latest_step("runs/a") is None
    for step in (1, 5, 20, 100):
        path = mp.save_checkpoint("runs/a", {"x": jnp.asarray(step)}, step=step)
    assert path == tmp_path / "runs" / "a" / "100"
    assert sorted(os.listdir("runs/a")) == ["100", "20", "5"]
    assert mp.latest_step("runs/a") == 100
    assert int(mp.restore_checkpoint("runs/a", {"x": jnp.asarray(0)})["x"]) == 100
    assert int(mp.restore_checkpoint("runs/a", {"x": jnp.asarray(0)}, step=5)["x"]) == 5
    mp.save_checkpoint("runs/a", {"x": jnp.asarray(0)}, step=101, keep=None)
    assert sorted(os.listdir("runs/a")) == ["100", "101", "20", "5"]
    mp.save_checkpoint("runs/a", {"x": jnp.asarray(0)}, step=102, keep=1)
    assert os.listdir("runs/a") == ["102"]


def test_unfinished_saves_are_passed_over_and_cleaned_up(tmp_path):
    x = {"x": jnp.arange(4.0)}
    mp.save_checkpoint(tmp_path, x, step=1)
    unfinished = tmp_path / "2.orbax-checkpoint-tmp"
    (unfinished / "arrays").mkdir(parents=True)
    assert mp.latest_step(tmp_path) == 1
    np.testing.assert_array_equal(mp.restore_checkpoint(tmp_path, x)["x"], x["x"])
    mp.save_checkpoint(tmp_path, x, step=2)
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def kill_in_a_save(command: list[str], directory: Path, finished: Path) -> None:
    """Starts a process and kills it while, after one it has finished, a save is under way."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    process = subprocess.Popen(command, env=env)
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None and time.monotonic() < deadline
            if finished.is_dir() and list(directory.glob("*tmp*")):
                process.send_signal(signal.SIGSTOP)
                os.waitid(os.P_PID, process.pid, os.WSTOPPED)
                if list(directory.glob("*tmp*")):
                    return
                process.send_signal(signal.SIGCONT)
            time.sleep(0.001)
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(os.name != "posix", reason="stops the process by a signal")
def test_killed_in_a_save_the_one_before_loads(tmp_path):
    child = [sys.executable, str(ROOT / "tests" / "checkpoint_killed.py"), str(tmp_path)]
    first = 0
    for _ in range(2):
        kill_in_a_save([*child, str(first)], tmp_path, tmp_path / str(first + 1))
        assert len(list(tmp_path.glob("*tmp*"))) == 1
        step = mp.latest_step(tmp_path)
        assert step is not None and step > first
        x = mp.restore_checkpoint(tmp_path, {"x": jnp.zeros((4, 1 << 20), jnp.int32)})["x"]
        assert (x == step).all()
        first = step + 1
    mp.save_checkpoint(tmp_path, {"x": jnp.asarray(1)}, step=first)
    assert not list(tmp_path.glob("*tmp*"))


def array_file(directory: Path) -> Path:
    """The file that holds the bytes of the largest array."""
    return max(directory.rglob("*"), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("harm", ["flipped", "cut", "index", "missing"])
def test_a_damaged_checkpoint_is_noticed(tmp_path, harm):
    tree = {"big": jax.random.normal(jax.random.key(0), (200, 200))}
    mp.save_checkpoint(tmp_path, tree, step=3)
    path = mp.save_checkpoint(tmp_path, tree, step=7)
    file = path / "index" / "metadata" if harm == "index" else array_file(path)
    data = bytearray(file.read_bytes())
    if harm == "flipped":
        data[len(data) // 2] ^= 1
    if harm == "missing":
        file.unlink()
    else:
        file.write_bytes(data if harm == "flipped" else data[: len(data) // 2])
    message = rf"step 7 in {re.escape(str(tmp_path))} is damaged \(.*restore another one, step= "
    with pytest.raises(ValueError, match=f"(?s){message}one of \\[3\\]") as error:
        mp.restore_checkpoint(tmp_path, tree)
    if harm == "flipped":
        assert "the bytes of 'big' have changed since it was saved" in str(error.value)
    restored = mp.restore_checkpoint(tmp_path, tree, step=3)
    np.testing.assert_array_equal(restored["big"], tree["big"])


def test_where_there_is_no_checkpoint(tmp_path):
    template = {"x": jnp.zeros(())}
    with pytest.raises(FileNotFoundError, match="/none: there is no such directory"):
        mp.restore_checkpoint(tmp_path / "none", template)
    with pytest.raises(FileNotFoundError, match="it holds nothing"):
        mp.restore_checkpoint(tmp_path, template)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "5.orbax-checkpoint-tmp").mkdir()
    with pytest.raises(FileNotFoundError, match="it holds 5.orbax-checkpoint-tmp, notes.txt"):
        mp.restore_checkpoint(tmp_path, template)
    mp.save_checkpoint(tmp_path, template, step=2)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 5 in .*, only of \[2\]"):
        mp.restore_checkpoint(tmp_path, template, step=5)
    assert sorted(os.listdir(tmp_path)) == ["2", "notes.txt"]


def test_what_cannot_be_saved(tmp_path):
    x = {"x": jnp.zeros(())}
    mp.save_checkpoint(tmp_path, x, step=4)
    for step in (3, 4):
        with pytest.raises(ValueError, match=f"step {step} is not after 4, the latest one in"):
            mp.save_checkpoint(tmp_path, x, step=step)
    with pytest.raises(ValueError, match="step -1 must not be negative"):
        mp.save_checkpoint(tmp_path, x, step=-1)
    with pytest.raises(ValueError, match=r"`state` \(dict\) has 0 optimizers .* pass step="):
        mp.save_checkpoint(tmp_path, x)
    with pytest.raises(ValueError, match="`keep` must be at least 1, or None .* keep=0"):
        mp.save_checkpoint(tmp_path, x, step=5, keep=0)
    with pytest.raises(TypeError, match="'a/name' is a str, but a checkpoint holds arrays"):
        mp.save_checkpoint(tmp_path, {"a": {"name": "x"}}, step=5)
    with pytest.raises(ValueError, match="two leaves have the path 'a/b'"):
        mp.save_checkpoint(tmp_path, {"a": {"b": 1}, "a/b": 1}, step=5)
    with pytest.raises(ValueError, match="the URL gs://bucket/run, but .* mount the bucket"):
        mp.save_checkpoint("gs://bucket/run", x, step=5)
    assert os.listdir(tmp_path) == ["4"]


def test_without_orbax(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match="`pip install orbax-checkpoint`"):
        mp.save_checkpoint(tmp_path, {"x": 1}, step=0)
