"""Mixed-precision policies and quantized inference for Flax, Linen and NNX.

`import mpjax as mp` loads neither Flax API; `mp.linen` and `mp.nnx` are loaded when used.
"""

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from ._accumulate import accumulate_gradients as accumulate_gradients
from ._checkpoint import latest_step as latest_step
from ._checkpoint import restore_checkpoint as restore_checkpoint
from ._checkpoint import save_checkpoint as save_checkpoint
from ._export import export as export
from ._export import load_exported as load_exported
from ._flax_float8 import from_flax_float8 as from_flax_float8
from ._foreign_safetensors import load_safetensors as load_safetensors
from ._global_policy import dtype_policy as dtype_policy
from ._global_policy import dtype_policy_scope as dtype_policy_scope
from ._global_policy import set_dtype_policy as set_dtype_policy
from ._gradients import Gradients as Gradients
from ._gradients import value_and_grad as value_and_grad
from ._init_scaling import init_scaling as init_scaling
from ._layer_policies import layer_policies as layer_policies
from ._lazy_array import LazyArray as LazyArray
from ._load import load as load
from ._load import load_policy as load_policy
from ._loss_scale import DynamicLossScale as DynamicLossScale
from ._loss_scale import NoLossScale as NoLossScale
from ._loss_scale import StaticLossScale as StaticLossScale
from ._loss_scale_state import LossScaleState as LossScaleState
from ._loss_scale_state import all_finite as all_finite
from ._loss_scaled import LossScaledState as LossScaledState
from ._loss_scaled import is_loss_scaled as is_loss_scaled
from ._loss_scaled import loss_scale_of as loss_scale_of
from ._loss_scaled import loss_scaled as loss_scaled
from ._modes import Mode as Mode
from ._modes import modes as modes
from ._observers import MSE as MSE
from ._observers import AbsMax as AbsMax
from ._observers import Entropy as Entropy
from ._observers import MovingAverage as MovingAverage
from ._observers import Percentile as Percentile
from ._open_weights import open_weights as open_weights
from ._policy import DTypePolicy as DTypePolicy
from ._policy import FloatDTypePolicy as FloatDTypePolicy
from ._policy_map import DTypePolicyMap as DTypePolicyMap
from ._policy_map import FrozenDTypePolicyMap as FrozenDTypePolicyMap
from ._prescaled import PreScaledWeight as PreScaledWeight
from ._quantization_report import QuantizationReport as QuantizationReport
from ._quantization_report import QuantizedWeight as QuantizedWeight
from ._quantization_report import Rounding as Rounding
from ._quantize import quantize as quantize
from ._quantized_policy import QuantizedDTypePolicy as QuantizedDTypePolicy
from ._quantized_policy import QuantizedFloat8DTypePolicy as QuantizedFloat8DTypePolicy
from ._requantize import RequantizationReport as RequantizationReport
from ._requantize import RequantizedWeight as RequantizedWeight
from ._roofline import ProductSize as ProductSize
from ._roofline import Roofline as Roofline
from ._roofline import roofline as roofline
from ._safetensors import ModelFileError as ModelFileError
from ._save import save as save
from ._scaling import CurrentScaling as CurrentScaling
from ._scaling import DelayedScaling as DelayedScaling
from ._scaling import ScalingState as ScalingState
from ._scaling import StaticScaling as StaticScaling
from ._scaling import observe_scaling as observe_scaling
from ._scaling import update_scaling as update_scaling
from ._serialize import deserialize as deserialize
from ._serialize import get_policy as get_policy
from ._serialize import serialize as serialize
from ._target import Target as Target
from ._target import resolve_target as resolve_target
from ._target import targets as targets
from ._train_state import TrainState as TrainState
from ._wrap import unwrap as unwrap
from ._wrap import wrap as wrap

if _TYPE_CHECKING:
    from . import linen as linen
    from . import nnx as nnx

__version__ = "0.1.0"


def __getattr__(name: str) -> _Any:
    if name in ("linen", "nnx"):
        return _importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'mpjax' has no attribute '{name}'")
