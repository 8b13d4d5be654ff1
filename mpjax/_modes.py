"""Quantization modes: which formats and scales each mode string stands for.

A mode string, such as `int8` or `int4/128`, is parsed once into a `Mode`; everything after that
reads the `Mode` and no string again. The long form (`activations=`, `granularity=`, ...) selects
among the variants of a bare mode name, so both forms end at the same `Mode`.
"""

import dataclasses
import re
from collections.abc import Sequence

import jax

# What `scaling=`, the word of the training literature, says of the activations.
_ACTIVATIONS = {"delayed": "delayed", "current": "dynamic", "static": "static"}
_GROUPED = {
    "int4": "int4/<group_size>",
    "w4a8": "w4a8/<group_size>",
    "gptq": "gptq/4/<group_size>",
    "awq": "awq/4/<group_size>",
}
# The families that round to nearest, and when they find the scale of an activation.
_ROUNDED = {"int4": "none", "w4a8": "dynamic"}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Mode:
    """How one quantization mode stores weights and treats activations.

    Attributes:
        name: The canonical mode string, such as `"int8_static"` or `"int4/128"`.
        weights: The storage format of the weights: `"int8"`, `"int4"`, `"float8_e4m3fn"`, or
            `"auto8"`, which `DTypePolicy.resolve` makes one of int8 and float8.
        activations: When the scale of an activation is found. `"dynamic"`: at every call, from
            the activation at hand (current scaling); `"static"`: by calibration; `"delayed"`: from
            the amaxes of earlier steps; `"none"`: activations stay in the compute dtype
            (weight-only).
        granularity: What shares one scale. `"tensor"`; `"row"` (each row of the activations, each
            output channel of the weights); `"channel"` (each output channel of the weights, and
            each row of dynamic activations); `"group"` (`group_size` weights along the contracted
            axis, and each row of dynamic activations); `"128x128"` (a block of the weights).
        group_size: Weights per scale along the contracted axis, -1 for all of them, None for a
            mode that is not grouped.
        symmetric: Whether zero is stored as zero, without a zero point.
        method: `"gptq"` or `"awq"` if a calibration method chooses the weights, else None.
    """

    name: str
    weights: str
    activations: str
    granularity: str
    group_size: int | None = None
    symmetric: bool = True
    method: str | None = None

    @property
    def family(self) -> str:
        """The part of the name before the first slash, such as `"int4"` or `"int8_static"`."""
        return self.name.partition("/")[0]

    @property
    def activation_format(self) -> str | None:
        """What activations are quantized to: int8 beside int4, else as weights; None for none."""
        if self.activations == "none":
            return None
        return "int8" if self.weights == "int4" else self.weights


AUTO8 = "auto8"
_VARIANTS = {
    "int8": (
        Mode("int8", "int8", "dynamic", "channel"),
        Mode("int8_static", "int8", "static", "channel"),
        Mode("int8_weight_only", "int8", "none", "channel"),
        Mode("int8_delayed", "int8", "delayed", "tensor"),
    ),
    "float8": (
        Mode("float8", "float8_e4m3fn", "delayed", "tensor"),
        Mode("float8_current", "float8_e4m3fn", "dynamic", "tensor"),
        Mode("float8/row", "float8_e4m3fn", "dynamic", "row"),
        Mode("float8/128x128", "float8_e4m3fn", "dynamic", "128x128"),
    ),
    AUTO8: (
        Mode("auto8", AUTO8, "dynamic", "channel"),
        Mode("auto8_delayed", AUTO8, "delayed", "tensor"),
    ),
}
# What they mean on hardware that multiplies the one or the other; both scale the same way.
RESOLVED: dict[str, dict[str | None, str]] = {
    "auto8": {"int8": "int8", "float8_e4m3fn": "float8/row"},
    "auto8_delayed": {"int8": "int8_delayed", "float8_e4m3fn": "float8"},
}
_FIXED = {mode.name: mode for variants in _VARIANTS.values() for mode in variants}


def modes() -> tuple[Mode, ...]:
    """Returns one `Mode` per mode that mpjax can name.

    Group sizes are free: `int4/128` stands for `int4/<any positive size>`.
    """
    whole = (_grouped_mode(name, -1) for name in _ROUNDED)
    grouped = (_grouped_mode(name, 128) for name in _GROUPED)
    return (*_FIXED.values(), *whole, *grouped)


