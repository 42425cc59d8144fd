"""Prints tables and progress bars to the terminal."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from cecompile.compile_cache.store import shown
from cecompile.errors import printable
from cecompile.report.units import short_name
from cecompile.results.clock import PHASES

PADDING = (0, 2, 0, 0)
Row = tuple[str, str, str]  # name, value, note


@contextmanager
def progress_bars(console: Console) -> Iterator[Any]:
    """A callable (phase, done, total) that draws a bar per phase; without a terminal, one that draws nothing."""
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
    """Prints the run's score, clock and plan."""
    _print(console, _result_rows(results))
    console.print(Text(f"results in {printable(str(output))}"))


def _result_rows(results: dict[str, Any]) -> Iterator[Row]:
    model, questions, ranks = results["model"], results["questions"], results["ranks"]
    yield "model", "", f"{short_name(model['name'])} ({model['architecture']}, {model['dtype']})"
    yield "data", "", f"{short_name(results['data']['name'])} ({results['task']}, {questions} questions)"
    yield "device", "", results["environment"]["device"]
    if ranks is not None:
        stages = (results["pipeline"] or {"stages": 1})["stages"]
        passes = ranks["passes"][stages - 1 :: stages]
        each = f"each, {stages} stages in a pipeline" if stages > 1 else "each"
        yield "ranks", str(ranks["size"]), f"from {min(passes)} to {max(passes)} passes {each}"
    if results["engine"]["choice"]:
        choice = results["engine"]["choice"]
        times = f"compiling takes {choice['compile_s']:.0f} s and saves {choice['saved_s']:.1f} s (estimates)"
        yield "engine", results["engine"]["name"], times
    if results["engine"]["note"]:
        yield "note", "", results["engine"]["note"]
    if results.get("truncated_questions"):
        yield "truncated", str(results["truncated_questions"]), "questions cut on the left to fit the model"
    metrics = results["metrics"]
    for name in (name for name in metrics if f"{name}_stderr" in metrics):
        value, error = metrics[name], metrics[f"{name}_stderr"]
        unknown = "infinite" if name == "perplexity" else "no labels"
        yield name, unknown if value is None else f"{value:.4f}", "" if error is None else f"± {error:.4f}"
    answers = results.get("answers", {})
    if answers.get("tokens") is not None:
        yield "in the tree", f"{answers['in_tree']}", f"of {questions} answers, read in the same pass"
        yield "decoded outside", f"{answers['decoded_tokens']:,}", f"of {answers['tokens']:,} tokens written"
    yield from _time_rows(results)
    if "comparison" in results:
        yield from _comparison_rows(results["comparison"], results["headline"]["clock"])
    if results["plan"] is not None:
        yield from _plan_rows(results["plan"])
    if results["streaming"] is not None:
        waited = f"; {results['streaming']['waited_seconds']:.2f} s waited for them"
        yield _streaming_row(results["streaming"], waited)


def _time_rows(results: dict[str, Any]) -> Iterator[Row]:
    runs, resumed = results["inference_s"], results["resumed"]
    for phase in PHASES:
        yield phase, f"{results['phases_s'][phase]:.2f} s", ""
    if results["cache"] is not None:
        yield "compile cache", results["cache"]["state"], results["cache"]["reason"]
    if runs["runs"] > 1:
        yield "inference runs", str(runs["runs"]), f"from {runs['min']:.2f} to {runs['max']:.2f} s, median counts"
    if resumed:
        done = f"of passes, begun {resumed['from']}: no latency counts as a headline"
        yield "resumed", f"{resumed['passes']}", done
    for name, seconds in results["latency_s"].items():
        mark = "<- headline" if name == results["headline"]["clock"] else ""
        yield f"latency {name}", f"{seconds:.2f} s", "of the rest alone" if resumed else mark


