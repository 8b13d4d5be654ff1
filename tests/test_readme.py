"""The README's code runs as it stands."""

import re
from pathlib import Path

import jax
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


def block_with(text: str) -> str:
    (block,) = (block for block in BLOCKS if text in block)
    return block


def test_the_training_loops_run():
    scope = {}
    exec(block_after("Linen"), scope)
    exec(block_with("mp.TrainState.create"), scope)
    assert scope["state"].step == 1 and scope["loss"].dtype == jnp.float32
    assert scope["logits"].dtype == jnp.bfloat16
    histories = scope["state"].scaling["Dense_0"]["input"].amax_history
    assert histories.shape == (1024,) and histories[0] == 1 and not histories[1:].any()
    exec(block_after("NNX"), scope)
    exec(block_with("mp.nnx.Optimizer"), scope)
    assert scope["optimizer"].step[...] == 1
    assert scope["model"].scaling["input"][...].amax_history[0] == 1


def test_quantized_inference(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(block_after("Linen"), scope)
    exec(block_with("small = mp.wrap(MLP(), policy)"), scope)
    assert [each.dtype for each in scope["report"].weights] == ["int4", "float8_e4m3fn"]
    assert capsys.readouterr().out == f"{scope['report']}\n"
    expected = scope["small"].apply(scope["quantized"], scope["x"])
    exec(block_with('mp.save("model'), scope)
    exec(block_with("mp.export("), scope)
    np.testing.assert_allclose(*(np.asarray(y, np.float32) for y in (scope["logits"], expected)))


def test_prepacking(capsys):
    scope = {}
    exec(block_after("Linen"), scope)
    exec(block_with("prepack=True"), scope)
    assert capsys.readouterr().out == f"{scope['report']}\n"
    assert scope["report"].weights[-1].unpacked is not None
    run = jax.jit(scope["int8"].apply)
    y = [run(scope[name], scope["x"]) for name in ("packed", "quantized")]
    np.testing.assert_array_equal(*(np.asarray(each, np.float32) for each in y))


@pytest.mark.slow
def test_calibration(capsys):
    scope = {}
    exec(block_after("Linen"), scope)
    exec(block_with("calibration="), scope)
    assert set(scope["static_variables"]) == {"params", "scaling"}
    assert [each.rounding.method for each in scope["report"].weights] == ["gptq", "gptq"]
    assert capsys.readouterr().out == f"{scope['report']}\n"
    expected = scope["logits"].astype(jnp.float32)
    for name in ("smooth", "static", "int4"):
        model = scope["int8" if name == "smooth" else name]
        y = model.apply(scope[name if name == "smooth" else f"{name}_variables"], scope["x"])
        np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=0.15)


def test_what_the_compiler_makes_of_it(capsys):
    scope = {}
    exec(block_after("Linen"), scope)
    exec(block_with("mp.explain("), scope)
    report = scope["report"]
    assert [(row.path, row.reason) for row in report.products] == [("Dense_0", ""), ("Dense_1", "")]
    assert report.share_in_8_bits == 1.0 and capsys.readouterr().out == f"{report}\n"
    assert all(f"`{word}`" in README for word in scope["mp"].REASONS if word)


def test_weights_from_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(block_after("Linen"), scope)
    expected = scope["quantized"]
    exec(block_with("mp.open_weights("), scope)
    assert scope["from_disk"] is not expected
    for a, b in zip(*map(jax.tree.leaves, (scope["from_disk"], expected)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert jax.tree.structure(scope["shapes"]) == jax.tree.structure(expected)


def test_hardware(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(block_after("Linen"), scope)
    variables = scope["variables"]
    exec(block_after("Hardware"), scope)
    assert scope["model"].policy.name == "int8_from_mixed_bfloat16"
    kernel = scope["in_float8"]["params"]["Dense_0"]["kernel"]
    assert kernel.format.name == "float8_e4m3fn" and scope["variables"] is variables
    wide, thin = scope[
        "report"
    ].weights  # 8 rows: the larger weight is the one worth reading less of
    assert wide.reason is None and thin.reason.startswith("8 bits cost time on v6e: 8 rows of 256")
    assert "float8_e4m3fn" in capsys.readouterr().out


def test_the_policies_with_a_cache_in_8_bits():
    scope = {}
    exec("import mpjax as mp\n" + block_with("kv_cache="), scope)
    assert scope["policy"].kv_cache == "int8" and scope["policy"].quantization_mode is None


def test_the_policy_map_follows_from_the_linen_block():
    scope = {}
    exec(block_after("Linen"), scope)
    exec(block_with("mp.layer_policies("), scope)
    policies = scope["mp"].layer_policies(scope["model"], scope["variables"], scope["x"])
    assert [p.name for p in policies.values()] == ["int8_from_mixed_bfloat16", "float32"]


def test_every_linked_file_exists():
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", README)
    assert links and all((Path(__file__).parents[1] / link).exists() for link in links)
