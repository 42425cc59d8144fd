"""The terminal's table and progress bars."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from cecompile.compile_cache.store import shown
from cecompile.errors import printable
from cecompile.report.units import short_name
from cecompile.results.clock import PHASES


@contextmanager
def progress_bars(console: Console) -> Iterator[Any]:
    """A callable (phase, done, total) that draws a bar per phase; draws nothing where there is no terminal."""
    columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    if not console.is_terminal:  # rich before 14.3 ends bars that are disabled with an empty line
        yield lambda *_: None
        return
    with Progress(*columns, console=console, transient=True) as bars:
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
    _row(table, "model", "", f"{short_name(model['name'])} ({model['architecture']}, {model['dtype']})")
    rows = f"{results['task']}, {results['questions']} questions"
    _row(table, "data", "", f"{short_name(results['data']['name'])} ({rows})")
    _row(table, "device", "", environment["device"])
    if results["ranks"] is not None:
        ranks, stages = results["ranks"], (results["pipeline"] or {"stages": 1})["stages"]
        passes = ranks["passes"][stages - 1 :: stages]
        each = f"each, {stages} stages in a pipeline" if stages > 1 else "each"
        _row(table, "ranks", str(ranks["size"]), f"from {min(passes)} to {max(passes)} passes {each}")
    if results["engine"]["note"]:
        _row(table, "note", "", results["engine"]["note"])
    if results.get("truncated_questions"):
        _row(table, "truncated", str(results["truncated_questions"]), "questions cut on the left to fit the model")
    table.add_section()
    _metrics(table, results["metrics"])
    if results.get("answers", {}).get("tokens") is not None:
        answers = results["answers"]
        _row(table, "in the tree", f"{answers['in_tree']}", f"of {results['questions']} answers, read in the same pass")
        outside = f"of {answers['tokens']:,} tokens written"
        _row(table, "decoded outside", f"{answers['decoded_tokens']:,}", outside)
    table.add_section()
    for phase in PHASES:
        _row(table, phase, f"{results['phases_s'][phase]:.2f} s", "")
    if results["cache"] is not None:
        _row(table, "compile cache", results["cache"]["state"], results["cache"]["reason"])
    if results["inference_s"]["runs"] > 1:
        runs = results["inference_s"]
        _row(
            table, "inference runs", str(runs["runs"]), f"from {runs['min']:.2f} to {runs['max']:.2f} s, median counts"
        )
    table.add_section()
    resumed = results["resumed"]
    if resumed:
        done = f"of passes, begun {resumed['from']}: no latency counts as a headline"
        _row(table, "resumed", f"{resumed['passes']}", done)
    for name, seconds in results["latency_s"].items():
        mark = "<- headline" if name == results["headline"]["clock"] else ""
        mark = "of the rest alone" if resumed else mark
        _row(table, f"latency {name}", f"{seconds:.2f} s", mark)
    if "comparison" in results:
        table.add_section()
        _comparison_rows(table, results["comparison"], results["headline"]["clock"])
    if results["plan"] is not None:
        table.add_section()
        _plan_rows(table, results["plan"])
    if results["streaming"] is not None:
        waited = f"; {results['streaming']['waited_seconds']:.2f} s waited for them"
        _streaming_row(table, results["streaming"], waited)
    console.print(table)
    console.print(Text(f"results in {printable(str(output))}"))


def print_comparison(console: Console, compared: dict[str, Any]) -> None:
    """Two results held against each other (`compare_directories`), and every question on which they differ."""
    table = _table()
    for who in ("reference", "candidate"):
        metrics = compared["metrics"][who].items()
        shown = ", ".join(f"{k} {v:.4f}" for k, v in metrics if v is not None and not k.endswith("_stderr"))
        _row(table, who, "", f"{short_name(compared[who])} ({shown or 'no labels'})")
    _comparison_rows(table, compared, compared["clock"])
    console.print(table)
    if compared["differences"]:
        console.print(_differences(compared))
    for problem in compared["failed"][1:]:  # the first ends the command
        console.print(Text(printable(problem)))


def _comparison_rows(table: Table, comparison: dict[str, Any], clock: str) -> None:
    _row(
        table,
        "compared with",
        comparison["verdict"],
        f"{short_name(comparison['baseline'])}, {comparison['max_drop']} points",
    )
    for metric, drop in comparison["drop_points"].items():
        interval = comparison["interval_points"][metric]
        shown = "no labels" if drop is None else f"{drop:+.2f}"
        between = "points" if interval is None else f"points, 95 % between {interval[0]:+.2f} and {interval[1]:+.2f}"
        _row(table, f"drop of {metric}", shown, "" if drop is None else between)
    _row(table, "agreement", f"{100 * comparison['agreement']:.2f} %", f"{comparison['differing']} answers differ")
    if comparison["largest_difference"] is not None:
        _row(table, "loglikelihoods", f"{comparison['largest_difference']:.2g}", "the largest difference")
    ratios = {clock: comparison["speed_ratio"], "inference": comparison["inference_speed_ratio"]}
    for name, ratio in ratios.items():
        if ratio is not None:
            _row(table, f"speed, {name}", f"{ratio:.2f}", "times the reference's")


def _differences(compared: dict[str, Any]) -> Table:
    """Every question answered differently, with both answers."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("question", "label", "reference", "candidate", "loglikelihoods"):
        table.add_column(name, overflow="fold")
    for one in compared["differences"]:
        far = one["largest_difference"]
        cells = (
            one["id"],
            "" if one["label"] is None else str(one["label"]),
            *(_answer(one[who]) for who in ("reference", "candidate")),
            "" if far is None else f"up to {far:.2g}",
        )
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table


