"""The global policy: of the process, and of a scope."""

import concurrent.futures
import contextvars
import threading

import pytest

import mpjax as mp
from mpjax._policy_map import freeze
from tests.helpers import in_a_thread


def test_it_is_float32_at_first():
    assert mp.dtype_policy() == mp.DTypePolicy("float32")
    assert mp.get_policy(None) == mp.DTypePolicy("float32")


@pytest.mark.parametrize(
    "policy",
    [
        "mixed_float16",
        "params=float32,compute=bfloat16,output=float32",
        "int8_from_mixed_bfloat16",
        mp.FloatDTypePolicy("bfloat16"),
        mp.QuantizedFloat8DTypePolicy("float8", "mixed_bfloat16", 123),
    ],
    ids=str,
)
def test_set_takes_names_and_policies(policy):
    mp.set_dtype_policy(policy)
    assert mp.dtype_policy() == mp.get_policy(policy)
    assert mp.get_policy(None) is mp.dtype_policy()


@pytest.mark.parametrize("policy", [None, 12345, {"class_name": "DTypePolicy"}, float])
def test_other_objects_are_refused(policy):
    with pytest.raises(ValueError, match="Invalid `policy` argument. Expected the string name"):
        mp.set_dtype_policy(policy)
    with pytest.raises(ValueError, match="Invalid `policy` argument. Expected the string name"):
        with mp.dtype_policy_scope(policy):
            pytest.fail("the scope was entered")
    assert mp.dtype_policy().name == "float32"


@pytest.mark.parametrize("policy", ["int32", "bool", "complex64", mp.DTypePolicyMap("int32")])
def test_policies_that_do_not_compute_in_floating_point_are_refused(policy):
    name = mp.get_policy(policy).name
    with pytest.raises(ValueError, match=f"floating-point policy, .* but got policy: {name}"):
        mp.set_dtype_policy(policy)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="Cannot convert 'mixed_float15'"):
        mp.set_dtype_policy("mixed_float15")
    with pytest.raises(ValueError, match="Cannot convert `policy` into a valid pair"):
        mp.set_dtype_policy("int8")


def test_a_map_is_kept_as_a_snapshot():
    policies = mp.DTypePolicyMap("mixed_bfloat16", {"head": "float32"})
    snapshot = freeze(policies)
    mp.set_dtype_policy(policies)
    policies["tail"] = "float64"
    assert mp.dtype_policy() == snapshot
    assert mp.get_policy() == snapshot


def test_an_empty_map_is_a_policy_too():
    mp.set_dtype_policy(mp.DTypePolicyMap("mixed_bfloat16"))
    assert mp.dtype_policy().name == "map_mixed_bfloat16"


@pytest.mark.parametrize(
    ("policy", "source_name"),
    [
        ("mixed_bfloat16", "mixed_bfloat16"),
        ("int8_from_mixed_bfloat16", "mixed_bfloat16"),
        (mp.DTypePolicyMap("bfloat16", {"head": "float32"}), "bfloat16"),
        (mp.DTypePolicyMap("float8_from_bfloat16"), "bfloat16"),
        ("params=float64,compute=float32", "params=float64,compute=float32"),
    ],
    ids=str,
)
def test_policies_without_a_name_take_the_source_of_the_global_one(policy, source_name):
    mp.set_dtype_policy(policy)
    assert mp.DTypePolicy() == mp.DTypePolicy(source_name)
    assert mp.FloatDTypePolicy() == mp.DTypePolicy(source_name)
    assert mp.QuantizedDTypePolicy("int8") == mp.QuantizedDTypePolicy("int8", source_name)
    assert mp.QuantizedFloat8DTypePolicy("float8").source_name == source_name


def test_set_is_seen_by_threads_that_run_already():
    is_set = threading.Event()

    def read_later():
        assert is_set.wait(timeout=10)
        return mp.dtype_policy().name

    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        name = executor.submit(read_later)
        mp.set_dtype_policy("mixed_bfloat16")
        is_set.set()
        assert name.result() == "mixed_bfloat16"


def test_set_in_a_thread_is_seen_by_the_others():
    in_a_thread(lambda: mp.set_dtype_policy("mixed_bfloat16"))
    assert mp.dtype_policy().name == "mixed_bfloat16"


def test_scope_yields_the_policy_and_restores_the_one_before():
    mp.set_dtype_policy("bfloat16")
    with mp.dtype_policy_scope("mixed_float16") as outer:
        assert outer == mp.DTypePolicy("mixed_float16")
        assert mp.dtype_policy() is outer
        with mp.dtype_policy_scope(mp.DTypePolicyMap("float64")) as inner:
            assert inner == freeze(mp.DTypePolicyMap("float64"))
            assert mp.dtype_policy() is inner
        assert mp.dtype_policy() is outer
    assert mp.dtype_policy().name == "bfloat16"


def test_scope_ends_with_an_exception():
    with pytest.raises(RuntimeError, match="inside"):
        with mp.dtype_policy_scope("mixed_float16"):
            raise RuntimeError("inside")
    assert mp.dtype_policy().name == "float32"


def test_set_inside_a_scope_takes_effect_after_it():
    with mp.dtype_policy_scope("mixed_float16"):
        mp.set_dtype_policy("bfloat16")
        assert mp.dtype_policy().name == "mixed_float16"
        seen_by_a_clean_context = contextvars.Context().run(lambda: mp.dtype_policy().name)
    assert seen_by_a_clean_context == "bfloat16"
    assert mp.dtype_policy().name == "bfloat16"


def test_scopes_of_two_threads_do_not_meet():
    both_are_inside = threading.Barrier(2, timeout=10)

    def scoped(name):
        with mp.dtype_policy_scope(name):
            both_are_inside.wait()
            seen = mp.dtype_policy().name
            both_are_inside.wait()
        return seen, mp.dtype_policy().name

    names = ["mixed_bfloat16", "mixed_float16"]
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        assert list(executor.map(scoped, names)) == [(name, "float32") for name in names]
