"""The README's code runs as it stands."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()


def block_after(heading: str) -> str:
    return (
        re.split(rf"^## {heading}$", README, flags=re.M)[1].split("```python\n")[1].split("```")[0]
    )


@pytest.mark.parametrize("heading", ["Linen", "NNX"])
def test_quick_start(heading):
    scope = {}
    exec(block_after(heading), scope)  # as a reader would paste it
    assert scope["logits"].dtype == jnp.bfloat16 and scope["logits"].shape == (8, 10)


def test_the_training_loop_and_the_policy_map_follow_from_the_linen_block():
    linen, _, training, by_path = re.findall(r"```python\n(.*?)```", README, re.S)
    scope = {"optax": optax, "tx": optax.adamw(1e-3), "labels": jnp.zeros(8, int)}
    exec(linen, scope)
    scope["params"] = scope["variables"]["params"]
    scope["opt_state"] = scope["tx"].init(scope["params"])
    exec(training, scope)
    assert {g.dtype.name for g in jax.tree.leaves(scope["grads"])} == {"float32"}
    exec(by_path, scope)
    policies = scope["mp"].layer_policies(scope["model"], scope["variables"], scope["x"])
    assert [p.name for p in policies.values()] == ["int8_from_mixed_bfloat16", "float32"]


def test_every_linked_file_exists():
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", README)
    assert links and all((Path(__file__).parents[1] / link).exists() for link in links)