def print_comparison(console: Console, compared: dict[str, Any]) -> None:
    """Prints a comparison of two results (`compare_directories`), and every question on which they differ."""
    _print(console, [*_compared_rows(compared), *_comparison_rows(compared, compared["clock"])])
    if compared["differences"]:
        names = ("question", "label", "reference", "candidate", "loglikelihoods")
        table = Table(*(Column(name, overflow="fold") for name in names), box=None, padding=PADDING)
        for one in compared["differences"]:
            label, far = one["label"], one["largest_difference"]
            answers = (_answer(one["reference"]), _answer(one["candidate"]))
            apart = "" if far is None else f"up to {far:.2g}"
            _add(table, one["id"], "" if label is None else str(label), *answers, apart)
        console.print(table)
    for problem in compared["failed"][1:]:  # the first ends the command
        console.print(Text(printable(problem)))


def _compared_rows(compared: dict[str, Any]) -> Iterator[Row]:
    for who in ("reference", "candidate"):
        metrics = compared["metrics"][who].items()
        shown = ", ".join(f"{k} {v:.4f}" for k, v in metrics if v is not None and not k.endswith("_stderr"))
        yield who, "", f"{short_name(compared[who])} ({shown or 'no labels'})"


def _comparison_rows(comparison: dict[str, Any], clock: str) -> Iterator[Row]:
    against = f"{short_name(comparison['baseline'])}, {comparison['max_drop']} points"
    yield "compared with", comparison["verdict"], against
    for metric, drop in comparison["drop_points"].items():
        interval = comparison["interval_points"][metric]
        between = "points" if interval is None else f"points, 95 % between {interval[0]:+.2f} and {interval[1]:+.2f}"
        yield f"drop of {metric}", *(("no labels", "") if drop is None else (f"{drop:+.2f}", between))
    yield "agreement", f"{100 * comparison['agreement']:.2f} %", f"{comparison['differing']} answers differ"
    if comparison["largest_difference"] is not None:
        yield "loglikelihoods", f"{comparison['largest_difference']:.2g}", "the largest difference"
    ratios = {clock: comparison["speed_ratio"], "inference": comparison["inference_speed_ratio"]}
    for name, ratio in ratios.items():
        if ratio is not None:
            yield f"speed, {name}", f"{ratio:.2f}", "times the reference's"


def _answer(answer: dict[str, int] | str) -> str:
    return answer if isinstance(answer, str) else ", ".join(f"{metric}: {choice}" for metric, choice in answer.items())


def print_plan(console: Console, plan: dict[str, Any], estimate: dict[str, Any] | None = None) -> None:
    """Prints a plan's counts (the `plan` of results.json), and the memory and time of running the plan on a device."""
    rows = [*_plan_rows(plan), *_memory_rows(plan)]
    if "streaming" in plan:
        rows.append(_streaming_row(plan["streaming"], ""))
    _print(console, rows if estimate is None else [*rows, *_estimate_rows(estimate)])


def _memory_rows(plan: dict[str, Any]) -> Iterator[Row]:
    peak = "predicted peak of the fullest stage" if plan["stages"] else "predicted peak"
    for part, size in plan["memory"].items():
        name, note = ("memory", peak) if part == "total" else (f"memory, {part}", "")
        yield name, f"{size / 1e9:.2f} GB", note
    for number, stage in enumerate(plan["stages"] or ()):
        first, last = stage["layers"]
        note = f"layers {first} to {last - 1}, {stage['weights_bytes'] / 1e9:.2f} GB of weights"
        yield f"stage {number}", f"{stage['total_bytes'] / 1e9:.2f} GB", note


def print_warmup(console: Console, built: Any, note: str | None) -> None:
    """Prints the outcome of `cecompile warm`, a `warm_cache.CacheBuild`."""
    rows = [("cache was", built.before[0], built.before[1])]
    rows += [("bucket", f"{seconds:.2f} s", shape) for shape, seconds in built.seconds.items()]
    rows += [(f"{n:,} slots", f"{rate:,.0f}", "useful tokens a second, measured") for n, rate in built.measured.items()]
    rows.append(("cache holds", f"{built.bytes / 1e6:.1f} MB", "for this model, device and these versions"))
    _print(console, [*rows, ("note", "", note)] if note else rows)


