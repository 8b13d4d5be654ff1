"""What the real NVIDIA compiler makes of a whole training step. It needs its wheels but no GPU."""

import importlib
from collections import Counter
from pathlib import Path

import pytest
from gpu_helpers import h200_compiler, multiplied

pytestmark = pytest.mark.gpu_compile

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
E4M3, E5M2 = "f8e4m3fn", "f8e5m2"


@pytest.fixture(scope="module")
def compiled():
    return h200_compiler()


def products(monkeypatch, compiled, contender):
    """How often the step of the benchmark multiplies which dtypes, and of how many layers."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    case, _ = importlib.import_module("train_step").CASES["gpu"]
    step, arguments = importlib.import_module("_training").step_and_abstract_arguments(
        case, contender
    )
    return Counter(multiplied(compiled(step, *arguments))), 2 * case.blocks


@pytest.mark.parametrize(
    "contender",
    [
        "flax_float8_bfloat16",  # shows that the test sees what another library does
        "float8_from_mixed_bfloat16",
        "float8_current_from_mixed_bfloat16",
    ],
)
def test_every_product_of_a_float8_step_is_one_of_float8(monkeypatch, compiled, contender):
    counts, layers = products(monkeypatch, compiled, contender)
    # The first layer needs no gradient of its input.
    forward, of_inputs, of_weights = layers, layers - 1, layers
    assert counts.pop((E4M3, E4M3)) == forward
    # Which of the two comes first is the compiler's choice where a product is transposed.
    assert counts.pop((E5M2, E4M3)) + counts.pop((E4M3, E5M2), 0) == of_inputs + of_weights
    assert not counts


def test_the_check_sees_a_step_in_bfloat16(monkeypatch, compiled):
    counts, layers = products(monkeypatch, compiled, "bfloat16")
    assert counts == {("bf16", "bf16"): 3 * layers - 1}
