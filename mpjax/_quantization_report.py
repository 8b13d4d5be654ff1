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
      prepacked: whether it is stored as native kernels of this CPU read it.
      unpacked: why it is not, although `prepack=True` asked for it; else None.
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
    prepacked: bool = False
    unpacked: str | None = None


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

    @property
    def prepacked(self) -> tuple[QuantizedWeight, ...]:
        """The weights that are stored as native kernels of this CPU read them."""
        return tuple(each for each in self.weights if each.prepacked)

    @property
    def why_none_prepacked(self) -> str | None:
        """Why `prepack=True` changed no weight; None if it did, or was not asked for."""
        reasons = {each.path: each.unpacked for each in self.weights if each.unpacked is not None}
        if self.prepacked or not reasons:
            return None
        (first, *others) = dict.fromkeys(reasons.values())
        if not others:
            return first
        return "".join(f"\n  {path}: {reason}" for path, reason in reasons.items())

    def __str__(self) -> str:
        rows = [("weight", "shape", "stored as", "scales", "MB", "")]
        for each in self.weights:
            shape = "x".join(map(str, each.shape))
            size, why = f"{each.bytes_after / 1e6:.3g}", _remarks(each)
            rows.append((each.path, shape, each.dtype, str(each.scales or ""), size, why))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        cells = [[cell.ljust(w) for cell, w in zip(row, widths, strict=True)] for row in rows]
        before = sum(each.bytes_before for each in self.weights)
        after = sum(each.bytes_after for each in self.weights)
        left = sum(each.reason is not None for each in self.weights)
        total = f"{before / 1e6:.3g} MB -> {after / 1e6:.3g} MB, {left} left as they were"
        packed = len(self.prepacked)
        if packed or any(each.unpacked for each in self.weights):
            total += f", {packed} prepacked"
        return "\n".join([*("  ".join(row).rstrip() for row in cells), total])


def _remarks(weight: QuantizedWeight) -> str:
    """What a table says of a weight beside its numbers."""
    packed = "prepacked" if weight.prepacked else ""
    unpacked = f"not prepacked: {weight.unpacked}" if weight.unpacked else ""
    parts = (weight.reason, str(weight.rounding), packed, unpacked)
    return "; ".join(part for part in parts if part)


def quantized_weight(
    path: str,
    before: Any,
    after: Any,
    rounding: Rounding = PLAIN,
    unpacked: str | None = None,
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
        prepacked=bool(after.tiles),
        unpacked=unpacked,
    )


def left_weight(path: str, weight: Any, reason: str, *, wanted: bool) -> QuantizedWeight:
    """The row of a weight that stayed as it was."""
    size = weight.size * weight.dtype.itemsize
    return QuantizedWeight(
        path, tuple(weight.shape), weight.dtype.name, 0, size, size, reason, wanted
    )
