"""The demo's text: the source code of Python's standard library, split by file.

Every machine that can run the demo has it, so nothing is downloaded. Left out are tests,
`site-packages`, tables that a program wrote (`encodings`, `pydoc_data`) and the record of how
this Python was built (`config-*`, `_sysconfigdata*`), which differs from machine to machine.

A file is held out when the SHA-256 of its path relative to the library, taken modulo 16, is
zero: no shuffling, no seed, and the same answer on every machine, for the same version of
Python. What is evaluated is held-out files, whole, in path order.
"""

import hashlib
import math
import sysconfig
import zlib
from pathlib import Path, PurePosixPath

import numpy as np

SKIPPED_FOLDERS = frozenset(
    {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
)
SKIPPED_PREFIXES = ("config-", "_sysconfigdata")
HELD_OUT_ONE_IN = 16

Batches = list[tuple[np.ndarray, ...]]


def library_files(root: Path | None = None) -> list[PurePosixPath]:
    """Lists the `*.py` files of the library at `root`, as relative paths, sorted."""
    root = root or Path(sysconfig.get_path("stdlib"))
    paths = (PurePosixPath(path.relative_to(root).as_posix()) for path in root.rglob("*.py"))
    return sorted(
        path
        for path in paths
        if SKIPPED_FOLDERS.isdisjoint(path.parts) and not path.parts[0].startswith(SKIPPED_PREFIXES)
    )


def is_held_out(path: PurePosixPath) -> bool:
    """Says whether a file is held out: SHA-256 of its relative path, modulo 16, is zero."""
    digest = hashlib.sha256(str(path).encode()).hexdigest()
    return int(digest, 16) % HELD_OUT_ONE_IN == 0


def load(root: Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Reads the library at `root` as two arrays of bytes: training and held out, both uint8 [N]."""
    root = root or Path(sysconfig.get_path("stdlib"))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in library_files(root):
        parts[is_held_out(path)].append((root / path).read_bytes())
    train, held_out = (np.frombuffer(b"".join(part), np.uint8) for part in parts)
    if not train.size or not held_out.size:
        raise FileNotFoundError(
            f"`{root}` holds {train.size} bytes of Python source to train on and {held_out.size} "
            "held out: the demo needs a Python whose standard library is installed as .py files"
        )
    return train, held_out


def training_batches(text: np.ndarray, context: int, batch: int, steps: int, seed: int) -> Batches:
    """Draws `steps` pairs (inputs, targets), int32 [batch, context], from random places."""
    starts = np.random.default_rng(seed).integers(0, text.size - context, size=(steps, batch, 1))
    windows = text[starts + np.arange(context + 1)].astype(np.int32)
    return [(window[:, :-1], window[:, 1:]) for window in windows]


def evaluation_batches(text: np.ndarray, context: int, batch: int) -> Batches:
    """Cuts `text` in windows that do not overlap, so that each byte is predicted exactly once.

    The input at a place is the byte before it (0 before the first byte). Returns triples (inputs,
    targets, weights), each [batch, context]; weights are 1 for a byte of `text`, 0 for the padding
    that fills the last batch.
    """
    size = math.ceil(text.size / (batch * context)) * batch * context
    targets = np.zeros(size, np.int32)
    targets[: text.size] = text
    inputs = np.concatenate([[0], targets[:-1]]).astype(np.int32)
    weights = (np.arange(size) < text.size).astype(np.float32)
    cut = (x.reshape(-1, batch, context) for x in (inputs, targets, weights))
    return list(zip(*cut, strict=True))


def order0_entropy(text: np.ndarray) -> float:
    """Entropy of single bytes, bits per byte: `-sum(p * log2(p))` over the byte histogram."""
    p = np.bincount(text, minlength=256) / text.size
    return float(-(p[p > 0] * np.log2(p[p > 0])).sum()) + 0.0


def zlib_bits_per_byte(text: np.ndarray) -> float:
    """Size of `text` compressed by zlib at level 9, bits per byte."""
    return 8 * len(zlib.compress(text.tobytes(), 9)) / text.size