def _answer(answer: dict[str, int] | str) -> str:
    return answer if isinstance(answer, str) else ", ".join(f"{metric}: {choice}" for metric, choice in answer.items())


def print_plan(console: Console, plan: dict[str, Any], estimate: dict[str, Any] | None = None) -> None:
    """A plan's counts (results.json's `plan`), and what running it would take on a device."""
    table = _table()
    _plan_rows(table, plan)
    table.add_section()
    peak = "predicted peak of the fullest stage" if plan["stages"] else "predicted peak"
    for part, size in plan["memory"].items():
        name, note = ("memory", peak) if part == "total" else (f"memory, {part}", "")
        _row(table, name, f"{size / 1e9:.2f} GB", note)
    for number, stage in enumerate(plan["stages"] or ()):
        first, last = stage["layers"]
        note = f"layers {first} to {last - 1}, {stage['weights_bytes'] / 1e9:.2f} GB of weights"
        _row(table, f"stage {number}", f"{stage['total_bytes'] / 1e9:.2f} GB", note)
    if "streaming" in plan:
        _streaming_row(table, plan["streaming"], "")
    if estimate is not None:
        table.add_section()
        _estimate_rows(table, estimate)
    console.print(table)


def print_warmup(console: Console, built: Any, note: str | None) -> None:
    """Prints what `cecompile warm` has built, a `warm_cache.Warmup`."""
    table = _table()
    _row(table, "cache was", built.before[0], built.before[1])
    for shape, seconds in built.seconds.items():
        _row(table, "bucket", f"{seconds:.2f} s", shape)
    for slots, rate in built.measured.items():
        _row(table, f"{slots:,} slots", f"{rate:,.0f}", "useful tokens a second, measured")
    _row(table, "cache holds", f"{built.bytes / 1e6:.1f} MB", "for this model, device and these versions")
    if note:
        _row(table, "note", "", note)
    console.print(table)


def print_cache(console: Console, directory: Path, entries: Sequence[Any]) -> None:
    """The entries of a compile cache (`engine.cache.Summary`)."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("model", "dtype", "device", "torch", "buckets", "size", "built", ""):
        table.add_column(name)
    for entry in entries:
        facts = entry.facts
        built = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.built))
        cells = (
            facts.get("model", entry.key),
            facts.get("dtype", ""),
            facts.get("device", {}).get("name", ""),
            facts.get("versions", {}).get("torch", ""),
            shown(entry.buckets),
            f"{entry.size / 1e6:.1f} MB",
            built,
            entry.problem or "",
        )
        table.add_row(*(Text(printable(cell)) for cell in cells))
    console.print(table)
    console.print(Text(f"{len(entries)} entries in {printable(str(directory))}"))


def _streaming_row(table: Table, streaming: dict[str, Any], more: str) -> None:
    sweeps, passes = streaming["sweeps"], streaming["passes_per_sweep"]
    each = f"{streaming['read_bytes'] / max(1, sweeps) / 1e9:.2f} GB"
    count = "1 sweep" if sweeps == 1 else f"{sweeps} sweeps"
    _row(table, "streamed", count, f"of up to {passes} passes, {each} of weights read in each{more}")


def _estimate_rows(table: Table, estimate: dict[str, Any]) -> None:
    _row(table, f"estimate on {estimate['profile']}", "", f"{estimate['device']}; {estimate['label']}")
    for phase, seconds in estimate["phases_s"].items():
        _row(table, phase.replace("_cold", ", cold").replace("_warm", ", warm cache"), f"{seconds:.1f} s", "estimate")
    if estimate["streaming"] is not None:
        _row(table, "reading", "", f"{estimate['streaming']['verdict']} (estimate)")
    weights = estimate["weights"]
    held, seen = weights["bytes"] / 1e9, weights["memory_bytes"] / 1e9
    room = f"{seen - held:.1f} GB are left for all else" if weights["fit"] else "DO NOT FIT"
    room = room if estimate["streaming"] is None else "streamed"
    _row(table, "weights", f"{held:.1f} GB", f"in 16 bits, in the {seen:.1f} GB that CUDA sees: {room}")
    _row(table, "figures", "", estimate["source"])


def _plan_rows(table: Table, plan: dict[str, Any]) -> None:
    useful, unshared = plan["useful_tokens"], plan["unshared_tokens"]
    _row(table, "useful tokens", f"{useful:,}", f"{unshared / useful:.2f} times fewer than one sequence per choice")
    floor = plan["prefix_tree_tokens"]
    _row(table, "prefix tree", f"{floor:,}", f"the floor; useful tokens are {100 * (useful / floor - 1):.1f} % above")
    if plan.get("windows"):
        _row(table, "windows", f"{plan['windows']:,}", "prefixes are shared within each, as in the prefix tree")
    _row(table, "slots", f"{plan['slots']:,}", f"{100 * useful / plan['slots']:.1f} % filled")
    for b in plan["buckets"]:
        shape = f"{b['rows']} x {b['length']} tokens, {b['readouts']} readouts"
        _row(table, "bucket", f"{b['runs']:,} runs", shape)
    if "decoding" in plan:
        decoding = plan["decoding"]
        shape = f"{' or '.join(map(str, decoding['step_tokens']))} tokens a step, cache of {decoding['slots']}"
        _row(table, "decoding", "", shape)


def _table() -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column()
    return table


def _metrics(table: Table, metrics: dict[str, float | None]) -> None:
    for name in (name for name in metrics if f"{name}_stderr" in metrics):
        value, error = metrics[name], metrics[f"{name}_stderr"]
        shown = "no labels" if value is None else f"{value:.4f}"
        _row(table, name, shown, "" if error is None else f"± {error:.4f}")


def _row(table: Table, name: str, value: str, note: str) -> None:
    table.add_row(name, Text(printable(value)), Text(printable(note)))
