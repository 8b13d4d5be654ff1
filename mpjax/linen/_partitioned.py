"""Boxes of partition names around a stored weight: the values take the names, and so do the scales.

Flax' boxes give one specification to all that is in them, which a scale per output channel, of
size 1 along the inputs, cannot be cut by. These give one to each array: a scale and a zero point
keep the names of the axes along which they have an entry for each of the weight's, and are
replicated along the others.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
from flax.core import meta
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import mpjax_kernels as mk

from .._prescaled import PreScaledWeight


def boxed_like(box: Any, weight: mk.QTensor | PreScaledWeight) -> Any:
    """A stored weight in the box that its float weight was in; itself, if that was in none."""
    if not isinstance(box, meta.AxisMetadata):
        return weight
    kind = next((kind for kind in _KINDS if kind._box is type(box)), None)
    if kind is None:  # a box of the user's own, which says itself what it does with its content
        return box.replace_boxed(weight)
    fields: dict[str, Any] = {name: getattr(box, name) for name in kind.__dataclass_fields__}
    fields["value"] = weight
    return kind(**fields)


class _PerArray:
    """What both kinds of box do with a `QTensor`; `_box` is Flax' own class of one array."""

    _box: Any

    def _arrays(self, change: Any) -> Any:
        """The weight with `change(box)` in place of each array, given in a box of its own names."""
        this: Any = self
        fields = {field.name: getattr(this, field.name) for field in dataclasses.fields(this)}
        q, names = this.value, tuple(this.names)
        names += (None,) * (q.ndim - len(names))

        def of(shape: tuple[int, ...]) -> tuple[Any, ...]:
            pairs = zip(names, shape, q.shape, strict=True)
            return tuple(name if n == m else None for name, n, m in pairs)

        of_scale = of(q.scale.shape)
        lead = q.ndim - len(q.layout or ())
        stored = (*names[:lead], *(names[axis] for axis in q.layout or ()))
        stored += (None,) * len(q.tiles)
        arrays = {"values": stored, "scale": of_scale, "zero_point": of_scale}
        is_prescaled = isinstance(q, PreScaledWeight)
        if is_prescaled:
            arrays["pre_quant_scale"] = of(q.pre_quant_scale.shape)
        changed = {
            part: change(self._box(**fields | {"value": getattr(q, part), "names": own}))
            for part, own in arrays.items()
            if getattr(q, part) is not None
        }
        if not is_prescaled:
            return dataclasses.replace(q, **changed)
        factor = changed.pop("pre_quant_scale")
        return PreScaledWeight(dataclasses.replace(q.quantized, **changed), factor)

    def unbox(self, apply_constraint: bool = True) -> Any:
        """The weight, each array constrained by its own names where a mesh is in force."""
        return self._arrays(lambda box: box.unbox(apply_constraint))

    def get_partition_spec(self) -> Any:
        """This box with a `PartitionSpec` in place of each array: of the same structure as it."""
        this: Any = self
        return this.replace(value=self._arrays(lambda box: PartitionSpec(*box.names)))

    def get_sharding(self, mesh: Mesh) -> Any:
        """The same with a `NamedSharding` on a mesh."""
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), self.get_partition_spec())


class QuantizedPartitioned(_PerArray, nn.Partitioned):
    """`nn.Partitioned` of a `QTensor`."""

    _box = nn.Partitioned


class QuantizedLogicallyPartitioned(_PerArray, nn.LogicallyPartitioned):
    """`nn.LogicallyPartitioned` of a `QTensor`."""

    _box = nn.LogicallyPartitioned


_KINDS = (QuantizedPartitioned, QuantizedLogicallyPartitioned)