def parse_mode(
    mode: str,
    *,
    activations: str | None = None,
    scaling: str | None = None,
    granularity: str | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
) -> Mode:
    """Parses a mode string and the long-form keywords into one `Mode`.

    Args:
        mode: A mode string, such as `"int8"`, `"int8_static"`, `"int4/128"` or `"float8/row"`.
        activations: See `Mode.activations`; None leaves it to `mode`.
        scaling: `"delayed"`, `"current"` or `"static"`: another way to give `activations`, for
            which "current" is "dynamic".
        granularity: See `Mode.granularity`; None leaves it to `mode`.
        group_size: See `Mode.group_size`; None leaves it to `mode`.
        symmetric: See `Mode.symmetric`; None leaves it to `mode`.

    Returns:
        The one mode on which the string and the keywords agree.

    Raises:
        ValueError: If the mode is unknown, its group size or bits are not supported, or the
            keywords contradict it.
    """
    if scaling is not None and scaling not in _ACTIVATIONS:
        raise ValueError(f"`scaling` must be one of {(*_ACTIVATIONS,)}. Received: {scaling!r}")
    wanted_activations = _ACTIVATIONS[scaling] if scaling is not None else activations
    if activations not in (None, wanted_activations):
        raise ValueError(
            f"`scaling`={scaling!r} means activations={wanted_activations!r}, but "
            f"activations={activations!r} was given too. Give one of them."
        )
    keywords = {
        "activations": wanted_activations,
        "granularity": granularity,
        "group_size": group_size,
        "symmetric": symmetric,
    }
    wanted = {key: value for key, value in keywords.items() if value is not None}
    candidates = _candidates(mode, group_size)
    matches = [
        candidate
        for candidate in candidates
        if all(getattr(candidate, key) == value for key, value in wanted.items())
    ]
    # What there is no word about is as the mode has it by itself, the granularity at least.
    alike = [match for match in matches if match.granularity == candidates[0].granularity]
    unsaid = [key for key in ("activations", "symmetric") if key not in wanted]
    most = [m for m in alike if all(getattr(m, k) == getattr(candidates[0], k) for k in unsaid)]
    for found in (most, alike, matches):
        if found and (found[0] is candidates[0] or len(found) == 1):
            return found[0]
    found = "does not support" if not matches else "is ambiguous with"
    raise ValueError(
        f"Quantization mode={mode!r} {found} {_call_style(wanted)}. Its variants are: "
        f"{'; '.join(_describe(candidate) for candidate in matches or candidates)}."
    )


def _candidates(mode: str, group_size: int | None) -> Sequence[Mode]:
    """Returns the modes that the string `mode` may mean, the one it means by itself first."""
    family, *parts = mode.split("/") if isinstance(mode, str) else ("",)
    if family in _GROUPED:
        return _grouped_candidates(mode, family, parts, group_size)
    if mode in _VARIANTS:
        return _VARIANTS[mode]
    if mode in _FIXED:
        return (_FIXED[mode],)
    raise ValueError(
        f"Invalid quantization mode. Expected one of {(*_FIXED, *_GROUPED.values())}. "
        f"Received: mode={mode}"
    )


def _grouped_candidates(
    mode: str, family: str, parts: Sequence[str], group_size: int | None
) -> Sequence[Mode]:
    """Returns the candidates of `int4[/group]`, `w4a8[/group]` and `gptq` or `awq/bits/group`."""
    if not parts and group_size is not None:
        size = _parse_group_size(group_size, mode)
    elif family in _ROUNDED and len(parts) <= 1:
        size = _parse_group_size(parts[0] if parts else -1, mode)
    elif family not in _ROUNDED and len(parts) == 2:
        if parts[0] != "4":
            raise ValueError(
                f"Quantization mode={mode!r} asks for {parts[0]!r} bits, but only 4 bits are "
                f"supported. Use {_GROUPED[family]!r}."
            )
        size = _parse_group_size(parts[1], mode)
    else:
        raise ValueError(
            f"Invalid quantization mode. Expected the form {_GROUPED[family]!r}. "
            f"Received: mode={mode}"
        )
    if family not in _ROUNDED:
        return (_grouped_mode(family, size),)
    families = ("int4", "w4a8") if family == "int4" else (family,)
    found = [_grouped_mode(name, size) for name in families]
    return [m if s else dataclasses.replace(m, symmetric=s) for m in found for s in (True, False)]


def _grouped_mode(family: str, group_size: int) -> Mode:
    """Returns the 4-bit mode of a family, with one scale per `group_size` weights."""
    return Mode(
        name=_GROUPED[family].replace("<group_size>", str(group_size)),
        weights="int4",
        activations=_ROUNDED.get(family, "none"),
        granularity="channel" if group_size == -1 else "group",
        group_size=group_size,
        method=None if family in _ROUNDED else family,
    )


def _parse_group_size(group_size: str | int, mode: str) -> int:
    """Returns a group size as an int; Keras' older spelling `None` means -1."""
    text = str(group_size)
    if text == "None":
        return -1
    if re.fullmatch(r"-1|[1-9][0-9]*", text) is None:
        raise ValueError(
            f"Quantization mode={mode!r} has group_size={group_size!r}: it must be a positive "
            "integer, or -1 for one scale per output channel."
        )
    return int(text)


def _describe(mode: Mode) -> str:
    fields = dataclasses.asdict(mode)
    shown = {key: fields[key] for key in ("activations", "granularity", "group_size", "symmetric")}
    return f"{mode.name!r} ({_call_style(shown)})"


def _call_style(keywords: dict[str, object]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in keywords.items())
