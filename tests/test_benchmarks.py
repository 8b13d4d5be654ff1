"""The benchmarks: what a row holds, and that nobody is timed on a wrong result or left out."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
LIMITS = {"read_gb_per_s": 10.0, "copy_gb_per_s": 8.0, "float32_gops": 100.0, "int8_gops": 200.0}


@pytest.fixture
def module(monkeypatch):
    """Imports a file of the benchmarks by its name, as the scripts beside it do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def contest(module):
    return module("_contest")


def contender(contest, value, bound=0.01):
    """One whose every call returns `value`."""
    program = contest.Program(run=lambda: np.full(4, value), compile_seconds=0.5, bytes=1000)
    return contest.Contender(lambda: program, bound, package="numpy")


def missing(contest):
    def prepare():
        return importlib.import_module("no_such_peer")

    return contest.Contender(prepare, 0.01, package="no-such-peer")


def case(contest, ours, **peers):
    return contest.Contest(
        facts={"case": "ones"},
        reference=np.ones(4),
        ours=ours,
        peers=peers,
        operations=2000,
        targets={name: 0.5 for name in peers},
    )


def run(*arguments, script="matmul.py"):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_matmul_writes_a_row_whose_figures_agree_with_each_other(tmp_path):
    result = run("--quick", "--peers", "float32", "--cases", "w8a8", "--output", tmp_path)
    assert result.returncode == 0, result.stderr
    (line,) = (tmp_path / "matmul.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert (row["benchmark"], row["case"], row["format"]) == ("matmul", "w8a8 4x256x256", "w8a8")
    assert row["machine"]["backend"] == "cpu" and row["limits"].keys() == LIMITS.keys()
    assert all(limit > 0 for limit in row["limits"].values())
    assert row["peers"].keys() == {"float32"}
    ours, peer = row["ours"], row["peers"]["float32"]
    assert peer["ratio"] == pytest.approx(ours["median_ms"] / peer["median_ms"], rel=1e-3, abs=1e-4)
    assert row["slower_than_float32"] is (peer["ratio"] > 1)
    # Operands and result: int8 weights, a scale for each of 256 channels, 4 rows; all in float32.
    sizes = {"ours": 256 * 256 + 4 * 256 + 4 * 4 * (256 + 256), "peer": 4 * (256**2 + 8 * 256)}
    for name, entry in {"ours": ours, "peer": peer}.items():
        elapsed = entry["median_ms"] / 1e3
        assert entry["p25_ms"] <= entry["median_ms"] <= entry["p75_ms"]
        assert entry["calls"] >= 2 and entry["compile_s"] > 0
        # Milliseconds and rates are rounded in the row.
        assert entry["gops"] == pytest.approx(2 * 4 * 256**2 / elapsed / 1e9, rel=0.02, abs=0.06)
        assert entry["gb_per_s"] == pytest.approx(sizes[name] / elapsed / 1e9, rel=0.02, abs=0.006)
        assert entry["relative_error"] <= entry["error_bound"]
    assert ours["relative_error"] > 0.001 > peer["relative_error"]
    assert "w8a8 4x256x256" in result.stdout and "float32" in result.stdout


def test_a_case_that_is_unknown_is_an_error_and_nothing_is_written(tmp_path):
    result = run("--quick", "--cases", "w7a7", "--output", tmp_path)
    assert (
        result.returncode == 1 and "no case has w7a7 in its name: w8a8 4x256x256" in result.stderr
    )
    assert not list(tmp_path.iterdir())


def test_a_peer_that_cannot_run_is_an_entry_with_its_error(contest):
    row = contest.hold(case(contest, contender(contest, 1.0), missing=missing(contest)), 2, LIMITS)
    assert row["peers"]["missing"] == {
        "package": "no-such-peer",
        "version": None,
        "error": "ModuleNotFoundError: No module named 'no_such_peer'",
    }
    assert row["targets"] == [{"peer": "missing", "at_most": 0.5, "ratio": None, "reached": None}]
    assert row["slower_than_float32"] is None and row["ours"]["median_ms"] >= 0


def test_pytorch_computes_the_product_in_8_bits(module):
    """With the error of 7 bits for the activations, which is what its documentation says."""
    pytest.importorskip("torch", reason="PyTorch is only in the `bench-torch` extra")
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape, np.float32) for shape in ((4, 256), (256, 512)))
    program = module("_torch").dynamic_int8(x, w)
    assert program.bytes == 256 * 512 + 4 * 512 + 4 * 4 * (256 + 512)
    error = module("_contest").relative_error(program.run(), x @ w)
    assert 0.004 < error < module("_matmul_peers").FORMATS["w8a8"].bound * 3.2


