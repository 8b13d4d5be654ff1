"""The README's code runs as it stands."""

import re
from pathlib import Path

import jax.numpy as jnp
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


def test_every_linked_file_exists():
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", README)
    assert links and all((Path(__file__).parents[1] / link).exists() for link in links)
