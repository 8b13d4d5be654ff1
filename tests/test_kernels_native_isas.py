"""Sums of int8 are the integers, in 2,000 shapes by every instruction set that this CPU has.

So are those of int8 by int4, and in groups, in 500 shapes.

The kernels of a process are chosen when it starts, so each has its own. The calls are made as they
are, without what `dot_general` does around them, which would take longer to compile.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.native_helpers import ISAS, Case, elsewhere, here
from tests.test_kernels_native_grouped import cases as grouped_cases

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not here(), reason="no native kernels here"),
]

SHAPES = 2000
EXAMPLES = 2500  # some shapes come twice
GROUPED_SHAPES, GROUPED_EXAMPLES = 500, 800
sizes = st.one_of(st.integers(0, 40), st.integers(41, 140))
cases = st.builds(
    Case, st.integers(0, 3), sizes, sizes, sizes, st.tuples(st.booleans(), st.booleans())
)


def check(case: Case, seed: int) -> None:
    """At most 140 terms of 127 * 127: the sums are below 2**24, so float32 holds them."""
    rng = np.random.default_rng(seed)
    lhs = rng.integers(-127, 128, (case.batch, case.rows, case.terms))
    rhs = rng.integers(-127, 128, (case.batch, case.terms, case.columns))
    left, right, _ = case.stored(lhs, rhs)
    one = np.ones((1, 1), np.float32)
    out = jax.ShapeDtypeStruct((case.batch, case.rows, case.columns), jnp.float32)
    call = jax.ffi.ffi_call("mpjax_int8_dot", out)
    found = call(
        *(x.astype(np.int8) for x in (left, right)),
        *(one, one),
        lhs_terms_last=case.terms_last[0],
        rhs_terms_last=case.terms_last[1],
    )
    np.testing.assert_array_equal(found, (lhs @ rhs).astype(np.float32))


def many_shapes() -> int:
    """How many were right."""
    shapes = set()

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
    @given(cases, st.integers(0, 2**20))
    def are_exact(case, seed):
        check(case, seed)
        shapes.add(case)
        if len(shapes) % 250 == 0:
            jax.clear_caches()  # hundreds of programs take their memory

    are_exact()
    return len(shapes)


PROGRAM = """
from tests.native_helpers import here
from tests.test_kernels_native_isas import many_shapes
print(here(), many_shapes() if here() else 0)
"""
IN_GROUPS = """
from tests.native_helpers import here
from tests.test_kernels_native_isas import many_in_groups
print(here(), many_in_groups() if here() else 0)
"""


def many_in_groups() -> int:
    """How many products of int8 by int8 or int4 in groups were right."""
    shapes = set()

    @settings(max_examples=GROUPED_EXAMPLES, deadline=None, derandomize=True, database=None)
    @given(grouped_cases, st.integers(0, 2**20))
    def are_exact(case, seed):
        case.check_call(seed)
        shapes.add(case)
        if len(shapes) % 250 == 0:
            jax.clear_caches()

    are_exact()
    return len(shapes)


def exact_shapes(program: str, isa: str) -> int:
    """How many shapes were right in a process of this instruction set."""
    done = elsewhere(program, MPJAX_NATIVE_ISA=isa)
    assert done.returncode == 0, done.stderr
    found, shapes = done.stdout.rstrip("\n").split(" ")
    if not found:
        pytest.skip(f"this CPU has no {isa}")
    assert found == isa
    return int(shapes)


@pytest.mark.parametrize("isa", ISAS)
def test_sums_of_int8_are_the_integers_in_2000_shapes(isa):
    assert exact_shapes(PROGRAM, isa) >= SHAPES


@pytest.mark.parametrize("isa", ISAS)
def test_sums_of_int8_by_int4_and_in_groups_are_exact_in_500_shapes(isa):
    assert exact_shapes(IN_GROUPS, isa) >= GROUPED_SHAPES


ATTENTION = """
import hashlib
import jax
import mpjax_kernels as mk
from tests.native_helpers import here
from tests.test_kernels_native_attention import Case, products
digest = hashlib.sha256()
for dtype in ("float32", "bfloat16", "float16"):
    for case in (Case(), Case(2, kv_heads=3, depth=70, length=300), Case(53, depth=35, length=150)):
        cached = case.cached(dtype)
        for each in (cached, *(mk.quantize(cached, f, axis=-1) for f in ("int8", "float8_e4m3fn"))):
            results, calls = products(case, each, dtype)
            assert calls == (["scores", "output"] if here() else []), calls
            for result in results:
                digest.update(jax.device_get(result).tobytes())
print(here(), digest.hexdigest())
"""


def test_attention_has_the_same_bits_by_every_instruction_set():
    digests = set()
    for isa in ISAS:
        done = elsewhere(ATTENTION, MPJAX_NATIVE_ISA=isa)
        assert done.returncode == 0, done.stderr
        found, digest = done.stdout.rstrip("\n").split(" ")
        digests |= {digest} if found == isa else set()
    assert len(digests) == 1


NATIVE_TESTS = [str(path) for path in sorted(Path(__file__).parent.glob("test_kernels_native*.py"))]


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != here()])
def test_all_tests_of_native_kernels_pass_by_every_instruction_set(isa):
    found = elsewhere("from tests.native_helpers import here; print(here())", MPJAX_NATIVE_ISA=isa)
    if found.stdout != f"{isa}\n":
        pytest.skip(f"this CPU has no {isa}")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *NATIVE_TESTS],
        env=os.environ | {"MPJAX_NATIVE_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
