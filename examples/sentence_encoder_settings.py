"""Sizes of a run of `quantize_sentence_encoder.py`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """How much is encoded.

    Attributes:
      sentences: of a draw; nearest neighbors are sought among them, and the first is timed.
      draws: how many draws, disjoint, are averaged. The nearest neighbors of one draw are a noisy
        measure: 500 sentences of which 97% keep theirs have a standard error of 0.8%.
      calibration: others, disjoint from those.
      batch: sentences per call.
      part: a folder of the standard library to draw from; None for all of it.
    """

    sentences: int = 500
    draws: int = 4
    calibration: int = 128
    batch: int = 32
    part: str | None = None


FULL = Settings()
QUICK = Settings(sentences=12, draws=2, calibration=8, batch=8, part="asyncio")