def print_cache(console: Console, directory: Path, entries: Sequence[Any]) -> None:
    """Prints the entries of a compile cache, each a `compile_cache.store.Summary`."""
    names = ("model", "dtype", "device", "torch", "buckets", "size", "built", "")
    table = Table(*names, box=None, padding=PADDING)
    for entry in entries:
        facts = entry.facts
        built = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.built))
        made_for = (facts.get("model", entry.key), facts.get("dtype", ""), facts.get("device", {}).get("name", ""))
        torch = facts.get("versions", {}).get("torch", "")
        _add(table, *made_for, torch, shown(entry.buckets), f"{entry.size / 1e6:.1f} MB", built, entry.problem or "")
    console.print(table)
    console.print(Text(f"{len(entries)} entries in {printable(str(directory))}"))


def _streaming_row(streaming: dict[str, Any], more: str) -> Row:
    sweeps, passes = streaming["sweeps"], streaming["passes_per_sweep"]
    each = f"{streaming['read_bytes'] / max(1, sweeps) / 1e9:.2f} GB"
    count = "1 sweep" if sweeps == 1 else f"{sweeps} sweeps"
    return "streamed", count, f"of up to {passes} passes, {each} of weights read in each{more}"


def _estimate_rows(estimate: dict[str, Any]) -> Iterator[Row]:
    yield f"estimate on {estimate['profile']}", "", f"{estimate['device']}; {estimate['label']}"
    for phase, seconds in estimate["phases_s"].items():
        yield phase.replace("_cold", ", cold").replace("_warm", ", warm cache"), f"{seconds:.1f} s", "estimate"
    weights, streaming = estimate["weights"], estimate["streaming"]
    if streaming is not None:
        yield "reading", "", f"{streaming['verdict']} (estimate)"
    held, seen = weights["bytes"] / 1e9, weights["memory_bytes"] / 1e9
    room = f"{seen - held:.1f} GB are left for all else" if weights["fit"] else "DO NOT FIT"
    room = room if streaming is None else "streamed"
    yield "weights", f"{held:.1f} GB", f"in 16 bits, in the {seen:.1f} GB that a process can get: {room}"
    if "desktop_bytes" in weights:
        yield "desktop", f"{weights['desktop_bytes'] / 1e9:.1f} GB", "are there where a desktop runs beside"
    yield "figures", "", estimate["source"]


def _plan_rows(plan: dict[str, Any]) -> Iterator[Row]:
    useful, unshared, floor = plan["useful_tokens"], plan["unshared_tokens"], plan["prefix_tree_tokens"]
    yield "useful tokens", f"{useful:,}", f"{unshared / useful:.2f} times fewer than one sequence per choice"
    yield "prefix tree", f"{floor:,}", f"the floor; useful tokens are {100 * (useful / floor - 1):.1f} % above"
    if plan.get("windows"):
        yield "windows", f"{plan['windows']:,}", "prefixes are shared within each, as in the prefix tree"
    yield "slots", f"{plan['slots']:,}", f"{100 * useful / plan['slots']:.1f} % filled"
    for b in plan["buckets"]:
        yield "bucket", f"{b['runs']:,} runs", f"{b['rows']} x {b['length']} tokens, {b['readouts']} readouts"
    if "decoding" in plan:
        steps = " or ".join(map(str, plan["decoding"]["step_tokens"]))
        yield "decoding", "", f"{steps} tokens a step, cache of {plan['decoding']['slots']}"


def _print(console: Console, rows: Iterable[Row]) -> None:
    columns = (Column(style="bold"), Column(justify="right"), Column())
    table = Table(*columns, show_header=False, box=None, padding=PADDING)
    for row in rows:
        _add(table, *row)
    console.print(table)


def _add(table: Table, *cells: str) -> None:
    table.add_row(*(Text(printable(cell)) for cell in cells))
