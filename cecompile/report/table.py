"""The terminal's table and progress bars."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from cecompile.errors import printable
from cecompile.report.clock import PHASES


@contextmanager
def progress_bars(console: Console) -> Iterator[Any]:
    """A callable (phase, done, total) that draws a bar per phase; draws nothing where there is no terminal."""
    columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def show(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done, total=total)

        yield show


def print_results(console: Console, results: dict[str, Any], output: Path) -> None:
    """The run's score, clock and plan."""
    model, environment = results["model"], results["environment"]
    table = _table()
    _row(table, "model", "", f"{_short(model['name'])} ({model['architecture']}, {model['dtype']})")
    _row(table, "data", "", f"{_short(results['data']['name'])} ({results['task']}, {results['questions']} questions)")
    _row(table, "device", "", environment["device"])
    if results["engine"]["note"]:
        _row(table, "note", "", results["engine"]["note"])
    if results["truncated_questions"]:
        _row(table, "truncated", str(results["truncated_questions"]), "questions cut on the left to fit the model")
    table.add_section()
    _metrics(table, results["metrics"])
    table.add_section()
    for phase in PHASES:
        _row(table, phase, f"{results['phases_s'][phase]:.2f} s", "")
    table.add_section()
    for name, seconds in results["latency_s"].items():
        mark = "<- headline" if name == results["headline"]["clock"] else ""
        _row(table, f"latency {name}", f"{seconds:.2f} s", mark)
    if results["plan"] is not None:
        table.add_section()
        _plan_rows(table, results["plan"])
    console.print(table)
    console.print(Text(f"results in {printable(str(output))}"))


def print_plan(console: Console, plan: dict[str, Any]) -> None:
    """A plan's counts (results.json's `plan`)."""
    table = _table()
    _plan_rows(table, plan)
    console.print(table)


def _plan_rows(table: Table, plan: dict[str, Any]) -> None:
    useful, unshared = plan["useful_tokens"], plan["unshared_tokens"]
    _row(table, "useful tokens", f"{useful:,}", f"{unshared / useful:.2f} times fewer than one sequence per choice")
    floor = plan["prefix_tree_tokens"]
    _row(table, "prefix tree", f"{floor:,}", f"the floor; useful tokens are {100 * (useful / floor - 1):.1f} % above")
    _row(table, "slots", f"{plan['slots']:,}", f"{100 * useful / plan['slots']:.1f} % filled")
    for b in plan["buckets"]:
        shape = f"{b['rows']} x {b['length']} tokens, {b['readouts']} readouts"
        _row(table, "bucket", f"{b['runs']:,} runs", shape)


def _table() -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column()
    return table


def _metrics(table: Table, metrics: dict[str, float | None]) -> None:
    for name in ("acc", "acc_norm"):
        value, error = metrics[name], metrics[f"{name}_stderr"]
        shown = "no labels" if value is None else f"{value:.4f}"
        _row(table, name, shown, "" if error is None else f"± {error:.4f}")


def _row(table: Table, name: str, value: str, note: str) -> None:
    table.add_row(name, Text(printable(value)), Text(printable(note)))


def _short(name: str) -> str:
    """The last parts of a path; hub ids stay whole."""
    parts = Path(name).parts
    return name if len(parts) <= 2 else str(Path(*parts[-2:]))
