"""The quantized convolution that wrapped layers dispatch to; `_products.py` says how it works."""

from typing import Any

import jax

import mpjax_kernels as mk

from ._context import Product
from ._decisions import Decision
from ._products import QuantizedProduct, refuse_out_sharding
from ._roofline import NO_SIZE, ProductSize

_IN_8_BITS = ("native", "cpu", "xla")  # all but "reference"


class QuantizedConv(QuantizedProduct):
    """`lax.conv_general_dilated(activation, kernel)` in 8 bits; fields as the others'."""

    def __call__(
        self,
        lhs: jax.Array,
        rhs: jax.Array | mk.QTensor,
        window_strides: Any,
        padding: Any,
        lhs_dilation: Any = None,
        rhs_dilation: Any = None,
        dimension_numbers: Any = None,
        feature_group_count: int = 1,
        precision: Any = None,
        preferred_element_type: Any = None,
        out_sharding: Any = None,
    ) -> jax.Array:
        """Same arguments as `jax.lax.conv_general_dilated`."""
        refuse_out_sharding(out_sharding)
        spec = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        summed = tuple(sorted(spec.rhs_spec[1:]))
        product = Product("kernel", tuple(rhs.shape), summed, is_conv=True)
        options = {
            "lhs_dilation": lhs_dilation,
            "rhs_dilation": rhs_dilation,
            "dimension_numbers": dimension_numbers,
            "feature_group_count": feature_group_count,
            "precision": precision,
            "preferred_element_type": self._result_dtype(preferred_element_type),
        }
        size = self._conv_size(lhs, rhs, window_strides, padding, spec, **options)
        self._observe(size, rhs, product)
        decision = self._decision(rhs, summed, size)
        with decision.scope():
            return self._convolve(decision, lhs, rhs, window_strides, padding, spec, **options)

    def _conv_size(
        self,
        lhs: jax.Array,
        rhs: Any,
        window_strides: Any,
        padding: Any,
        spec: jax.lax.ConvDimensionNumbers,
        **options: Any,
    ) -> ProductSize:
        """The sizes of the convolution, where they decide anything."""
        if self.profitable_on is None:
            return NO_SIZE

        def convolve(x: jax.Array, w: jax.Array) -> jax.Array:
            return jax.lax.conv_general_dilated(x, w, window_strides, padding, **options)

        x, w = (jax.ShapeDtypeStruct(each.shape, self.compute_dtype) for each in (lhs, rhs))
        output = jax.eval_shape(convolve, x, w).shape
        return ProductSize.of_conv(lhs.shape, rhs.shape, spec.rhs_spec[1:], output)

    def _convolve(
        self,
        decision: Decision,
        lhs: jax.Array,
        rhs: jax.Array | mk.QTensor,
        window_strides: Any,
        padding: Any,
        spec: jax.lax.ConvDimensionNumbers,
        **options: Any,
    ) -> jax.Array:
        how = {"implementation": _IN_8_BITS, **options}
        if isinstance(rhs, mk.QTensor):
            x = self._activation(lhs, rhs, tuple(sorted(spec.lhs_spec[1:])))
            return mk.conv_general_dilated(x, rhs, window_strides, padding, **how)
        observed = self._calibrating(lhs, rhs, (), ())
        if observed is not None:
            return jax.lax.conv_general_dilated(lhs, observed, window_strides, padding, **options)
        if decision.is_left:
            rhs = rhs.astype(lhs.dtype)
            return jax.lax.conv_general_dilated(lhs, rhs, window_strides, padding, **options)
        product = mk.quantized_conv_general_dilated
        return self._trained(product, lhs, rhs, window_strides, padding, **how)
