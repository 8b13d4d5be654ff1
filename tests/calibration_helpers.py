"""Inputs and weights as layers have them, for the tests of calibration."""

import functools

import numpy as np


@functools.cache
def layer(
    inputs: int, outputs: int, rows: int = 512, outliers: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs x [rows, K], correlated, and weights w [K, N], normal.

    The spectrum of the inputs decays like that of activations, as 1 / sqrt(rank). With `outliers`,
    one channel in 64 is 20 times as large.
    """
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(inputs, inputs)))[0]
    x = rng.normal(size=(rows, inputs)) / np.sqrt(np.arange(1, inputs + 1)) @ basis.T
    if outliers:
        x[:, rng.choice(inputs, max(inputs // 64, 1), replace=False)] *= 20
    w = rng.normal(size=(inputs, outputs)) / np.sqrt(inputs)
    return x.astype(np.float32), w.astype(np.float32)


def second_moment(x: np.ndarray) -> np.ndarray:
    """H = 2 / n sum x x^T."""
    x = x.astype(np.float64)
    return (2 / len(x) * x.T @ x).astype(np.float32)


def trace_error(error: np.ndarray, moment: np.ndarray) -> float:
    """tr(E^T H E)."""
    error = error.astype(np.float64)
    return float(np.sum(error * (moment.astype(np.float64) @ error)))
