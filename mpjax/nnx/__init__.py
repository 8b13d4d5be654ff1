"""mpjax for Flax NNX: training, and rules for layer types. `mpjax.wrap` is the front door."""

from ._gradients import accumulate_gradients as accumulate_gradients
from ._gradients import value_and_grad as value_and_grad
from ._optimizer import Optimizer as Optimizer
from ._rules import Attributes as Attributes
from ._rules import computes_in as computes_in
from ._rules import register as register
from ._states import LossScale as LossScale
from ._states import Scaling as Scaling
