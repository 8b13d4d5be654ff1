"""How fast is a quantized model, against the float one and against other libraries?

Two models in plain Flax with random weights: `encode BxT`, a BERT of all-MiniLM-L6-v2's sizes (6
layers, 384 wide) that turns B sentences of T tokens into vectors; and `decode`, a step of a decoder
(12 layers, 1024 wide, float32 weights of 607 MB, more than caches hold) that makes one token, with
Flax' cache of keys and values, which is donated from step to step. Ours are named by their policies
(weights quantized beforehand by `mp.quantize`, arguments of one jit). Peers, in the same process,
called in turns with us: unwrapped Flax in float32 and bfloat16; Qwix PTQ, w8a8 (by its rule for
everything, which includes the products in attention, and for `dot_general` alone, which is what our
int8 policy quantizes) and w8a16; for the encoder ONNX Runtime, float32 and dynamic int8.

Everyone's result is first compared with float32's, and a wrong one is not timed. One JSON row per
case: in `contenders` for each the median and quartiles of milliseconds per call, `per_s`, sentences
or tokens per second of the median, compile time, bytes of arguments and results, temporary bytes
and the relative error; in `ratios` our throughput over each peer's; in `targets` which ratios we
want. A peer that cannot run has an entry with its error.

With `--profile` it says instead where the time goes: of float32 and int8, in turns, the seconds in
each kind of operation, from the trace of XLA's own thunks (`_profile.py` says how, and what that
leaves out).

    python benchmarks/inference.py [--cases decode ...] [--contenders flax_float32 ...] [--profile]
        [--quick]
"""

import argparse
from typing import Any

import jax

from _contest import race
from _gpu_timing import busy_entry
from _inference import GPU_OURS, OURS, PEERS, Case, contenders, reference
from _inference_models import Decode, Encode, bert
from _inference_table import print_profile, print_row, summary
from _machine import environment, limits
from _profile import breakdown
from _suite import Rows, output_folder, parser, selected

CASES = {
    str(case): case for case in (*(Encode(b, t) for b in (1, 8, 64) for t in (16, 128)), Decode())
}
# Float32 weights of 6.5 GB: 16 bits of them take a millisecond to read.
GPU_CASES = {str(case): case for case in (Decode(8, 4096, 32, vocabulary=4096),)}
TINY = bert.Shape(vocabulary=64, positions=32, width=128, inner=256, depth=1, heads=4)
QUICK_CASES = {
    str(case): case
    for case in (
        Encode(2, 16, TINY),
        Decode(depth=1, width=128, heads=4, vocabulary=128, context=16),
    )
}
ROUNDS, QUICK_ROUNDS, PROFILE_ROUNDS = 11, 2, 15
PROFILED = ("flax_float32", "int8_from_float32", "qwix_int8")

# Of ours, a peer, and the throughput of it that we want at least.
INT8, W4A8 = "int8_from_float32", "w4a8/128_from_float32"
OF_FLOAT32 = {"encode 8x128": 1.0, "encode 64x128": 1.1, "encode 1x16": 1.2, "decode 12x1024": 1.25}
OF_QWIX = {"encode 1x16": 1.2, "decode 12x1024": 1.2}
OF_QWIX_ELSEWHERE = 0.97
INT4_OF_FLOAT32 = {"decode 12x1024": 4.5}


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    jax.config.update("jax_enable_compilation_cache", False)
    on_gpu = jax.default_backend() == "gpu"
    cases = GPU_CASES if on_gpu else CASES
    chosen = selected(QUICK_CASES if options.quick else cases, options.cases)
    whole = options.cases is None and options.contenders is None
    machine = environment()
    name = ("inference_profile" if options.profile else "inference") + ("_gpu" if on_gpu else "")
    written, rows = Rows(name, output_folder(options, whole)), []
    shared = {"benchmark": name, "machine": machine}
    if not options.profile and not on_gpu:
        shared["limits"] = limits(32, 512) if options.quick else limits()
    for case in chosen.values():
        if options.profile:
            row, show = profile(case, options), print_profile
        else:
            row, show = measure(case, options, shared.get("limits")), print_row
        rows.append(shared | row)
        written.add(rows[-1])
        show(rows[-1])
    for line in [] if options.profile else summary(rows):
        print(line)


def measure(
    case: Case, options: argparse.Namespace, bounds: dict[str, float] | None
) -> dict[str, Any]:
    """Checks and times everyone in turns; returns the row.

    Raises:
        ArithmeticError: If a result of ours is wrong.
    """
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    known = contenders(case, options.contenders)
    own = OURS | GPU_OURS
    entries = race(known, own, reference(case), rounds, bounds, also=busy_entry)
    for entry in entries.values():
        if "median_ms" in entry:
            entry["per_s"] = round(case.batch / entry["median_ms"] * 1e3, 2)
    return {"case": str(case), "unit": case.unit, "rounds": rounds} | compared(str(case), entries)


def profile(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Where the time of float32's and of int8's program goes; returns the row."""
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else PROFILE_ROUNDS)
    known = contenders(case, options.contenders or PROFILED)
    programs = {name: contender.prepare() for name, contender in known.items()}
    return {"case": str(case), "rounds": rounds} | {"milliseconds": breakdown(programs, rounds)}


def compared(case: str, entries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Everyone's entry, our throughput over everyone else's, and what became of the targets."""
    ran = {name: entry["per_s"] for name, entry in entries.items() if "per_s" in entry}
    ratios = {
        ours: {peer: round(ran[ours] / ran[peer], 4) for peer in ran if peer in PEERS}
        for ours in ran
        if ours in OURS or ours in GPU_OURS
    }
    targets = []
    for name, peer, at_least in wanted(case):
        if name in entries and peer in entries:
            ratio = ratios.get(name, {}).get(peer)
            reached = None if ratio is None else ratio >= at_least
            verdict = {"ours": name, "peer": peer, "at_least": at_least}
            targets.append(verdict | {"ratio": ratio, "reached": reached})
    return {"contenders": entries, "ratios": ratios, "targets": targets}


def wanted(case: str) -> list[tuple[str, str, float]]:
    """Of ours and of a peer, the part of the throughput of that that we want at least."""
    of_float32 = {INT8: OF_FLOAT32.get(case), W4A8: INT4_OF_FLOAT32.get(case)}
    found = [(name, "flax_float32", at_least) for name, at_least in of_float32.items() if at_least]
    return [*found, (INT8, "qwix_int8", OF_QWIX.get(case, OF_QWIX_ELSEWHERE))]


def _options(arguments: list[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--cases", nargs="+", help=f"parts of their names: {'; '.join(CASES)}")
    options.add_argument(
        "--contenders", nargs="+", choices=(*OURS, *GPU_OURS, *PEERS), help="all of them by default"
    )
    options.add_argument("--profile", action="store_true", help="say where the time goes")
    return options.parse_args(arguments)


if __name__ == "__main__":
    main()
