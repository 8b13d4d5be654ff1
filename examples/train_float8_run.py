"""One policy of the run: trained with checkpoints, then scored on the held-out text."""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import byte_lm_data as data
import jax
import numpy as np
from byte_lm_settings import BITS, Settings
from train_float8_files import History, read_history, read_json, write_json
from train_float8_options import Plan
from train_float8_report import Outcome
from train_float8_training import LinenTraining, NNXTraining, Training

import mpjax as mp

Show = Callable[..., None]  # `show(completed=steps)`


def run_policy(
    policy: str, plan: Plan, folder: Path, text: tuple[np.ndarray, np.ndarray], show: Show
) -> Outcome:
    """What `policy` comes to; a policy that was finished before is not trained again."""
    folder.mkdir(exist_ok=True)
    train, held_out = text
    if not (folder / "result.json").exists():
        training = trained(policy, plan, folder, train, show)
        write_json(folder / "result.json", score(training, plan.settings, held_out))
    show(completed=plan.settings.steps)
    step_losses, step_times = read_history(folder / "history.jsonl")
    result = read_json(folder / "result.json")
    return Outcome(losses=step_losses, step_times=step_times, **result)


def trained(policy: str, plan: Plan, folder: Path, text: np.ndarray, show: Show) -> Training:
    """The model after its last step, trained from the latest checkpoint on, if there is one."""
    settings, checkpoints = plan.settings, folder / "checkpoints"
    # Step t has batch t of a sequence that seed and settings decide, wherever training continues.
    batches = data.training_batches(
        text, settings.shape.context, settings.batch, settings.steps, settings.seed
    )
    training = (NNXTraining if plan.nnx else LinenTraining)(policy, settings)
    done = mp.latest_step(checkpoints) or 0
    if done:
        training.restore(checkpoints)
    history = History(folder / "history.jsonl", done)
    for t in range(done, settings.steps):
        started = time.perf_counter()
        bits = training.train_step(*batches[t]) * BITS
        history.append(bits, None if t == done else time.perf_counter() - started)
        show(completed=t + 1)
        if (t + 1) % plan.checkpoint_every == 0 or t + 1 == settings.steps:
            history.flush()  # first, so that the history is never behind the checkpoint
            training.save(checkpoints, t + 1)
    history.close()
    return training


def score(training: Training, settings: Settings, held_out: np.ndarray) -> dict[str, Any]:
    """The fields of an `Outcome` that a trained model has."""
    text = held_out[: settings.evaluated]
    batches = data.evaluation_batches(text, settings.shape.context, settings.evaluation_batch)
    return {
        "bits_per_byte": sum(training.total_loss(*batch) for batch in batches) * BITS / text.size,
        "skipped_steps": training.skipped_steps,
        "loss_scale": training.loss_scale,
        "weights_sha256": digest(training.params),
    }


def digest(params: Any) -> str:
    """SHA-256 of all parameters, in the order of their paths: path, dtype, shape and bytes."""
    sha256 = hashlib.sha256()
    leaves = ((jax.tree_util.keystr(path), x) for path, x in jax.tree.leaves_with_path(params))
    for path, leaf in sorted(leaves, key=lambda each: each[0]):
        array = np.asarray(leaf)
        sha256.update(json.dumps([path, str(array.dtype), array.shape]).encode())
        sha256.update(array.tobytes())
    return sha256.hexdigest()
