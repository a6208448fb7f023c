"""``fastprefix tasks``."""

from __future__ import annotations

from rich.table import Table

from fastprefix.cli.console import console
from fastprefix.tasks.encoding import task_types
from fastprefix.tasks.registry import TASKS, get_task
from fastprefix.tasks.task import Classification, HubSource, PackageSource, Task


def show_tasks(name: str | None) -> None:
    """Prints one line a task, or all about one."""
    if name is None:
        table = Table("task", "what", "data", box=None, pad_edge=False)
        for task in TASKS.values():
            table.add_row(task.name, task.doc, _source(task))
        console.print(table)
        return
    task = get_task(name)
    told = {
        "task": f"{task.name}: {task.doc}",
        "data": _source(task),
        "columns": ", ".join(task.columns),
        "models": ", ".join(task_types(task)),
        "metrics": ", ".join(task.metrics),
    }
    if isinstance(task, Classification):
        told["labels"] = ", ".join(task.labels)
    table = Table(show_header=False, box=None, pad_edge=False)
    for what, value in told.items():
        table.add_row(what, value)
    console.print(table)


def _source(task: Task) -> str:
    source = task.source
    if isinstance(source, HubSource):
        return source.path if source.config is None else f"{source.path} ({source.config})"
    if isinstance(source, PackageSource):
        return f"the package {source.package}"
    return "files of your own"
