"""Quantized arrays and the products between them: arrays in, arrays out, JAX only."""

from ._conv import conv_general_dilated as conv_general_dilated
from ._dot_formats import DotFormats as DotFormats
from ._dot_formats import OperandFormat as OperandFormat
from ._dot_general import dot_general as dot_general
from ._einsum import contracting_axes as contracting_axes
from ._einsum import einsum as einsum
from ._embedding import embedding_lookup as embedding_lookup
from ._formats import Format as Format
from ._formats import float8_e4m3fn as float8_e4m3fn
from ._formats import float8_e4m3fnuz as float8_e4m3fnuz
from ._formats import float8_e5m2 as float8_e5m2
from ._formats import float8_e5m2fnuz as float8_e5m2fnuz
from ._formats import get_format as get_format
from ._formats import int4 as int4
from ._formats import int8 as int8
from ._matmul import matmul as matmul
from ._qtensor import QTensor as QTensor
from ._qtensor import validate as validate
from ._quantize import dequantize as dequantize
from ._quantize import quantize as quantize
from ._quantized_dot import DotScales as DotScales
from ._quantized_dot import quantized_dot_general as quantized_dot_general
from ._quantized_matmul import quantized_matmul as quantized_matmul
from ._ragged_dot import ragged_dot as ragged_dot
from ._storage import contiguous as contiguous
