"""One policy of the run: trained with checkpoints, then scored on the held-out text.

The training step is the same for every policy: the loss scale of float16 and the scaling states of
float8 are the business of `mp.TrainState`.
"""

import hashlib
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import byte_lm_data as data
import jax
import jax.numpy as jnp
import numpy as np
from byte_lm_models import ByteLM
from byte_lm_runs import losses, make_optimizer
from byte_lm_settings import BITS, Settings
from train_float8_files import History, read_history, read_json, write_json
from train_float8_options import Plan
from train_float8_report import Outcome

import mpjax as mp

Show = Callable[..., None]  # `show(completed=steps)`


def run_policy(
    policy: str, plan: Plan, folder: Path, text: tuple[np.ndarray, np.ndarray], show: Show
) -> Outcome:
    """What `policy` comes to; a policy that was finished before is not trained again."""
    folder.mkdir(exist_ok=True)
    train, held_out = text
    if not (folder / "result.json").exists():
        state = trained(policy, plan, folder, train, show)
        write_json(folder / "result.json", score(state, plan.settings, held_out))
    show(completed=plan.settings.steps)
    step_losses, step_times = read_history(folder / "history.jsonl")
    result = read_json(folder / "result.json")
    return Outcome(losses=step_losses, step_times=step_times, **result)


def trained(policy: str, plan: Plan, folder: Path, text: np.ndarray, show: Show) -> mp.TrainState:
    """The state after the last step, from the latest checkpoint on, or from the beginning."""
    settings, checkpoints = plan.settings, folder / "checkpoints"
    # Step t has batch t of a sequence that seed and settings decide, wherever training continues.
    batches = data.training_batches(
        text, settings.shape.context, settings.batch, settings.steps, settings.seed
    )
    state, done = initial_state(policy, settings), mp.latest_step(checkpoints) or 0
    if done:
        state = mp.restore_checkpoint(checkpoints, state)
    history = History(folder / "history.jsonl", done)
    for t in range(done, settings.steps):
        started = time.perf_counter()
        state, loss = train_step(state, *batches[t])
        bits = float(loss) * BITS  # a float leaves nothing in flight
        history.append(bits, None if t == done else time.perf_counter() - started)
        show(completed=t + 1)
        if (t + 1) % plan.checkpoint_every == 0 or t + 1 == settings.steps:
            history.flush()  # first, so that the history is never behind the checkpoint
            mp.save_checkpoint(checkpoints, state, step=t + 1, keep=2)
    history.close()
    return state


def initial_state(policy: str, settings: Settings) -> mp.TrainState:
    """The model of the demo under a policy, with AdamW, before its first step."""
    model = mp.wrap(ByteLM(settings.shape), policy)
    tokens = jnp.zeros((1, settings.shape.context), jnp.int32)
    return mp.TrainState.create(
        apply_fn=model.apply,
        variables=jax.jit(model.init)(jax.random.key(settings.seed), tokens),
        tx=make_optimizer(settings.learning_rate, settings.steps),
        policy=model.policy,
    )


@partial(jax.jit, donate_argnums=0)
def train_step(
    state: mp.TrainState, inputs: jax.Array, targets: jax.Array
) -> tuple[mp.TrainState, jax.Array]:
    """One step on one batch, int32 [B, T]; the loss is the mean in nats, of float32 logits."""

    def loss_fn(variables: Any) -> jax.Array:
        return losses(state.apply_fn(variables, inputs), targets).mean()

    loss, grads = state.value_and_grad(loss_fn)
    return state.apply_gradients(grads), loss


@jax.jit
def total_loss(
    state: mp.TrainState, inputs: jax.Array, targets: jax.Array, weights: jax.Array
) -> jax.Array:
    """The sum of the losses in nats of those bytes whose weight is 1."""
    return jnp.sum(losses(state.apply_fn(state.variables, inputs), targets) * weights)


def score(state: mp.TrainState, settings: Settings, held_out: np.ndarray) -> dict[str, Any]:
    """The fields of an `Outcome` that a trained state has."""
    text = held_out[: settings.evaluated]
    batches = data.evaluation_batches(text, settings.shape.context, settings.evaluation_batch)
    return {
        "bits_per_byte": sum(float(total_loss(state, *b)) for b in batches) * BITS / text.size,
        "skipped_steps": int(state.skipped_steps),
        "loss_scale": float(state.loss_scale.scale),
        "weights_sha256": digest(state.params),
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
