"""mpjax for Flax NNX: rules for layer types. `mpjax.wrap` is the front door."""

from ._rules import Attributes as Attributes
from ._rules import computes_in as computes_in
from ._rules import register as register
