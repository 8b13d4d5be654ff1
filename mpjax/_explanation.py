"""What `explain` returns: a row for every product, the totals, and how they are printed."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from ._explanation_table import table

# In one word, why a product is not in 8 bits, and what that means.
REASONS = {
    "": "multiplied in 8 bits",
    "policy": "the policy leaves it: another layer, attention, or a gradient",
    "weights": "only its weight is in few bits, and is multiplied by wider activations",
    "unmatched": "no key of the policy map matches the layer, and its default is not quantized",
    "island": "the layer computes in a wider dtype than those around it",
    "author": "the layer's author gave it a dtype or a product of its own",
    "refused": "the layer's shape or settings do not go into the 8-bit product or format",
    "unquantized": "the policy stores its weight in few bits, but it is floats: call mp.quantize",
    "unprofitable": "8 bits would cost time, and the model is wrapped with when='profitable'",
    "outside": "it is in no layer that a policy reaches: it was written with jax itself",
    "dequantized": "its weight is stored in few bits, and was made floats before the product",
    "emulated": "the target has no unit for these operands, and computes in wider ones",
}
_NO_MISS = ("", "policy", "weights", "unprofitable")


def check_min_flops(min_flops: float) -> None:
    """Raises ValueError unless it is a part of the whole."""
    if not isinstance(min_flops, float | int) or not 0 <= min_flops <= 1:
        raise ValueError(
            f"`min_flops` = {min_flops!r} must be a number from 0 to 1: it is a part of the whole"
        )


@dataclasses.dataclass(frozen=True)
class ExplainedProduct:
    """One matrix product or convolution of a compiled program.

    Attributes:
      path: of its module in the wrapped model; from the outermost module where none is wrapped;
        empty outside of all modules.
      line: the innermost line of the user's source, `"model.py:12"`; empty if it is not known.
      direction: `"forward"`, `"backward"`, or `"recomputed"`: the forward pass once more.
      lhs: dtype of the left operand as it is multiplied, `"int8"`.
      rhs: of the right operand.
      unit: what multiplies: `"MXU"`, `"vector"` (the vector unit of a TPU), `"Pallas"`, `"Triton"`,
        `"XLA"`, or the library call it reached, such as `"cublas$lt$matmul$f8"`.
      flops: operations of all its runs (a multiplication and an addition are two); None for a
        custom call that does not say.
      times: how often it runs: in a scan over layers, their number.
      weight_bytes: bytes of the program's arguments that the operands are made of, all runs: the
        weight as it is stored, and in a first layer the input too.
      padding_bytes: how many of these hold no value, and how much padded copies are larger.
      transposed_bytes: of copies in memory that hold an operand transposed.
      dequantized_bytes: of copies in main memory that hold a stored operand as wider numbers.
      reason: why it is not in 8 bits, a word of `mpjax.REASONS`; empty if it is.
      cycles: of a TPU, by the compiler's estimate, with all that is fused with it; else None.
      instruction: its name in the compiled program.
      quantizes_weight: whether it is in 8 bits, of a weight that is stored as floats and quantized
        at every call, as in training; told by the wrapped model.
    """

    path: str
    line: str
    direction: str
    lhs: str
    rhs: str
    unit: str
    flops: int | None
    times: int
    weight_bytes: int
    padding_bytes: int
    transposed_bytes: int
    dequantized_bytes: int
    reason: str
    cycles: int | None
    instruction: str
    quantizes_weight: bool

    @property
    def is_miss(self) -> bool:
        """Whether it is not in 8 bits although the policy, or the model's owner, expects it."""
        return self.reason not in _NO_MISS

    @property
    def where(self) -> str:
        """The module path, or the source line where there is none."""
        if self.path and self.reason != "outside":
            return self.path
        return f"{self.path} {self.line}".strip()


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a compiler made of a function, for one device; `str()` and `print` show a table.

    Attributes:
      target: name of the hardware.
      products: every product and convolution, the costliest first.
      bytes_read: from main memory in one run, counted from the program.
      bytes_written: to it.
      estimated_seconds: the compiler's own estimate, not a measurement; None where it gives none,
        or counts the body of a loop once.
      estimated_cycles: the sum over all that runs on a TPU, loops included; else None.
      floor_seconds: no program with these products and these bytes can be faster on the target:
        the larger of its time to multiply and its time to move the bytes, at the vendor's peak.
      memory: bytes of arguments, results and temporary memory, by the compiler's account.
      unknown_loops: loops of unknown length, whose body is counted once.
    """

    target: str
    products: tuple[ExplainedProduct, ...]
    bytes_read: int
    bytes_written: int
    estimated_seconds: float | None
    estimated_cycles: int | None
    floor_seconds: float
    memory: dict[str, int]
    unknown_loops: int

    @property
    def flops(self) -> int:
        """Of all products whose flops are known."""
        return sum(each.flops or 0 for each in self.products)

    @property
    def share_in_8_bits(self) -> float:
        """The part of `flops` that a unit for 8 bits multiplies; 1 if there are none."""
        return _share(self.products)

    @property
    def misses(self) -> tuple[ExplainedProduct, ...]:
        """The products that are not in 8 bits, those that the policy leaves apart."""
        return tuple(each for each in self.products if each.is_miss)

    def assert_quantized(self, min_flops: float = 0.95, *, stored: bool = False) -> None:
        """Fails unless enough of the operations are in 8 bits; see `mp.assert_quantized`.

        Args:
          min_flops: the part of `flops` that must be.
          stored: whether only those count whose weight is stored in 8 bits or fewer, and not those
            that quantize a float weight at every call.

        Raises:
          AssertionError: it is less; the message is a table of the products that are not. Or
            nothing is multiplied.
          ValueError: `min_flops` is not from 0 to 1.
        """
        check_min_flops(min_flops)
        if self.flops == 0 and min_flops > 0:
            raise AssertionError(
                f"the program for {self.target} multiplies nothing, in 8 bits or otherwise: is it "
                "the function that you meant, and is no batch empty?"
            )
        rows = [_as_unquantized(x) for x in self.products] if stored else self.products
        share = _share(rows)
        if share < min_flops:
            offending = [each for each in rows if each.reason != ""]
            of = ", by stored weights," if stored else ""
            raise AssertionError(
                f"{share:.1%} of the operations are in 8 bits{of} on {self.target}, "
                f"less than min_flops = {min_flops:.1%}. These are not:\n{table(offending)}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain Python values."""
        totals = {"flops": self.flops, "share_in_8_bits": self.share_in_8_bits}
        return dataclasses.asdict(self) | totals

    def to_json(self, **options: Any) -> str:
        """`to_dict` as JSON; `options` go to `json.dumps`."""
        return json.dumps(self.to_dict(), **options)

    def __str__(self) -> str:
        return f"{table(self.products)}\n{self.totals()}"

    def __rich__(self) -> Any:
        from ._explanation_table import rich_table

        return rich_table(self.products, caption=self.totals())

    def totals(self) -> str:
        """The totals in a few lines of text."""
        lines = [
            f"{self.target}: {len(self.products)} products, {self.share_in_8_bits:.1%} of "
            f"{self.flops / 1e9:,.3g} GFLOP in 8 bits; {len(self.misses)} missed",
            f"main memory: {self.bytes_read / 1e6:,.4g} MB read, "
            f"{self.bytes_written / 1e6:,.4g} MB written",
            f"floor by the target's peak rates: {self.floor_seconds * 1e6:,.4g} us",
        ]
        floats = sum(each.quantizes_weight for each in self.products)
        if floats:
            lines.append(
                f"{floats} products quantize a float weight at every call, as training does; for "
                "inference mp.quantize stores it in 8 bits"
            )
        if self.estimated_seconds is not None:
            seconds = f"{self.estimated_seconds * 1e6:,.4g} us"
            lines.append(f"the compiler's own estimate, not a measurement: {seconds}")
        if self.estimated_cycles is not None:
            lines.append(f"the compiler's estimate of cycles: {self.estimated_cycles:,}")
        if self.unknown_loops:
            lines.append(f"{self.unknown_loops} loops of unknown length, counted as one turn")
        return "\n".join(lines)


def _share(products: Sequence[ExplainedProduct]) -> float:
    """The part of the operations that is in 8 bits; 1 if there are none."""
    total = sum(each.flops or 0 for each in products)
    quantized = sum(each.flops or 0 for each in products if each.reason == "")
    return quantized / total if total else 1.0


def _as_unquantized(product: ExplainedProduct) -> ExplainedProduct:
    """A row as it counts where weights are to be stored."""
    reason = "unquantized" if product.quantizes_weight else product.reason
    return dataclasses.replace(product, reason=reason)
