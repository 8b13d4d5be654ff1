"""`open_weights`: float weights on disk, for `mpjax.quantize` to read one by one."""

from pathlib import Path
from typing import Any

from ._file_path import path_of
from ._lazy_orbax import open_checkpoint
from ._lazy_safetensors import INDEX, open_files


def open_weights(
    path: str | Path, *, step: int | None = None, separator: str | None = None
) -> dict[str, Any]:
    """Opens a checkpoint of float weights, of which nothing is read but names, shapes and dtypes.

        weights = mp.open_weights("model.safetensors")             # nested dicts of LazyArrays
        qvars = mp.quantize(model, {"params": weights}, x)         # Linen
        mp.quantize(abstract_model, weights)                       # NNX

    `mpjax.quantize` reads a weight when its turn comes and keeps what it makes of it, so that a
    model is quantized in the memory of the quantized one plus one layer. The dicts are plain ones:
    take a part of them, leave some out, give keys other names. `LazyArray.read()` reads an array.

    What is at the path:

        *.safetensors               a tree of parameters, its paths the names: "Dense_0/kernel" or
                                    "Dense_0.kernel"; or what `mpjax.save` wrote of float weights
        *.safetensors.index.json    the same in several files (`{"weight_map": {name: file}}`)
        a folder                    an Orbax checkpoint: of a `StandardCheckpointer`, of a PyTree
                                    handler, of a `CheckpointManager`, or of
                                    `mpjax.save_checkpoint` (in which `["variables"]` are those of
                                    a `TrainState`, and `["0"]` is the model of an NNX pair)

    Args:
      path: a file or a folder.
      step: of a folder with several checkpoints, which one; None: the latest.
      separator: between the parts of a name in a safetensors file; None: "/" if a name has one,
        else ".".

    Returns:
      Nested dicts of `LazyArray`s. The keys of lists are texts, `{"blocks": {"0": ...}}`. Scaling
      states and random keys in a file of `mpjax.save` are in it as they are.

    Raises:
      FileNotFoundError: there is no such file, or no checkpoint in the folder.
      ImportError: it is a folder, and Orbax is not installed.
      ModelFileError: it is damaged or of another format, holds quantized weights, or its names
        make no tree. Reading an array raises it too, if the file has changed since.
      ValueError: `step` is given for a file, or `separator` for a folder.
    """
    path = path_of(path)
    is_folder = path.is_dir()
    if step is not None and not is_folder:
        raise ValueError(f"`step` is {step}, but {path} is no folder of checkpoints: leave it out")
    if separator is not None and is_folder:
        raise ValueError(
            f"`separator` is {separator!r}, but {path} is a folder, whose checkpoint knows its "
            f"tree: leave it out, or give a safetensors file or its {INDEX}"
        )
    if is_folder:
        return open_checkpoint(path.absolute(), step)
    return open_files(path, separator)
