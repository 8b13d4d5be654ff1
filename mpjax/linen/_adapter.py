"""What `mpjax` calls for a Linen module."""

from ._function import as_function as as_function
from ._quantize import init_scaling as init_scaling
from ._quantize import layer_policies as layer_policies
from ._quantize import quantize as quantize
from ._quantize import unquantized as unquantized
from ._wrap import is_wrapped as is_wrapped
from ._wrap import policy_of as policy_of
from ._wrap import unwrap as unwrap
from ._wrap import wrap as wrap
