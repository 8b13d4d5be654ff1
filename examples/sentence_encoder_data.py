"""The sentences: what the docstrings of Python's standard library begin with; and their batches.

Every machine that can run the example has them. From each docstring of a module, class or function
the first sentence is taken, if it has 5 to 60 words; each once. Which are drawn depends on the seed
and the version of Python alone.
"""

import ast
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from byte_lm_data import library_files

FEWEST_WORDS, MOST_WORDS = 5, 60
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def draw(
    evaluated: int, calibrated: int, seed: int = 0, part: str | None = None
) -> tuple[list[str], list[str]]:
    """Draws sentences to evaluate on, and others, disjoint from them, to calibrate on.

    Args:
      evaluated: how many to evaluate on.
      calibrated: how many to calibrate on.
      seed: of the draw.
      part: a folder of the standard library; None for all of it.

    Raises:
      ValueError: there are fewer.
    """
    found = sentences(Path(sysconfig.get_path("stdlib"), part or ""))
    if len(found) < evaluated + calibrated:
        raise ValueError(
            f"{evaluated + calibrated} sentences were asked for, but the docstrings of this "
            f"Python's standard library hold {len(found)} of {FEWEST_WORDS} to {MOST_WORDS} words"
        )
    drawn = random.Random(seed).sample(found, evaluated + calibrated)
    return drawn[:evaluated], drawn[evaluated:]


def sentences(root: Path) -> list[str]:
    """The first sentences of all docstrings of a library, sorted, each once whatever its case."""
    found = {}
    for path in library_files(root):
        for docstring in _docstrings((root / path).read_bytes()):
            sentence = first_sentence(docstring)
            if FEWEST_WORDS <= len(sentence.split()) <= MOST_WORDS:
                found.setdefault(sentence.lower(), sentence)
    return sorted(found.values())


def first_sentence(docstring: str) -> str:
    """What stands before the first blank line, or up to a full stop that a space follows."""
    paragraph = re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0]
    words = " ".join(paragraph.split())
    return re.split(r"(?<=[.!?])\s+(?=[A-Z])", words, maxsplit=1)[0]


def _docstrings(source: bytes) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


@dataclass(frozen=True)
class Batch:
    """Sentences padded to one length.

    Attributes:
      rows: which sentences these are; fewer than the batch has rows, if it was filled up.
      tokens: int32 [B, T].
      mask: bool [B, T], False where a sentence is padded.
    """

    rows: np.ndarray
    tokens: np.ndarray
    mask: np.ndarray


def batches(tokenizer: Any, texts: Sequence[str], size: int) -> list[Batch]:
    """Batches of `size` sentences of similar length, padded to 16, 32, 64, ... tokens.

    So there are few shapes to compile. Where sentences run out, the last of them is repeated.
    """
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    buckets: dict[int, list[int]] = {}
    for row, ids in enumerate(encoded):
        buckets.setdefault(max(16, 1 << (len(ids) - 1).bit_length()), []).append(row)
    made = []
    for length, rows in sorted(buckets.items()):
        for start in range(0, len(rows), size):
            made.append(_batch(encoded, rows[start : start + size], size, length))
    return made


def _batch(encoded: Sequence[Sequence[int]], rows: list[int], size: int, length: int) -> Batch:
    tokens, mask = np.zeros((size, length), np.int32), np.zeros((size, length), bool)
    for i in range(size):
        ids = encoded[rows[min(i, len(rows) - 1)]]
        tokens[i, : len(ids)] = ids
        mask[i, : len(ids)] = True
    return Batch(np.array(rows), tokens, mask)
