"""What `quantize` did to each weight of a model, and why it left some as they were."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Rounding:
    """How a weight came to be rounded.

    Attributes:
      method: that was tried, `"smoothquant"`, `"awq"` or `"gptq"`; None: none.
      plain_error: of the layer's outputs when the weight is rounded to nearest, on the calibration
        data, in units of their root mean square; over all layers of a stack.
      error: the same, as the weight is stored now.
      note: what is to be said of it: that plain rounding was better and so was kept, or why a
        method that was asked for was not tried.
    """

    method: str | None = None
    plain_error: float | None = None
    error: float | None = None
    note: str = ""

    def __str__(self) -> str:
        errors = ""
        if self.plain_error is not None:
            errors = f"{self.method}: error {self.plain_error:.2%} -> {self.error:.2%}"
        return "; ".join(part for part in (errors, self.note) if part)


PLAIN = Rounding()


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
      rounding: by which method it was rounded, and the errors with and without.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    scales: int
    bytes_before: int
    bytes_after: int
    reason: str | None = None
    wanted: bool = True
    rounding: Rounding = PLAIN


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
            size, why = f"{each.bytes_after / 1e6:.3g}", each.reason or str(each.rounding)
            rows.append((each.path, shape, each.dtype, str(each.scales or ""), size, why))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        cells = [[cell.ljust(w) for cell, w in zip(row, widths, strict=True)] for row in rows]
        before = sum(each.bytes_before for each in self.weights)
        after = sum(each.bytes_after for each in self.weights)
        left = sum(each.reason is not None for each in self.weights)
        total = f"{before / 1e6:.3g} MB -> {after / 1e6:.3g} MB, {left} left as they were"
        return "\n".join([*("  ".join(row).rstrip() for row in cells), total])


def quantized_weight(
    path: str, before: Any, after: Any, rounding: Rounding = PLAIN
) -> QuantizedWeight:
    """The row of a weight that was quantized."""
    return QuantizedWeight(
        path,
        after.shape,
        after.format.name,
        after.scale.size,
        before.nbytes,
        after.nbytes,
        rounding=rounding,
    )


def left_weight(path: str, weight: Any, reason: str, *, wanted: bool) -> QuantizedWeight:
    """The row of a weight that stayed as it was."""
    size = weight.size * weight.dtype.itemsize
    return QuantizedWeight(
        path, tuple(weight.shape), weight.dtype.name, 0, size, size, reason, wanted
    )
