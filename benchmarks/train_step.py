"""How fast is a training step in 8 bits, and what does it take to compile and to hold?

Four blocks of two Dense layers (`x + Dense(width)(gelu(Dense(hidden)(x)))`) with float32
parameters, the squared error to a fixed target, and SGD: one step, everything in one jit, the
state donated. On a GPU the model is larger, there is a transformer too, and float8 is compared with
bfloat16. Peers: the same Flax model in float32 and in bfloat16, Flax's own float8
(`Fp8DotGeneral`), Qwix's quantized training and AQT, each with its activations in float32 and in
bfloat16.

Everyone starts from the same weights, and nobody is timed who does not, whose first gradient is
further from float32's than its format explains, or whose loss after eight steps is. Steps are
timed in turns, compilations in turns as well, with JAX's caches cleared before each; a first
round of these, which pays for imports and other firsts, is thrown away.

One JSON row per case: in `contenders` for each the median and the quartiles of milliseconds per
step, median seconds to `trace_lower` (Python to StableHLO), to `compile` (XLA) and in `total`, the
bytes of temporary memory, and both errors; in `ratios` ours over each peer's; in `targets` which
ratios we want. A peer that cannot run has an entry with its error.

    python benchmarks/train_step.py [--cases mlp ...] [--contenders float32 ...] [--quick]
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

from _machine import environment
from _suite import Rows, output_folder, parser, selected
from _timing import compile_once, interleaved, spread
from _training import CONTENDERS, OURS, Case, Contender, Training, TransformerCase, chosen
from _training_table import print_row

CASES = {
    "cpu": (Case(512, 2048, 256),),
    "gpu": (Case(4096, 16384, 8192), TransformerCase(2048, 16, batch=8, tokens=1024)),
}
QUICK_CASES = (Case(32, 64, 16, blocks=1), TransformerCase(64, 2, batch=2, tokens=16, blocks=1))
GPU_NAMES = ("float8_from_mixed_bfloat16", "float8_current_from_mixed_bfloat16")
GPU_NAMES += ("float32", "bfloat16", "flax_float8_bfloat16")
ROUNDS, QUICK_ROUNDS = 15, 2
COMPILE_ROUNDS, QUICK_COMPILE_ROUNDS = 5, 1

STEPS = 8
LOSS_BOUND = 0.02  # of float32's loss after these steps

# Ours, a peer, what is compared, and our figure over its that we want at most.
TARGETS = tuple(
    target
    for ours, flax in (
        ("float8_from_mixed_bfloat16", "flax_float8_bfloat16"),
        ("float8_from_float32", "flax_float8_float32"),
    )
    for target in (
        (ours, flax, "step", 0.9),
        (ours, "float32", "step", 0.6),
        (ours, flax, "temporary_bytes", 1.0),
        (ours, flax, "compile", 1.0),
    )
)
FIGURES: dict[str, Callable[[dict[str, Any]], float]] = {
    "step": lambda entry: entry["median_ms"],
    "compile": lambda entry: entry["compile_s"]["total"],
    "temporary_bytes": lambda entry: entry["temporary_bytes"],
}


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    jax.config.update("jax_enable_compilation_cache", False)
    backend = jax.default_backend()
    cases = QUICK_CASES if options.quick else CASES.get(backend, CASES["cpu"])
    names = options.contenders or (GPU_NAMES if backend == "gpu" else None)
    whole = options.cases is None and options.contenders is None
    name = "train_step_gpu" if backend == "gpu" else "train_step"
    written = Rows(name, output_folder(options, whole))
    machine = environment()
    for case in selected({str(case): case for case in cases}, options.cases).values():
        row = {"benchmark": name} | measure(case, chosen(names), options) | {"machine": machine}
        written.add(row)
        print_row(row)


def measure(
    case: Case | TransformerCase, contenders: dict[str, Contender], options: argparse.Namespace
) -> dict[str, Any]:
    """Checks everyone, then times compilations and steps in turns; returns the row.

    Raises:
        ArithmeticError: If we train wrongly. A peer's error is an entry.
    """
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    compile_rounds = options.compile_rounds
    if compile_rounds is None:
        compile_rounds = QUICK_COMPILE_ROUNDS if options.quick else COMPILE_ROUNDS
    reference = Run(CONTENDERS["float32"].build(case), case)
    expected = reference.outcome()
    entries, runs = {}, {}
    for name, contender in contenders.items():
        entries[name] = {"package": contender.package, "version": _version(contender.package)}
        entries[name] |= {"note": contender.note} if contender.note else {}
        try:
            run = reference if name == "float32" else Run(contender.build(case), case)
            bound = contender.bound + (case.more_error if name != "float32" else 0)
            entries[name] |= checked(run.outcome(), expected, bound)
        except Exception as error:  # Whatever a peer raises is its entry, and the only one caught.
            if name in OURS:
                raise
            entries[name]["error"] = f"{type(error).__name__}: {error}"
        else:
            entries[name]["temporary_bytes"] = run.temporary_bytes
            runs[name] = run
    compilations = compile_times(runs, compile_rounds) if compile_rounds else {}
    for name, samples in interleaved(runs, rounds).items():
        entries[name] |= spread(samples)
        entries[name]["compile_s"] = compilations.get(name, runs[name].first_compilation)
    facts = {"case": str(case)} | asdict(case)
    facts |= {"rounds": rounds, "compile_rounds": compile_rounds}
    return facts | compared(entries)


@dataclass(frozen=True)
class Outcome:
    """What a contender computes: its first weights, the gradient there, the loss after STEPS."""

    weights: list[jax.Array]
    gradient: list[jax.Array]
    loss: float


class Run:
    """A compiled step that trains on: each call is the next step."""

    def __init__(self, training: Training, case: Case | TransformerCase):
        self.training = training
        self.rows = tuple(jax.random.normal(jax.random.key(seed), case.shape) for seed in (1, 2))
        self.state = self.start()
        started = time.perf_counter()
        lowered = self.lower()
        traced = time.perf_counter()
        self.executable = lowered.compile()
        ended = time.perf_counter()
        seconds = {"trace_lower": traced - started, "compile": ended - traced}
        seconds["total"] = ended - started
        self.first_compilation = {part: round(each, 3) for part, each in seconds.items()}
        self.temporary_bytes = self.executable.memory_analysis().temp_size_in_bytes

    def start(self) -> Any:
        """The first state; a function of the key alone."""
        return jax.jit(self.training.init)(jax.random.key(0), self.rows[0])

    def lower(self) -> Any:
        """The step as StableHLO, by a jit of its own."""
        step = self.training.step
        return jax.jit(lambda *args: step(*args), donate_argnums=0).lower(self.state, *self.rows)

    def __call__(self) -> jax.Array:
        self.state, loss = self.executable(self.state, *self.rows)
        jax.block_until_ready(self.state)
        return loss

    def outcome(self) -> Outcome:
        """What it starts from and comes to; the state is that after the steps."""
        self.state = self.start()
        _, gradients = jax.jit(self.training.gradients)(self.state, *self.rows)
        weights = self.training.weights
        # Copies, because a step takes the state's own.
        first = [jnp.copy(leaf) for leaf in jax.tree.leaves(weights(self.state))]
        for _ in range(STEPS):
            self()
        return Outcome(first, jax.tree.leaves(weights(gradients)), float(self()))


def checked(outcome: Outcome, expected: Outcome, bound: float) -> dict[str, Any]:
    """Both errors against float32.

    Raises:
        ArithmeticError: If the first weights differ, or an error is larger than its bound.
    """
    pairs = zip(outcome.weights, expected.weights, strict=True)
    if not all(jnp.array_equal(ours, theirs) for ours, theirs in pairs):
        raise ArithmeticError("it starts from other weights than float32")
    pairs = zip(outcome.gradient, expected.gradient, strict=True)
    error = float(_norm([ours - theirs for ours, theirs in pairs]) / _norm(expected.gradient))
    _check("the first gradient", error, bound)
    change = abs(outcome.loss / expected.loss - 1)
    _check(f"the loss after {STEPS} steps", change, LOSS_BOUND)
    return {
        "gradient_error": float(f"{error:.4g}"),
        "gradient_bound": bound,
        "loss": round(outcome.loss, 3),
        "loss_error": float(f"{change:.4g}"),
        "loss_bound": LOSS_BOUND,
    }


def compile_times(runs: dict[str, Run], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds over the rounds of everyone's compilations, made in turns."""
    times: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in list(runs.items())[:: 1 if turn % 2 else -1]:
            seconds = compile_once(run.lower)
            if turn > 0:
                times[name].append(seconds)
    parts = ("trace_lower", "compile", "total", "cpu")
    return {
        name: {part: round(median(each[part] for each in samples), 3) for part in parts}
        for name, samples in times.items()
    }


