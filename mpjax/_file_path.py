"""What a user gives for a path."""

import os
from pathlib import Path
from typing import Any


def path_of(path: Any, name: str = "path") -> Path:
    """A path, of a text or a path; TypeError for anything else, which `name` was given as."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"`{name}` is a {type(path).__name__}, but should be a path: a str or a pathlib.Path"
        )
    return Path(path)
