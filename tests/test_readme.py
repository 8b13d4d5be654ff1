"""The README's code runs as it stands."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
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


BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_training_loops_run():
    linen, nnx, _, _, _, _, _, linen_training, nnx_training, _ = BLOCKS
    scope = {}
    exec(linen, scope)
    exec(linen_training, scope)
    assert scope["state"].step == 1 and scope["loss"].dtype == jnp.float32
    assert scope["logits"].dtype == jnp.bfloat16
    histories = scope["state"].scaling["Dense_0"]["input"].amax_history
    assert histories.shape == (1024,) and histories[0] == 1 and not histories[1:].any()
    exec(nnx, scope)
    exec(nnx_training, scope)
    assert scope["optimizer"].step[...] == 1
    assert scope["model"].scaling["input"][...].amax_history[0] == 1


def test_quantized_inference(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    linen, _, storing, _, saving, exporting, *_ = BLOCKS
    scope = {}
    exec(linen, scope)
    exec(storing, scope)
    assert [each.dtype for each in scope["report"].weights] == ["int4", "float8_e4m3fn"]
    assert capsys.readouterr().out == f"{scope['report']}\n"
    expected = scope["small"].apply(scope["quantized"], scope["x"])
    exec(saving, scope)
    exec(exporting, scope)
    np.testing.assert_allclose(*(np.asarray(y, np.float32) for y in (scope["logits"], expected)))


def test_calibration(capsys):
    scope = {}
    exec(BLOCKS[0], scope)
    exec(BLOCKS[3], scope)
    assert set(scope["static_variables"]) == {"params", "scaling"}
    assert [each.rounding.method for each in scope["report"].weights] == ["gptq", "gptq"]
    assert capsys.readouterr().out == f"{scope['report']}\n"
    expected = scope["logits"].astype(jnp.float32)
    for name in ("smooth", "static", "int4"):
        model = scope["int8" if name == "smooth" else name]
        y = model.apply(scope[name if name == "smooth" else f"{name}_variables"], scope["x"])
        np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=0.15)


def test_the_policies_with_a_cache_in_8_bits():
    scope = {}
    exec("import mpjax as mp\n" + BLOCKS[6], scope)
    assert scope["policy"].kv_cache == "int8" and scope["policy"].quantization_mode is None


def test_the_policy_map_follows_from_the_linen_block():
    scope = {}
    exec(BLOCKS[0], scope)
    exec(BLOCKS[-1], scope)
    policies = scope["mp"].layer_policies(scope["model"], scope["variables"], scope["x"])
    assert [p.name for p in policies.values()] == ["int8_from_mixed_bfloat16", "float32"]


def test_every_linked_file_exists():
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", README)
    assert links and all((Path(__file__).parents[1] / link).exists() for link in links)
