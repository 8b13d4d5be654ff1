"""The files of a run: whatever is killed when, what lies in its folder can be continued.

    run.json                      what was asked for; another run is not continued in its place
    <policy>/history.jsonl        loss and seconds of each step; it may be ahead of the checkpoint
    <policy>/checkpoints/<step>   `mp.save_checkpoint`
    <policy>/result.json          there once the policy is trained and scored
    train_float8.png              the loss curves

JSON files are written beside their place and renamed into it, so there is never half of one. Of
the history, which grows line by line, as much is kept as the restored checkpoint has steps.
"""

import json
import os
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """The value in a JSON file, or None where there is no file."""
    return json.loads(path.read_text()) if path.exists() else None


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file that appears whole or not at all."""
    write_whole(path, json.dumps(value, indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes a text file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text)
    os.replace(temporary, path)


class History:
    """Loss and seconds of each step, in a file with a line for each.

    Args:
      path: the file; made where there is none.
      steps: how many lines to keep, those of the checkpoint that training continues from.
    """

    def __init__(self, path: Path, steps: int):
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        if len(lines) < steps:
            raise ValueError(
                f"`{path}` has {len(lines)} steps, but the checkpoint beside it is of step {steps}:"
                f" a part of the run is missing; remove `{path.parent}` to train this policy anew"
            )
        write_whole(path, "".join(lines[:steps]))
        self._file = path.open("a")

    def append(self, loss: float, seconds: float | None) -> None:
        """Adds a step: its loss in bits per byte; its seconds, None for one that compiled."""
        self._file.write(json.dumps({"loss": loss, "seconds": seconds}) + "\n")

    def flush(self) -> None:
        """Hands what was added to the operating system, where a kill cannot reach it."""
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_history(path: Path) -> tuple[list[float], list[float]]:
    """The losses of all steps, and the seconds of those that did not compile."""
    steps = [json.loads(line) for line in path.read_text().splitlines()]
    times = [step["seconds"] for step in steps if step["seconds"] is not None]
    return [step["loss"] for step in steps], times
