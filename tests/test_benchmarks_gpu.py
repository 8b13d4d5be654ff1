"""The benchmarks of GPUs, rehearsed on a CPU: what their rows hold, and what they refuse."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import mpjax as mp

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """Imports a file of the benchmarks by its name, as the scripts beside it do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    enabled = jax.config.jax_enable_compilation_cache
    yield importlib.import_module
    jax.config.update("jax_enable_compilation_cache", enabled)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_roofline_is_the_larger_of_arithmetic_and_memory(module):
    roofline = module("predicted").roofline
    peak = {"float32": 1e12, "bfloat16": 2e12, "float8_e4m3fn": 4e12}
    target = mp.Target(name="t", platform="cuda", peak=peak, bandwidth=1e9)
    moved = 2 * (3 * 5 + 5 * 7) + 2 * 3 * 7
    assert roofline((3, 5, 7), "bfloat16", target) == pytest.approx(1e3 * moved / 1e9)
    scales = 4 * (3 + 7)
    moved = 3 * 5 + 5 * 7 + 2 * 3 * 7 + scales
    assert roofline((3, 5, 7), "float8_e4m3fn", target) == pytest.approx(1e3 * moved / 1e9)
    fast = mp.Target(name="t", platform="cuda", peak=peak, bandwidth=1e30)
    assert roofline((3, 5, 7), "bfloat16", fast) == pytest.approx(1e3 * 2 * 3 * 5 * 7 / 2e12)


def test_correlations_of_times_that_span_orders_of_magnitude(module):
    def found(measured):
        predicted = (1.0, 10.0, 100.0)
        pairs = zip(predicted, measured, strict=True)
        return module("predicted").correlations(
            [{"predicted_ms": p, "measured_ms": m} for p, m in pairs]
        )

    assert found((2.0, 20.0, 200.0)) == {
        "pearson_of_logs": 1.0,
        "spearman": 1.0,
        "mean_efficiency": 0.5,
    }
    assert found((100.0, 10.0, 1.0))["spearman"] == -1.0
    assert found((1.0, 1.0, 2.0))["spearman"] == 0.866  # of ranks 1, 2, 3 and 1.5, 1.5, 3


def test_the_committed_prediction_is_of_ten_shapes_and_agrees_with_its_summary(module):
    *rows, last = rows_of(BENCHMARKS / "results" / "predicted.jsonl")
    script = module("predicted")
    found = [(row["m"], row["k"], row["n"], row["dtype"]) for row in rows]
    assert found == [(*shape, dtype) for shape in script.SHAPES for dtype in script.DTYPES]
    target = mp.resolve_target(last["machine"]["device"])
    for row in rows:
        expected = script.roofline((row["m"], row["k"], row["n"]), row["dtype"], target)
        assert row["predicted_ms"] == pytest.approx(expected, abs=1e-5)
    assert last["summary"]["all"] == script.correlations(rows)


def test_products_are_rehearsed_without_a_gpu(module, tmp_path):
    names = ["bfloat16", "float8_row", "int8_row_product", "int4_weights", "torch_int_mm"]
    arguments = ["--quick", "--cases", "1x256", "--output", str(tmp_path)]
    module("gpu_matmul").main([*arguments, "--contenders", *names])
    (row,) = rows_of(tmp_path / "gpu_matmul.jsonl")
    assert (row["m"], row["k"], row["n"]) == (1, 256, 128) and set(row["contenders"]) == set(names)
    ran = {name: entry for name, entry in row["contenders"].items() if name != "torch_int_mm"}
    base = ran["bfloat16"]["median_ms"]
    for entry in ran.values():
        assert entry["relative_error"] <= entry["error_bound"] and "busy_median_ms" not in entry
        assert entry["speedup"] == pytest.approx(base / entry["median_ms"], abs=1e-3)


@pytest.mark.parametrize("script", ["gpu_matmul", "predicted"])
def test_nothing_is_measured_or_overwritten_without_a_gpu(module, script, monkeypatch, capsys):
    monkeypatch.setattr(module(script), "Rows", None)  # which would open the file
    module(script).main([])
    assert "measures a GPU, and there is none" in capsys.readouterr().out


def test_the_time_of_a_gpu_is_read_from_its_streams_call_by_call(module, monkeypatch):
    timing = module("_gpu_timing")
    with pytest.raises(NotImplementedError, match="cpu has no kernels to time"):
        timing.busy(lambda: None, 2)

    def event(start, duration):
        return SimpleNamespace(start_ns=start, duration_ns=duration)

    def line(name, *events):
        return SimpleNamespace(name=name, events=[event(*each) for each in events])

    lines = [
        line("Stream #14(Compute)", (40, 7), (0, 3), (30, 1)),
        line("Stream #15(Memcpy)", (10, 2)),
        line("XLA Ops", (0, 1000)),
    ]
    planes = [SimpleNamespace(name="/device:GPU:0", lines=lines)]
    planes += [SimpleNamespace(name="/host:CPU", lines=[line("Stream", (0, 1))])]
    calls = []

    class Data:
        @staticmethod
        def from_file(path):
            return SimpleNamespace(planes=planes)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.profiler, "ProfileData", Data)
    found = timing.busy(lambda: calls.append(None), 2)
    assert len(calls) == 3 and np.allclose(found, [5e-9, 8e-9])
    with pytest.raises(RuntimeError, match="the trace of 3 calls holds 4 events"):
        timing.busy(lambda: None, 3)
