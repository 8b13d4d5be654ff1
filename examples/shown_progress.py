"""How far an example is: bars in a terminal; in a pipe or a file a line for each tenth, at once."""

import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

_PARTS = 10


class ShownProgress(Progress):
    """Rich's `Progress`, which by itself prints nothing before the end if it is no terminal."""

    def __init__(self, console: Console):
        columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
        is_terminal = console.is_terminal
        super().__init__(*columns, console=console, refresh_per_second=2, disable=not is_terminal)
        self._lines = not is_terminal
        self._told: dict[TaskID, int] = {}
        self._started = time.perf_counter()

    def add_task(self, description: str, *args: Any, **kwargs: Any) -> TaskID:
        task = super().add_task(description, *args, **kwargs)
        self._tell(task)
        return task

    def update(self, task_id: TaskID, *args: Any, **kwargs: Any) -> None:
        super().update(task_id, *args, **kwargs)
        self._tell(task_id)

    def _tell(self, task_id: TaskID) -> None:
        """Prints a line where a task has come a tenth further, and where bars are not shown."""
        task = self._tasks[task_id]
        part = int(_PARTS * task.completed / task.total) if task.total else _PARTS
        if not self._lines or part == self._told.get(task_id):
            return
        self._told[task_id] = part
        seconds = time.perf_counter() - self._started
        self.console.print(
            f"{seconds:5.0f} s  {part / _PARTS:4.0%}  {task.description}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
