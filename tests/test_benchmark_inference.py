"""`benchmarks/inference.py`: its rows, its verdicts, and what it makes of a compiled program."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_benchmarks import contender as contender
from tests.test_benchmarks import module as module
from tests.test_benchmarks import run

NAMES = ["int8_from_float32", "flax_float32", "onnxruntime_float32"]


@pytest.mark.slow
def test_models_are_checked_timed_and_compared(tmp_path):
    result = run("--quick", "--contenders", *NAMES, "--output", tmp_path, script="inference.py")
    assert result.returncode == 0, result.stderr
    encode, decode = map(json.loads, (tmp_path / "inference.jsonl").read_text().splitlines())
    assert (encode["case"], encode["unit"]) == ("encode 2x16", "sentences")
    assert (decode["case"], decode["unit"]) == ("decode 1x128", "tokens")
    assert list(encode["contenders"]) == NAMES  # with its error, where ONNX is not installed
    assert list(decode["contenders"]) == NAMES[:2]
    for row, batch in ((encode, 2), (decode, 1)):
        ours, flax = (row["contenders"][name] for name in NAMES[:2])
        assert flax["relative_error"] == 0 < ours["relative_error"] <= ours["error_bound"]
        # Kernels are a quarter of their bytes; biases, norms and, in `encode`, one table are not.
        assert ours["bytes"] < 0.5 * flax["bytes"]
        for entry in (ours, flax):
            assert entry["per_s"] == pytest.approx(1e3 * batch / entry["median_ms"], rel=1e-3)
        ratio = row["ratios"]["int8_from_float32"]["flax_float32"]
        assert ratio == pytest.approx(ours["per_s"] / flax["per_s"], rel=1e-3)


def test_a_profile_adds_up(tmp_path):
    arguments = ["--quick", "--profile", "--cases", "encode", "--contenders", *NAMES[:2]]
    result = run(*arguments, "--output", tmp_path, script="inference.py")
    assert result.returncode == 0, result.stderr
    (line,) = (tmp_path / "inference_profile.jsonl").read_text().splitlines()
    parts = json.loads(line)["milliseconds"]
    assert list(parts) == NAMES[:2]
    for name, product in zip(NAMES, ("int8", "f32"), strict=False):
        assert parts[name][f"products of weights, {product}"] > 0
        total = parts[name].pop("total")
        assert sum(parts[name].values()) == pytest.approx(total, abs=0.002)  # each is rounded
    int8, float32 = (parts[name] for name in NAMES[:2])
    assert "quantizing activations" not in float32  # nor in int8, where a native call does both
    assert "products of weights, f32" not in int8


def test_operations_of_a_program_by_what_they_do(module):
    text = """
%fused_computation (p: f32[16,8]) -> s8[16,8] {
  ROOT %r = s8[16,8]{1,0} convert(%n), metadata={op_name="jit(f)/up/convert"}
  %n = f32[16,8]{1,0} round-nearest-even(%p), metadata={op_name="jit(f)/mlp_norm/mul"}
}
%reduced (p: f32[16,8]) -> f32[16] {
  ROOT %m = f32[16]{0} reduce(%p), metadata={op_name="jit(f)/layer_0/attention/reduce_max"}
}
ENTRY %main (x: f32[16,8]) -> f32[16,8] {
  %q = s8[16,8]{1,0} fusion(%x), kind=kLoop, calls=%fused_computation
  %s = f32[16]{0} fusion(%x), kind=kLoop, calls=%reduced
  %d = s32[16,8]{1,0} dot(%q, %w), metadata={op_name="jit(f)/up/dot_general"}
  %a = f32[2,4,4]{2,1,0} dot(%x, %x), metadata={op_name="jit(f)/...qhd,...khd->...hqk/dot_general"}
  %w = (s32[], f32[16,8]{1,0}) while(%t), condition=%c, body=%b
  %e = f32[16,8]{1,0} add(%x, %x), metadata={op_name="jit(f)/up/add"}
}
"""
    kinds = module("_profile").operations(text)
    assert {name: kinds[name] for name in "qsdawe"} == {
        "q": "quantizing activations",
        "s": "softmax",
        "d": "products of weights, int8",
        "a": "products of attention, f32",
        "w": "container",
        "e": "other elementwise",
    }


def test_throughput_ratios_and_what_became_of_the_targets(module):
    script, table = module("inference"), module("_inference_table")
    rates = {"int8_from_float32": 3.0, "flax_float32": 2.0, "qwix_int8": 4.0}
    entries = {name: {"per_s": rate} for name, rate in rates.items()}
    row = script.compared("encode 1x16", entries)
    assert row["ratios"] == {"int8_from_float32": {"flax_float32": 1.5, "qwix_int8": 0.75}}
    assert list(map(table.verdict, row["targets"])) == [
        "reached: int8_from_float32 has 1.5 of the throughput of flax_float32, target 1.2",
        "MISSED: int8_from_float32 has 0.75 of the throughput of qwix_int8, target 1.2",
    ]
    entries["qwix_int8"] = {"error": "ImportError: no"}
    row = script.compared("encode 8x16", entries)
    assert row["targets"] == [
        {
            "ours": "int8_from_float32",
            "peer": "qwix_int8",
            "at_least": 0.97,
            "ratio": None,
            "reached": None,
        }
    ]
    assert table.summary([{"case": "encode 8x16"} | row]) == [
        "0 of 1 targets reached.",
        "encode 8x16: unknown: int8_from_float32 has None of the throughput of qwix_int8, "
        "target 0.97",
    ]


def test_a_step_hands_its_state_on(module):
    program = module("_contest").stepping(lambda n, k: (n + k, 10 * n), jnp.int32(1), 2)
    assert [int(program.run()) for _ in range(3)] == [10, 30, 50]


def test_a_wrong_result_of_ours_is_not_an_entry(module):
    contest = module("_contest")
    limits = {"read_gb_per_s": 1.0, "copy_gb_per_s": 1.0}
    wrong, right = contender(contest, 2.0), contender(contest, 1.0)
    reference = np.ones(4)
    entries = contest.race({"a": right, "b": wrong}, {"a"}, reference, 1, limits)
    assert "median_ms" in entries["a"] and "wrong result" in entries["b"]["error"]
    with pytest.raises(ArithmeticError, match="wrong result: relative mean absolute error 1,"):
        contest.race({"a": right, "b": wrong}, {"a", "b"}, reference, 1, limits)
