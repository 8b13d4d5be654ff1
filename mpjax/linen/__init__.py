"""mpjax for Flax Linen: handlers for layer types. `mpjax.wrap` is the front door."""

from ._handlers import Call as Call
from ._handlers import Handler as Handler
from ._handlers import default as default
from ._handlers import register as register
from ._layer import Layer as Layer
from ._layer import lent as lent