def test_an_engine_that_refuses_is_not_the_fastest(module):
    def refuse():
        raise RuntimeError("no such product")

    assert module("_torch")._fastest(refuse) == math.inf > module("_torch")._fastest(lambda: None)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (1.02, "wrong result: relative mean absolute error 0.02, at most 0.01"),
        (math.nan, "wrong result: relative mean absolute error nan, at most 0.01"),
    ],
)
def test_nobody_is_timed_on_a_wrong_result(contest, value, error):
    wrong, right = contender(contest, value), contender(contest, 1.0)
    row = contest.hold(case(contest, right, peer=wrong), 2, LIMITS)
    assert row["peers"]["peer"]["error"] == f"ArithmeticError: {error}"
    assert "median_ms" not in row["peers"]["peer"]
    with pytest.raises(ArithmeticError, match=error):
        contest.hold(case(contest, wrong, peer=right), 2, LIMITS)


def test_our_own_failure_is_not_hidden(contest):
    with pytest.raises(ModuleNotFoundError, match="no_such_peer"):
        contest.hold(case(contest, missing(contest), peer=contender(contest, 1.0)), 2, LIMITS)


def test_a_result_of_another_shape_is_wrong(contest):
    with pytest.raises(ArithmeticError, match=r"the result has shape \(1, 4\), not \(4,\)"):
        contest.relative_error(np.ones((1, 4)), np.ones(4))


@pytest.mark.parametrize(("ours", "reached", "slower"), [(0.5, True, False), (2.4, False, True)])
def test_ratios_and_verdicts_by_arithmetic(contest, ours, reached, slower):
    entries = {"ours": {"median_ms": ours}, "float32": {"median_ms": 2.0}, "qwix": {"error": "no"}}
    row = contest.compared(entries, {"float32": 0.5, "not_run": 0.1})
    assert row["peers"]["float32"]["ratio"] == ours / 2
    assert row["peers"]["qwix"] == {"error": "no"}
    verdict = {"peer": "float32", "at_most": 0.5, "ratio": ours / 2, "reached": reached}
    assert row["targets"] == [verdict] and row["slower_than_float32"] is slower


def test_everyone_has_a_turn_in_every_round_and_the_first_call_of_it_is_not_timed(module):
    timing = module("_timing")
    log = []
    slow = timing.TURN_SECONDS * 1.5  # one call is a turn

    def program(name):
        def call():
            log.append(name)
            timing.time.sleep(slow)

        return call

    programs = {name: program(name) for name in "ab"}
    samples = timing.interleaved(programs, 3, before=lambda: log.append("-"))
    assert {name: len(times) for name, times in samples.items()} == {"a": 3, "b": 3}
    assert all(time >= slow for times in samples.values() for time in times)
    turns = "".join(log).removeprefix("aaabbb")  # three calls to see how many make a turn
    assert sorted([turns[i : i + 6] for i in range(0, 18, 6)]) in (
        ["a-ab-b"] * n + ["b-ba-a"] * (3 - n) for n in range(4)
    )


def test_the_table_marks_what_is_missed_slower_or_cannot_run(module, capsys):
    contest, table = module("_contest"), module("_table")
    figures = {"p25_ms": 1.0, "p75_ms": 3.0, "gb_per_s": 1.0, "of_read_limit": 0.1}
    figures |= {"compile_s": 0.1, "relative_error": 0.01}
    entries = {name: {"median_ms": ms} | figures for name, ms in (("ours", 2.5), ("float32", 2.0))}
    entries["qwix"] = {"error": "TypeError: list[int] is\nnot supported"}
    row = {"case": "w8a8"} | contest.compared(entries, {"float32": 0.5, "qwix": 0.1})
    table.console().print(table.case_table(row))
    printed = capsys.readouterr().out
    for expected in ("SLOWER THAN FLOAT32", "1.250", "0.5 missed"):
        assert expected in printed
    assert "qwix cannot run: TypeError: list[int] is" in printed
    assert table.summary([row]) == [
        "0 of 2 targets reached.",
        "missed: w8a8: 1.250 of float32, target 0.5",
        "slower than float32: w8a8: 1.250",
        "could not run in every case: qwix",
    ]


