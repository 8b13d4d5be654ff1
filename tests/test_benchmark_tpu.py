"""The benchmark of TPU products: what it counts in a listing of bundles, and what its rows hold."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
# Four turns: in each of the first three a block of 64 bytes is fetched, in each of the last three
# the one before is waited for and five bundles compute. As libtpu prints it, comments shortened.
LISTING = """
= control target key start
LB: loop body
= control target key end

     0   :  { %s1_s0 = inlined_call_operand.hbm [shape: s8[3,64], index: 1, kind: input] }
   0x1   :  { %s9_s4 = smov 0 /* copy for cssa */ }
   0x2 LB: > { %s3_s5 = sadd.s32 4294967295, %s2_s4  ;;  %s2_s4 = sphi %s9_s4, %s8_s4 } /* Start region 7 */
   0x3   : > { %p1_p0 = scmp.lt.s32.totalorder %s2_s4, 3  ;;  %s4_s6 = sand.u32 1, %s2_s4 }
   0x4   : > { %s5_s7 = scalar_lea.sflag [#allocation2], %s4_s6  ;;  %10 = sst [smem:[#allocation3]] %s1_s0 }
   0x5   : > { %s6_s8 = sld [smem:[#allocation3]]  ;;  %s12_s1 = scalar_lea.sflag [#allocation2], %s13_s2  ;;  %s13_s2 = sand.u32 1, %s3_s5 }
   0x6   : > { %11 = dma.hbm_to_vmem [thread:$0]  (%p1_p0), /*hbm=*/%s6_s8, /*size_in_granules=*/2, /*vmem=*/[#allocation1], /*dst_syncflagno=*/%s5_s7 /*
window_bounds: (1, 64)
*/ }
   0x7   : > { %p2_p1 = scmp.lt.s32.totalorder %s2_s4, 1 }
   0x8   : > { %12 = sbr.rel (%p2_p1) target = $region9 }
   0x9   :  {}
   0xa   :  {}
   0xb   :  {}
   0xc   :  { %s14_s2 = sand.u32 1, %s3_s5 }
   0xd   : > { %s15_s1 = scalar_lea.sflag [#allocation2], %s14_s2 }
   0xe   : > { %13 = dma.done.wait %s15_s1, 2 }
   0xf   : > { %v1_v0 = vld [vmem:[#allocation1] sm:$0xff] }
  0x10 PF: > { %s7_s9 = sadd.s32 1, %s2_s4 } /* Start/End empty region 9 */
  0x11   : > { %s8_s4 = smov %s7_s9  ;;  %p3_p2 = scmp.ge.s32.totalorder %s7_s9, 4 }
  0x12   : > { %14 = sbr.rel (!%p3_p2) target = $region7 }
  0x13   :  {}
  0x14   :  {}
  0x15   :  {}
  0x16   :  {}
  0x17   :  { %15 = vsyncpa [#allocation2], 1 }
"""  # noqa: E501


@pytest.fixture
def schedule(monkeypatch):
    """The function that runs a listing."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("_tpu_schedule").schedule


@pytest.fixture
def tuning(monkeypatch):
    """What makes the library's table of the rows."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("_tpu_tune")


def test_the_bundles_of_loops_and_branches_are_counted(schedule):
    found = schedule(LISTING, bytes_per_cycle=1e9)
    # Two before the loop, one after it. A turn has 11 up to 0xc and 7 from 0x10; three turns also
    # have the three between. A branch that is taken runs four more, which these figures hold.
    assert found.bundles == 2 + 4 * (11 + 7) + 3 * 3 + 1
    assert (found.read, found.written) == (3 * 64, 0)
    assert found.read_of == {1: 3 * 64}
    assert found.cycles == pytest.approx(found.bundles)


def test_a_wait_lasts_until_its_copy_is_there(schedule):
    bundles = schedule(LISTING, bytes_per_cycle=1e9).bundles
    # The first copy starts with the seventh bundle, 0x6, the third is done 192 cycles later at one
    # byte per cycle, and what is left then: its turn's wait is followed by 9 bundles.
    slow = schedule(LISTING, bytes_per_cycle=1)
    assert slow.bundles == bundles
    assert slow.cycles == 7 + 3 * 64 + 9


def test_control_that_is_not_known_is_an_error(schedule):
    unknown = LISTING.replace("%p3_p2 = scmp.ge.s32.totalorder %s7_s9, 4", "%s16_s1 = smov 0")
    with pytest.raises(ValueError, match="sbr.rel depends on p3, which is not known"):
        schedule(unknown, 1.0)


def row(rows, ratio, blocks, *, target="v6e", cycles=1000):
    cycles_of = [{"rows": 16, "columns": c, "terms": t, "cycles": n} for (c, t), n in blocks]
    found = {"m_k_n": [rows, 4096, 4096], "ratio": ratio, "xla": {"cycles": cycles}}
    return found | {"kind": "w4a16", "target": target, "candidates": cycles_of}


def test_the_librarys_table_is_what_the_rows_say(tuning):
    rows = (BENCHMARKS / "results" / "tpu_kernels.jsonl").read_text().splitlines()
    found = tuning.table(map(json.loads, rows))
    assert found == tuning.TABLE.read_text()
    loses = [json.loads(r) for r in rows]
    for each in loses:  # the test can fail
        each["ratio"] = 1.1 if each["m_k_n"][0] < 512 else each["ratio"]
    assert tuning.table(loses) != found


def test_the_rule_of_the_librarys_table(tuning):
    narrow, wide = (256, 4096), (1024, 1024)
    even = [(narrow, 700), (wide, 800)]

    def fewest(*ratios):
        return tuning._fewest([row(n, ratio, even) for n, ratio in ratios])

    assert fewest((8, 0.8), (64, 0.9), (512, 0.7)) == 8
    assert (
        fewest((8, 0.9), (64, 0.85), (512, 0.7)) == 64
    )  # 0.9 is a win, but may be no more than an error
    assert fewest((8, 0.7), (64, 1.01), (512, 0.7)) == 512
    assert fewest((8, 0.7), (8, 0.9), (64, 0.8)) == 64  # every shape of so many rows
    with pytest.raises(ValueError, match="v6e: XLA's product is the faster"):
        fewest((8, 0.7), (64, 1.01))


@pytest.mark.tpu_compile
def test_the_rows_of_the_tpu_benchmark(tmp_path):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, BENCHMARKS / "tpu_kernels.py", "--quick", "--output", tmp_path]
    subprocess.run(
        [*map(str, command), "--cases", "row", "w4a8"],
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        check=True,
        timeout=300,
    )
    lines = (tmp_path / "tpu_kernels.jsonl").read_text().splitlines()
    rows = {(row["kind"], row["m_k_n"][0]): row for row in map(json.loads, lines)}
    assert set(rows) == {(kind, m) for kind in ("row", "w4a8") for m in (8, 512)}
    for (kind, m), row in rows.items():
        x, result, w = 2 * m * 1024, 2 * m * 1024, 1024 * 1024 // (1 if kind == "row" else 2)
        by_xla, by_pallas = row["xla"], row["pallas"]
        # XLA reads activations to find their scales and to round them; a kernel reads them once.
        assert by_xla["passes"]["first"] == 2
        assert by_pallas["passes"]["first"] == (1 if kind == "row" else 2)
        for found in (by_xla, by_pallas):
            assert found["passes"]["second"] == 1
            assert found["written"] == result and found["read"] >= x + w
            # No more than one bundle in a cycle, nor less time than the published rates take.
            assert found["cycles"] >= max(row["floor"], found["bundles"])
            assert found["temporary"] == 0
        assert row["winner"] == ("pallas" if row["ratio"] <= 0.85 else "xla")
        # The matrix unit of a v6e multiplies 2 * 4 * 256**2 pairs of int8 in a cycle.
        assert row["floor"] >= m * 1024 * 1024 / (8 * 256**2)
