"""The example that writes: what it chooses, that it compiles once, and what it refuses."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.progress import Progress

import mpjax as mp
from tests.test_demo import environment

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "generate.py"
INT8 = mp.QuantizedDTypePolicy("int8", "mixed_bfloat16", kv_cache="int8")


@pytest.fixture(scope="module")
def shape(example):
    return example("byte_lm_models").Shape(context=12, width=32, depth=1, heads=2)


@pytest.fixture(scope="module")
def params(example, shape):
    model = example("byte_lm_models").ByteLM(shape)
    tokens = jnp.zeros((1, shape.context), jnp.int32)
    leaves, treedef = jax.tree.flatten(jax.jit(model.init)(jax.random.key(0), tokens)["params"])
    keys = jax.random.split(jax.random.key(1), len(leaves))  # what starts at zero says nothing
    noisy = [x + 0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, noisy)


@pytest.fixture(scope="module")
def texts(shape):
    return np.random.default_rng(0).integers(0, 256, (3, shape.context)).astype(np.int32)


@pytest.mark.slow
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_decoding_in_float32_chooses_what_the_whole_forward_pass_does(
    example, shape, params, texts, api
):
    make = getattr(example("generate_decoding"), f"{api}_decoder")
    decoder = make(mp.DTypePolicy("float32"), params, shape, 256)
    assert decoder.cache_bytes == 2 * 12 * 32 * 4  # keys and values of one block
    chosen = decoder.run(texts, 12, jax.random.key(0), jnp.float32(0))
    whole = jax.jit(example("byte_lm_models").ByteLM(shape).apply)({"params": params}, texts)
    np.testing.assert_array_equal(chosen, whole.argmax(-1))
    # What comes after the given bytes is its own.
    written = np.array(decoder.run(texts, 5, jax.random.key(0), jnp.float32(0)))
    again = np.concatenate([texts[:, :5], written[:, 4:-1]], 1)
    np.testing.assert_array_equal(
        decoder.run(again, 12, jax.random.key(0), jnp.float32(0))[:, 4:], written[:, 4:]
    )


def test_linen_and_nnx_write_the_same_compile_once_and_follow_the_seed(
    example, shape, params, texts
):
    decoding = example("generate_decoding")
    decoders = [
        make(INT8, params, shape, 20) for make in (decoding.linen_decoder, decoding.nnx_decoder)
    ]
    outputs = [
        [
            np.asarray(each.run(texts, given, jax.random.key(seed), jnp.float32(temperature)))
            for given, seed, temperature in ((4, 0, 0), (4, 1, 0), (4, 0, 1), (7, 0, 1), (4, 1, 1))
        ]
        for each in decoders
    ]
    for linen, nnx in zip(*outputs, strict=True):
        np.testing.assert_array_equal(linen, nnx)
    greedy, other_seed, sampled, _, other_sample = outputs[0]
    np.testing.assert_array_equal(greedy, other_seed)
    assert not np.array_equal(sampled, greedy) and not np.array_equal(sampled, other_sample)
    for each in decoders:
        assert each.run.func._cache_size() == 1
        # 8 bits each, and a float32 scale for a head of a position: depth 16.
        assert each.cache_bytes == 2 * 12 * (32 + 4 * 2)
        assert each.weight_bytes == decoders[0].weight_bytes


def test_bytes_are_drawn_from_the_likeliest_by_their_probability(example):
    choose = jax.jit(example("generate_decoding").choose, static_argnums=3)
    logits = (
        jnp.full((4000, 256), -20.0)
        .at[:, jnp.array([5, 7, 9])]
        .set(jnp.log(jnp.array([1.0, 2, 4])))
    )
    key = jax.random.key(0)

    def share(temperature, top_k):
        chosen = np.asarray(choose(logits, key, jnp.float32(temperature), top_k))
        return np.array([(chosen == byte).mean() for byte in (5, 7, 9)])

    assert (share(0, 256) == [0, 0, 1]).all() and (share(2, 1) == [0, 0, 1]).all()
    bound = 4 * 0.5 / np.sqrt(4000)  # four standard deviations
    np.testing.assert_allclose(share(1, 3), [1 / 7, 2 / 7, 4 / 7], atol=bound)
    np.testing.assert_allclose(share(1, 2), [0, 1 / 3, 2 / 3], atol=bound)
    np.testing.assert_allclose(share(0.5, 2), [0, 1 / 5, 4 / 5], atol=bound)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "--prompt is empty: give at least one byte"),
        (["--prompt", "x" * 128], "--prompt has 128 bytes, but the model has a context of 128"),
        (["--prompt", "ä" * 64], "--prompt has 128 bytes"),
        (["--prompt", "abc", "--bytes", "126"], "--bytes is 126: from 1 to 125"),
        (["--bytes", "0"], "--bytes is 0: from 1 to 105"),
        (["--temperature", "-1"], "--temperature is -1.0: 0 (greedy) or a positive number"),
        (["--temperature", "nan"], "--temperature is nan"),
        (["--top-k", "0"], "--top-k is 0: from 1 (greedy) to 256 (all bytes)"),
        (["--top-k", "257"], "--top-k is 257"),
        (["--steps", "0"], "--steps is 0: at least 1"),
        (["--seed", "-1"], "--seed is -1: at least 0"),
        (["--weights", "no/such/folder/x"], "in a folder that does not exist"),
    ],
)
def test_options_out_of_range_are_refused_before_any_work(example, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        example("generate").main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_weights_are_trained_once_and_then_read(example, tmp_path):
    generate = example("generate")
    path, settings = tmp_path / "lm.safetensors", generate.QUICK
    text = np.arange(5000, dtype=np.uint8)
    with Progress(disable=True) as progress:
        trained = generate.weights_of(path, settings, text, progress)
        read = generate.weights_of(path, settings, text, progress)
        jax.tree.map(np.testing.assert_array_equal, trained, read)
        with pytest.raises(ValueError, match=r"lm.safetensors` holds the weights of another model"):
            generate.weights_of(path, generate.FULL, text, progress)
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(mp.ModelFileError):
            generate.weights_of(path, settings, text, progress)


@pytest.mark.parametrize(
    ("agreement", "cache", "reached"),
    [((0.99, 0.99), 54, [True] * 4), ((0.9, 0.99), 60, [False, False, True, False])],
)
def test_targets_can_be_missed(example, agreement, cache, reached):
    report = example("generate_report")
    rows = {
        "bfloat16": report.Row(1, 10, 100),
        "int8, cache int8": report.Row(agreement[0], 10, cache),
        "int8, cache float8": report.Row(agreement[1], 10, cache),
    }
    assert [ok for _, ok in report.targets(rows)] == reached


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--nnx"]])
def test_the_example_runs_and_writes_the_same_twice(tmp_path, flags):
    command = [sys.executable, str(SCRIPT), "--quick", "--weights", "lm.safetensors", *flags]
    runs = [
        subprocess.run(
            command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300
        )
        for _ in range(2)
    ]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    printed = [run.stdout.partition("greedy:")[2].partition("texts at once")[0] for run in runs]
    texts = [text.rpartition("\n")[0] for text in printed]  # the title is centered by its table
    assert texts[0] == texts[1] and texts[0].count("def __init__(self") == 2
    for name in ("float32", "bfloat16", "int8", "int8, cache int8", "int8, cache float8"):
        assert any(line.strip().startswith(name) for line in runs[0].stdout.splitlines())
