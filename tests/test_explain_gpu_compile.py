"""`mp.explain` for NVIDIA GPUs, by the real compiler."""

import jax
import jax.numpy as jnp
import pytest

import mpjax as mp
from tests.explain_helpers import (
    IN_MEMORY,
    dequantized,
    in_memory,
    missed,
    program,
    read_both_ways,
    reported,
)
from tests.explain_models import EXPERTS, MODELS

pytestmark = pytest.mark.gpu_compile

FLOAT8 = "float8_current_from_mixed_bfloat16"


def test_all_planted_misses_are_named_and_on_the_clean_model_none():
    policies = FLOAT8, "float8/128x128_from_mixed_bfloat16"
    planted = mp.explain(*program(*policies, planted=True), target="h200")
    assert reported(planted) == missed() and len(planted.misses) == 5
    clean = mp.explain(*program(*policies, planted=False), target="h200")
    assert clean.misses == ()


def test_a_weight_that_is_dequantized_in_main_memory_has_its_bytes():
    (row,) = mp.explain(in_memory, *dequantized("int8"), target="h200").products
    assert row.reason == "dequantized" and row.weight_bytes >= IN_MEMORY**2
    assert row.dequantized_bytes == 2 * IN_MEMORY**2


@pytest.mark.parametrize("name", ["minilm", "experts"])
def test_models_it_was_not_written_against_agree_with_their_program(name):
    case = MODELS[name](FLOAT8)
    found, directly = read_both_ways(case, "h200")
    assert sorted((row.lhs, row.rhs) for row in found.products) == directly
    # XLA:GPU multiplies all rows by every expert.
    assert found.flops == case.quantized + case.others * (EXPERTS if name == "experts" else 1)
    assert found.share_in_8_bits == case.quantized / found.flops


def test_float8_convolutions_are_found_to_be_dequantized():
    case = MODELS["cnn"](FLOAT8)
    found, directly = read_both_ways(case, "h200")
    assert sorted((row.lhs, row.rhs) for row in found.products) == directly
    by_path = {row.path: row for row in found.products}
    assert {path: row.reason for path, row in by_path.items()} == {
        "first": "dequantized",
        "second": "dequantized",
        "head": "",
    }
    assert by_path["first"].unit.startswith("cudnn$conv")


@pytest.mark.parametrize("target", ["a100", "h100", "b200"])
def test_other_gpus(target):
    x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)
    (row,) = mp.explain(jnp.dot, x, x, target=target).products
    assert (row.lhs, row.rhs, row.flops) == ("bfloat16", "bfloat16", 2 * 256**3)
