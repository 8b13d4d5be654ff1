"""Which run this is: what the command line asks for, and what the run's folder says it is."""

import argparse
import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import byte_lm_settings
import numpy as np
from byte_lm_settings import Settings
from train_float8_files import read_json, write_json

POLICIES = (
    "float32",
    "mixed_bfloat16",
    "mixed_float16",
    "float8_from_mixed_bfloat16",
    "float8_current_from_mixed_bfloat16",
)


@dataclass(frozen=True)
class Plan:
    """All that decides the weights of a run: two of one plan end with the same bits."""

    settings: Settings
    policies: tuple[str, ...]
    checkpoint_every: int
    quick: bool = False
    nnx: bool = False

    def record(self, text: np.ndarray) -> dict[str, Any]:
        """The plan and the SHA-256 of the text to train on, as JSON will have them."""
        plan = dataclasses.asdict(self)
        return {
            **plan.pop("settings"),
            **plan,
            "policies": list(self.policies),
            "text_sha256": hashlib.sha256(text.tobytes()).hexdigest(),
        }


FULL = Plan(Settings(), POLICIES, checkpoint_every=100)
QUICK_SETTINGS = dataclasses.replace(byte_lm_settings.QUICK, steps=30)
QUICK = Plan(QUICK_SETTINGS, POLICIES, checkpoint_every=3, quick=True)


def make_parser(description: str) -> argparse.ArgumentParser:
    """The options; those that are not given are None, so that --resume can tell."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--resume", action="store_true", help="continue the run in --output, or begin it")
    add("--output", type=Path, default=Path("float8_run"), help="the folder of the run")
    add("--nnx", action="store_true", default=None, help="the model in NNX instead of Linen")
    add("--steps", type=int, help=f"of each policy (default {FULL.settings.steps})")
    add("--seed", type=int, help=f"weights and batches (default {FULL.settings.seed})")
    add("--policies", nargs="+", choices=POLICIES, metavar="POLICY", help="default: all five")
    add("--quick", action="store_true", default=None, help="tiny and meaningless, for tests")
    return parser


def claim_folder(options: argparse.Namespace, text: np.ndarray) -> Plan:
    """The plan of the run in `options.output`: one that begins, or the one to continue.

    What was not asked for is as in the run that is continued.

    Raises:
      ValueError: an option is out of range, the folder cannot hold a run, holds one and --resume
        was not given, or holds one of another plan or text.
    """
    path = options.output / "run.json"
    recorded = read_json(path)
    if recorded and not options.resume:
        raise ValueError(
            f"`{options.output}` holds a run already: continue it with --resume, or choose another "
            "folder with --output"
        )
    plan = _make_plan(options, recorded or {})
    record = plan.record(text)
    if not recorded:
        options.output.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
    elif record != recorded:
        raise ValueError(
            f"`{options.output}` holds a run of something else: {_differences(recorded, record)}. "
            "Ask for the same to continue it, or choose another folder with --output"
        )
    return plan


def _make_plan(options: argparse.Namespace, recorded: dict[str, Any]) -> Plan:
    def asked(name: str, otherwise: Any) -> Any:
        given = getattr(options, name)
        return recorded.get(name, otherwise) if given is None else given

    plan = QUICK if asked("quick", False) else FULL
    steps, seed = asked("steps", plan.settings.steps), asked("seed", plan.settings.seed)
    if steps < 1:
        raise ValueError(f"--steps is {steps}: at least 1")
    if seed < 0:
        raise ValueError(f"--seed is {seed}: at least 0")
    policies = dict.fromkeys(asked("policies", plan.policies))  # once each, as given
    settings = dataclasses.replace(plan.settings, steps=steps, seed=seed)
    nnx = asked("nnx", plan.nnx)
    return dataclasses.replace(plan, settings=settings, policies=tuple(policies), nnx=nnx)


def _differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return ", ".join(
        f"`{name}` is {there.get(name)} there, {here.get(name)} here" for name in names
    )
