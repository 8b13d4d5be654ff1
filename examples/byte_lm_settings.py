"""Sizes of the demo's model, of its training and of its evaluation: full, and quick for tests."""

import math
from dataclasses import dataclass

from byte_lm_models import Shape

BITS = 1 / math.log(2)  # bits in a nat


@dataclass(frozen=True)
class Settings:
    """Sizes of a run; `evaluated` bounds the held-out bytes, None takes every held-out file."""

    shape: Shape = Shape(context=64, width=192, depth=4, heads=4)
    steps: int = 1000
    batch: int = 8
    learning_rate: float = 1.5e-3
    evaluation_batch: int = 32
    evaluated: int | None = None
    sampled: int = 400
    seed: int = 0


QUICK = Settings(
    shape=Shape(context=16, width=32, depth=1, heads=2),
    steps=3,
    batch=2,
    evaluation_batch=4,
    evaluated=1000,
    sampled=8,
)