def compared(entries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Everyone's entry, our figures over everyone else's, and what became of the targets."""
    ran = {name: entry for name, entry in entries.items() if "error" not in entry}
    ratios = {
        ours: {
            peer: {
                figure: round(value(entry) / value(other), 4) if value(other) else None
                for figure, value in FIGURES.items()
            }
            for peer, other in ran.items()
            if peer not in OURS
        }
        for ours, entry in ran.items()
        if ours in OURS
    }
    verdicts = []
    for ours, peer, figure, at_most in TARGETS:
        if ours in entries and peer in entries:
            ratio = ratios[ours].get(peer, {}).get(figure)
            reached = None if ratio is None else ratio <= at_most
            verdict = {"ours": ours, "peer": peer, "figure": figure, "at_most": at_most}
            verdicts.append(verdict | {"ratio": ratio, "reached": reached})
    return {"contenders": entries, "ratios": ratios, "targets": verdicts}


def _check(what: str, error: float, bound: float) -> None:
    if not error <= bound:  # NaN is not
        raise ArithmeticError(f"{what} is {error:.4g} from float32's, at most {bound:.4g}")


def _norm(leaves: list[jax.Array]) -> jax.Array:
    return jnp.sqrt(sum((jnp.sum(jnp.square(leaf)) for leaf in leaves), jnp.float32(0)))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ModuleNotFoundError:  # of which PackageNotFoundError is one
        return None


def _options(arguments: list[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--cases", nargs="+", help="parts of their names")
    options.add_argument(
        "--compile-rounds", type=int, help="compilations per median; 0: the first alone is timed"
    )
    options.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, help="all of them by default"
    )
    return options.parse_args(arguments)


if __name__ == "__main__":
    main()
