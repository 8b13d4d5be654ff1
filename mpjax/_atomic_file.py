"""A file that is there whole, or not at all."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from io import BufferedWriter
from pathlib import Path


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BufferedWriter]:
    """Opens a new file for writing that takes the place of `path` once it is on disk.

    Until then, and for good if the body raises or the process dies, what was at `path` stays. A
    process that dies leaves a hidden `.<name>.<random>.tmp` beside it.

    Raises:
      FileNotFoundError: the folder does not exist.
      IsADirectoryError: `path` is a folder.
      FileExistsError: `path` is a device, a pipe or a socket.
    """
    path = Path(os.path.realpath(path))  # a link stays one, and its target is replaced
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the path of the file to write")
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{path} is a device, a pipe or a socket: give the path of a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} in")
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with beside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError):  # no space, or no right to write there
            error.add_note(f"{path} could not be written; what was there before is as it was")
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes a new name in a folder outlast a power failure; Windows has no such call."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