@pytest.mark.slow
def test_a_training_step_is_checked_timed_and_compiled(tmp_path):
    names = ["float32", "flax_float8_float32"]
    arguments = ["--quick", "--cases", "mlp", "--contenders", *names, "--output", tmp_path]
    result = run(*arguments, script="train_step.py")
    assert result.returncode == 0, result.stderr
    (line,) = (tmp_path / "train_step.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert (row["case"], row["blocks"]) == ("mlp 1x(32, 64) batch 16", 1)
    assert list(row["contenders"]) == names
    for entry in row["contenders"].values():
        assert 0 < entry["p25_ms"] <= entry["median_ms"] <= entry["p75_ms"]
        seconds = entry["compile_s"]
        assert 0 < seconds["trace_lower"] < seconds["total"]
        parts = seconds["trace_lower"] + seconds["compile"]
        assert seconds["total"] == pytest.approx(parts, abs=0.002)  # each is rounded
        assert entry["loss_error"] <= entry["loss_bound"]
        assert entry["temporary_bytes"] > 0
    exact, float8 = (row["contenders"][name]["gradient_error"] for name in names)
    assert exact == 0 and 0.01 < float8 < 0.1


def test_no_training_is_timed_whose_gradient_loss_or_weights_are_wrong(module):
    script = module("train_step")
    one = np.ones(4, np.float32)
    right = script.Outcome([one], [one], 10.0)
    # A gradient of norm 2 with one entry off by 0.2; a loss of 10 that is 10.1.
    close = script.Outcome([one], [np.float32([1, 1, 1, 1.2])], 10.1)
    entry = script.checked(close, right, 0.1001)
    assert (entry["gradient_error"], entry["loss_error"]) == (0.1, 0.01)
    with pytest.raises(ArithmeticError, match="the first gradient is 0.1 from float32's, at most"):
        script.checked(close, right, 0.0999)
    with pytest.raises(ArithmeticError, match="the loss after 8 steps is nan from float32's"):
        script.checked(script.Outcome([one], [one], math.nan), right, 0.1)
    with pytest.raises(ArithmeticError, match="it starts from other weights than float32"):
        script.checked(script.Outcome([2 * one], [one], 10.0), right, 0.1)


def test_ratios_of_training_steps_and_what_became_of_the_targets(module):
    def entry(ms, seconds, size):
        return {"median_ms": ms, "compile_s": {"total": seconds}, "temporary_bytes": size}

    ours, flax = "float8_from_float32", "flax_float8_float32"
    entries = {ours: entry(3.0, 1.2, 50), "float32": entry(6.0, 0.5, 40), flax: entry(3.0, 1.0, 80)}
    entries["qwix_int8_float32"] = {"error": "TypeError: no"}
    row = module("train_step").compared(entries)
    assert row["ratios"] == {
        ours: {
            "float32": {"step": 0.5, "compile": 2.4, "temporary_bytes": 1.25},
            flax: {"step": 1.0, "compile": 1.2, "temporary_bytes": 0.625},
        }
    }
    verdicts = module("_training_table").verdicts(row)
    assert verdicts == [
        f"MISSED: step of {ours}: 1.0 of {flax}, target 0.9",
        f"reached: step of {ours}: 0.5 of float32, target 0.6",
        f"reached: temporary_bytes of {ours}: 0.625 of {flax}, target 1.0",
        f"MISSED: compile of {ours}: 1.2 of {flax}, target 1.0",
    ]


@pytest.mark.slow
def test_the_memory_of_quantizing_is_that_of_a_process_of_its_own(tmp_path, module):
    arguments = ["--quick", "--cases", "int8 from safetensors", "--output", tmp_path]
    result = run(*arguments, script="quantize_memory.py")
    assert result.returncode == 0, result.stderr
    lines = (tmp_path / "quantize_memory.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["case"] for row in rows] == [f"{a} int8 from safetensors" for a in ("linen", "nnx")]
    # A table of 256 rows; two pairs of kernels with biases: in float32, and in int8 with scales.
    kernels, biases = 256 * 128 + 2 * 2 * 128 * 512, 2 * (512 + 128)
    quantized = kernels + 4 * (256 + biases) + 4 * biases
    for row in rows:
        assert row["float_mb"] == round(4 * (kernels + biases) / 1e6, 1)
        assert row["of_float32"] == round(quantized / (4 * (kernels + biases)), 4)
        assert row["before_mb"] > 50 and 0 < row["above_mb"] < 200 and row["targets"] == []
    script = module("quantize_memory")
    figures = {"of_float32": 0.3, "above_mb": 450.1}
    assert script.targets(script.Case("linen", "int8", "memory"), figures) == [
        {"figure": "of_float32", "at_most": 0.3, "reached": True},
        {"figure": "above_mb", "at_most": 450, "reached": False},
    ]


@pytest.mark.parametrize("script", ["attention", "conv", "matmul", "quantize", "weight_bandwidth"])
def test_a_complete_run_alone_replaces_the_committed_results(module, script):
    suite = module("_suite")
    arguments = suite.suite_parser(module(script).__doc__, ["a case"], module(script).NAMES)
    complete, quick, short = (
        arguments.parse_args(flags) for flags in ([], ["--quick"], ["--rounds", "2"])
    )
    assert suite.output_folder(complete, whole=True) == BENCHMARKS / "results"
    assert suite.output_folder(complete, whole=False) is None
    assert suite.output_folder(quick, whole=True) is None
    assert suite.output_folder(short, whole=True) is None
    elsewhere = arguments.parse_args(["--quick", "--output", "elsewhere"])
    assert suite.output_folder(elsewhere, whole=False) == Path("elsewhere")


@pytest.mark.slow
def test_attention_and_rows_by_many_weights_are_computed_right(module):
    """Everyone's result is compared with one in float64; wrong ones are no rows."""
    attention, bandwidth = module("attention"), module("weight_bandwidth")
    limits = {"read_gb_per_s": 10.0, "float32_gops": 10.0, "int8_gops": 10.0}
    for script in (attention, bandwidth):
        for case in script.QUICK_CASES.values():
            row = module("_contest").hold(script.contest(case), 1, limits)
            assert not any("error" in peer for peer in row["peers"].values())
            assert [verdict["peer"] for verdict in row["targets"]]
    case = bandwidth.QUICK_CASES["int8 by int8"]
    assert bandwidth.contest(case).facts["weight_bytes"] == 2 * (256 * 256 + 4 * 256)


def roofline_row(format, **entries):
    ours, *peers = (
        {"gops": gops, "gb_per_s": gb} if gb else {"error": "absent"}
        for gops, gb in entries.values()
    )
    row = {"format": format, "caches": "warm", "limits": LIMITS, "ours": ours}
    row["peers"] = dict(zip(list(entries)[1:], peers, strict=True))
    return row | {"machine": {"device": "a machine", "cores": 2, "jax": "0"}}


def test_rooflines_place_everyone_by_what_was_measured(module, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    roofline = module("roofline")
    rows = [
        roofline_row("w8a8", ours=(100, 50), qwix=(10, 5), onnxruntime=(0, 0)),
        roofline_row("w8a8", ours=(200, 10)),
        roofline_row("w4a16", ours=(4, 8)),
    ]
    found = roofline.points(rows, "w8a8")
    assert found == {"mpjax": [(2.0, 100), (20.0, 200)], "qwix": [(2.0, 10)]}
    (tmp_path / "matmul.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    roofline.main(["--output", str(tmp_path)])
    picture = (tmp_path / "roofline.svg").read_text()
    assert all(word in picture for word in ("w8a8", "w4a16", "mpjax", "qwix", "a machine"))
    assert "3 cases of w8a8, w4a16" in capsys.readouterr().out


@pytest.mark.parametrize(("rows", "message"), [(None, "is not there"), ("", "has no rows")])
def test_a_roofline_of_nothing_says_what_to_run(module, tmp_path, rows, message):
    pytest.importorskip("matplotlib")
    if rows is not None:
        (tmp_path / "matmul_cold.jsonl").write_text(rows)
    with pytest.raises(SystemExit, match=message):
        module("roofline").main(["--cold", "--output", str(tmp_path)])
    assert not (tmp_path / "roofline_cold.svg").exists()
