"""Sizes of a run of `quantize_sentence_encoder.py`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """How much is encoded.

    Attributes:
      sentences: that are evaluated and timed.
      calibration: others, disjoint from those.
      batch: sentences per call.
      part: a folder of the standard library to draw from; None for all of it.
    """

    sentences: int = 500
    calibration: int = 128
    batch: int = 32
    part: str | None = None


FULL = Settings()
QUICK = Settings(sentences=24, calibration=8, batch=8, part="asyncio")
