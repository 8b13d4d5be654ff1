"""What `quantize` did to each weight of a model, and why it left some as they were."""

import dataclasses
from typing import Any

import mpjax_kernels as mk


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """One weight in a `QuantizationReport`.

    Attributes:
      path: of the weight, `"params/encoder/Dense_0/kernel"`.
      shape: its shape.
      dtype: dtype of its values now: `"int8"`, `"float32"`, ...
      scales: how many scales it has; 0 if it was left as it was.
      bytes_before: of the float weight.
      bytes_after: of what is stored now, scales and zero points included.
      reason: why it was left as it was; None if it was quantized.
      wanted: whether its policy asks to quantize it.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    scales: int
    bytes_before: int
    bytes_after: int
    reason: str | None = None
    wanted: bool = True


@dataclasses.dataclass(frozen=True)
class QuantizationReport:
    """Every weight with two axes or more but biases. Printed, it is a table.

    Attributes:
      weights: the weights.
    """

    weights: tuple[QuantizedWeight, ...]

    @property
    def quantized(self) -> tuple[QuantizedWeight, ...]:
        """The weights that are quantized now."""
        return tuple(each for each in self.weights if each.reason is None)

    @property
    def left(self) -> tuple[QuantizedWeight, ...]:
        """The weights that stayed floats although their policy asks to quantize them."""
        return tuple(each for each in self.weights if each.reason is not None and each.wanted)

    def __str__(self) -> str:
        rows = [("weight", "shape", "stored as", "scales", "MB", "")]
        for each in self.weights:
            shape = "x".join(map(str, each.shape))
            size, why = f"{each.bytes_after / 1e6:.3g}", each.reason or ""
            rows.append((each.path, shape, each.dtype, str(each.scales or ""), size, why))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        cells = [[cell.ljust(w) for cell, w in zip(row, widths, strict=True)] for row in rows]
        before = sum(each.bytes_before for each in self.weights)
        after = sum(each.bytes_after for each in self.weights)
        total = f"{before / 1e6:.3g} MB -> {after / 1e6:.3g} MB, {len(self.left)} left as they were"
        return "\n".join([*("  ".join(row).rstrip() for row in cells), total])


def quantized_weight(path: str, before: Any, after: mk.QTensor) -> QuantizedWeight:
    """The row of a weight that was quantized."""
    return QuantizedWeight(
        path, after.shape, after.format.name, after.scale.size, before.nbytes, after.nbytes
    )


def left_weight(path: str, weight: Any, reason: str, *, wanted: bool) -> QuantizedWeight:
    """The row of a weight that stayed as it was."""
    size = weight.size * weight.dtype.itemsize
    return QuantizedWeight(
        path, tuple(weight.shape), weight.dtype.name, 0, size, size, reason, wanted
    )
