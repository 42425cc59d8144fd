"""Writes the document of a run: a PDF on the task, the rules, the method and the figures."""

import shlex
from collections.abc import Callable, Sequence
from typing import Any

from reportlab.platypus import Flowable, PageBreak, Paragraph

from cecompile.report import units
from cecompile.report.document.credits import credits
from cecompile.report.document.example import make_example
from cecompile.report.document.figures import Bar, bars, tree_and_mask
from cecompile.report.document.fonts import shown
from cecompile.report.document.page import CODE, SUBTITLE, TITLE, WIDTH, Writer, literal, register_fonts, typeset
from cecompile.report.document.rules import rule_rows
from cecompile.report.document.words import DASH, EXAMPLES, Words

Results = dict[str, Any]
ROW = 19  # points for a row of a table, of one line or, here and there, two


def make_document(results: Results, languages: Sequence[str]) -> bytes:
    """The PDF: the whole document in each language, one after another.

    Args:
        results: from `read_results`.
        languages: at least one of LANGUAGES.
    """
    register_fonts()
    parts = (_front, _task, _rules, _method, _measured, _setting, _credits, _again)
    story: list[Flowable] = []
    for language in languages:
        writer = Writer(Words(language))
        story += [PageBreak()] if story else []
        story += [flowable for part in parts for flowable in part(results, writer)]
    name = units.short_name(results["model"]["name"])
    footer = shown(f"cecompile {results['environment']['versions'].get('cecompile') or ''} · {name}", 90)
    return typeset(story, Words(languages[0])("title"), footer)


def _front(results: Results, w: Writer) -> list[Flowable]:
    clock, seconds = results["headline"]["clock"], results["headline"]["seconds"]
    inference = results["latency_s"]["inference"]
    name = units.main_metric(results["metrics"])
    value, error = results["metrics"][name], results["metrics"].get(f"{name}_stderr")
    about = units.short_name(results["model"]["name"])
    latency = w.text("summary.latency", clock=clock, gloss=w.words(f"clock.{clock}"))
    per_question = w.text("summary.inference", per=units.seconds(inference / results["questions"]))
    accuracy = name if error is None else f"{name} ± {units.percent(error)}"  # perplexity is never the main metric
    return [
        Paragraph(w.words("title"), TITLE),
        Paragraph(literal(f"{about} · {results['task']} · {units.short_name(results['data']['name'])}"), SUBTITLE),
        w.summary([
            (w.words.seconds(seconds), latency), (w.words.seconds(inference), per_question),
            (w.words.percent(value), accuracy),
        ]),
    ]  # fmt: skip


def _task(results: Results, w: Writer) -> list[Flowable]:
    counts = {name: units.count(results[name]) for name in ("questions", "choices")}
    counts["data"] = units.short_name(results["data"]["name"])
    answers, truncated = results["answers"], results["truncated_questions"]
    if answers is not None:
        counts["new_tokens"] = units.count(answers["max_new_tokens"])
    story = [*w.section("task"), w.paragraph(f"task.{_kind(results)}", **counts)]
    if truncated:
        story.append(w.paragraph("task.truncated", count=units.count(truncated)))
    if results["metrics"][units.main_metric(results["metrics"])] is None:
        story.append(w.paragraph("task.no_labels"))
    return story


def _kind(results: Results) -> str:
    """How the questions are judged, which the metrics tell."""
    if results["answers"] is not None:
        return "chat"
    if "perplexity" in results["metrics"]:
        return "continuation"
    return "scoring" if "acc_norm" in results["metrics"] else "true"


def _rules(results: Results, w: Writer) -> list[Flowable]:
    rows = [w.texts("rules", "rule", "met"), *rule_rows(results, w)]
    return [*w.section("rules"), w.table(rows, (0.32, 0.68))]


def _method(results: Results, w: Writer) -> list[Flowable]:
    story, plan, answers = w.section("method"), results["plan"], results["answers"]
    compiled = results["engine"]["name"] == "compiled"
    if plan is None:
        return [*story, w.paragraph("method.reference")]
    context, choices = EXAMPLES[w.words.language]
    example = make_example(context, choices)
    story.append(w.paragraph("method.tree", figure=w.figures + 1, tree=len(example.words), unshared=example.unshared))
    story.append(w.figure(tree_and_mask(WIDTH, example), "figure.tree", choices=len(choices)))
    story.append(w.paragraph("method.mask"))
    story.append(w.paragraph("method.pack", engine=w.words("method.compiled" if compiled else "method.eager")))
    if answers is not None:
        story.append(w.paragraph("method.chat"))
        if answers["tokens"] is not None:
            facts = {"in_tree": answers["in_tree"], "tokens": answers["tokens"], "decoded": answers["decoded_tokens"]}
            counts = {key: units.count(value or 0) for key, value in facts.items()}
            story.append(w.paragraph("method.answers", questions=units.count(results["questions"]), **counts))
    story.append(w.paragraph("method.check"))
    if compiled:
        story.append(w.paragraph("method.check.compiled"))
    return [*story, _saved(plan, w), _fill(plan, w)]


def _saved(plan: Results, w: Writer) -> Flowable:
    names = ("unshared", "question_tree", "slots", "useful", "prefix_tree")
    counts = {name: plan["slots" if name == "slots" else f"{name}_tokens"] for name in names}
    rows = [Bar(w.words(f"tokens.{n}"), counts[n], units.count(counts[n]), n == "useful") for n in names]
    return w.figure(bars(WIDTH, rows), "figure.saved")


def _fill(plan: Results, w: Writer) -> Flowable:
    """A bar for each bucket whose number of useful tokens is known, and one for all buckets."""
    rows = []
    for bucket in plan["buckets"]:
        fill = _bucket_fill(bucket)
        if fill is not None:
            label = w.text("fill.bucket", **bucket | {"runs": units.count(bucket["runs"])})
            rows.append(Bar(label, fill, w.words.percent(fill)))
    fill = plan["useful_tokens"] / max(1, plan["slots"])
    rows.append(Bar(w.words("fill.all"), fill, w.words.percent(fill), True))
    return w.figure(bars(WIDTH, rows, 1.0), "figure.fill")


def _bucket_fill(bucket: Results) -> float | None:
    slots = bucket["rows"] * bucket["length"] * bucket["runs"]
    return None if bucket["useful_tokens"] is None or not slots else bucket["useful_tokens"] / slots


def _measured(results: Results, w: Writer) -> list[Flowable]:
    metrics, phases, runs = results["metrics"], results["phases_s"], results["inference_s"]
    rows = [w.texts("measured", "metric", "value", "error")]
    for name in (n for n in metrics if not n.endswith("_stderr") and n != "perplexity"):
        value = w.text("no_labels") if metrics[name] is None else units.percent(metrics[name])
        rows.append([literal(name), value, _known(metrics.get(f"{name}_stderr"), units.percent)])
    times = [w.texts("measured", "latency", "covers", "seconds")]
    times += [[clock, w.text(f"clock.{clock}"), units.seconds(s)] for clock, s in results["latency_s"].items()]
    chart = [Bar(name, value, w.words.seconds(value), name == "inference") for name, value in phases.items()]
    total = sum(phases.values())
    chart.append(Bar(w.words("measured.total"), total, w.words.seconds(total)))
    story = [*w.section("measured"), w.table(rows, (0.4, 0.3, 0.3), numbers=(1, 2))]
    if "perplexity" in metrics:
        value, error = (w.words.metric("perplexity", metrics.get(f"perplexity{end}")) for end in ("", "_stderr"))
        story.append(w.paragraph("measured.perplexity", value=value, error=error))
    story += [w.table(times, (0.25, 0.5, 0.25), numbers=(2,)), w.figure(bars(WIDTH, chart), "figure.phases")]
    if runs["runs"] > 1:
        spread = {"min": units.seconds(runs["min"]), "max": units.seconds(runs["max"])}
        story.append(w.paragraph("measured.runs", runs=runs["runs"], **spread))
    story += [] if results["plan"] is None else _plan(results["plan"], w)
    story += [] if results["comparison"] is None else _comparison(results["comparison"], w)
    names = ("peak", "predicted", "limit")
    memory = [[w.text(f"measured.{name}"), _known(results["memory"][f"{name}_bytes"], units.size)] for name in names]
    return [*story, w.table([[w.text("measured.memory"), ""], *memory], (0.6, 0.4), numbers=(1,))]


def _plan(plan: Results, w: Writer) -> list[Flowable]:
    useful = max(1, plan["useful_tokens"])
    facts = {
        "useful": units.count(plan["useful_tokens"]),
        "slots": units.count(plan["slots"]),
        "fill": units.percent(useful / max(1, plan["slots"])),
        "ratio": f"{plan['unshared_tokens'] / useful:.2f}",
        "above": f"{100 * (useful / max(1, plan['prefix_tree_tokens']) - 1):.1f}",
    }
    rows = [w.texts("measured", "bucket", "bucket_runs", "readouts", "bucket_fill")]
    for bucket in plan["buckets"]:
        shape = f"{units.count(bucket['rows'])} × {units.count(bucket['length'])}"
        fill = _known(_bucket_fill(bucket), w.words.percent)
        rows.append([shape, units.count(bucket["runs"]), units.count(bucket["readouts"]), fill])
    return [w.paragraph("measured.sharing", **facts), w.table(rows, (0.34, 0.22, 0.22, 0.22), numbers=(1, 2, 3))]


def _comparison(comparison: Results, w: Writer) -> list[Flowable]:
    title = w.text("measured.comparison", baseline=units.short_name(comparison["baseline"]))
    rows = [[title, *w.texts("measured", "drop", "interval")]]
    for name, drop in comparison["drop_points"].items():
        interval = comparison["interval_points"].get(name)
        shown_interval = DASH if not interval else " … ".join(f"{value:.2f}" for value in interval)
        rows.append([literal(name), _known(drop, "{:.2f}".format), shown_interval])
    facts = {
        "agreement": _known(comparison["agreement"], w.words.percent),
        "differing": _known(comparison["differing"], units.count),
        "largest": _known(comparison["largest_difference"], "{:.3g}".format),
        "speed": _known(comparison["speed_ratio"], "{:.2f}".format),
    }
    return [w.table(rows, (0.5, 0.2, 0.3), numbers=(1, 2)), w.paragraph("measured.compared", **facts)]


def _known(value: Any, write: Callable[[Any], str]) -> str:
    return DASH if value is None else write(value)


def _setting(results: Results, w: Writer) -> list[Flowable]:
    model, engine, machine, cache = (results[key] for key in ("model", "engine", "environment", "cache"))
    versions = [f"{name} {version}" for name, version in machine["versions"].items() if version]
    ranks = "" if results["ranks"] is None else ", " + w.words("ranks", ranks=results["ranks"]["size"])
    cpus = "" if machine["cpus"] is None else ", " + w.words("setting.cpus", cpus=machine["cpus"])
    facts = [
        ("date", units.minute(results["date"]) if results["date"] else w.words("not_recorded")),
        ("model", model["name"]),
        ("setting.architecture", f"{model['architecture']}, {model['dtype']}"),
        ("setting.parameters", units.count(model["parameters"])),
        ("setting.fingerprint", model["fingerprint"]),
        ("setting.device_fingerprint", model["device_fingerprint"]),
        ("data", results["data"]["name"]),
        ("setting.digest", results["data"]["digest"]),
        ("device", machine["device"] + ranks),
        ("setting.engine", f"{engine['name']}, {engine['attention'] or DASH}"),
        ("setting.note", engine["note"]),
        ("setting.cache", cache and ": ".join(part for part in (cache["state"], cache["reason"]) if part)),
        ("setting.system", f"{machine['system']}{cpus}"),
        ("credits.version", ", ".join([f"Python {machine['python']}", *versions])),
    ]
    rows = [(w.text(name), literal(value)) for name, value in facts if value]
    return [*w.section("setting", len(rows) * ROW), w.table(rows, (0.2, 0.8), head=False)]


def _credits(results: Results, w: Writer) -> list[Flowable]:
    rows = [w.texts("credits", "name", "version", "licence")]
    for one in credits(results["environment"]["versions"]):
        rows.append([literal(one.name), literal(one.version), literal(one.licence or w.words("not_recorded"))])
    table = w.table(rows, (0.2, 0.2, 0.6))
    return [*w.section("credits"), w.paragraph("credits.about"), table, w.paragraph("credits.font")]


def _again(results: Results, w: Writer) -> list[Flowable]:
    command, recorded = command_line(results)
    report = shlex.join(["cecompile", "report", "DIR", "--lang", w.words.language])
    story = [*w.section("again"), w.paragraph("again.recorded" if recorded else "again.made_up")]
    story += [Paragraph(literal(command, 4000), CODE), w.paragraph("again.same"), w.paragraph("again.report")]
    return [*story, Paragraph(literal(report), CODE)]


def command_line(results: dict[str, Any]) -> tuple[str, bool]:
    """The command that made the result, for a shell, and whether it was recorded.

    A command of the same effect stands for one that was not recorded.
    """
    if results["command"]:
        return shlex.join(results["command"]), True
    engine = results["engine"]
    arguments = ["cecompile", "eval", "--model", results["model"]["name"], "--data", results["data"]["name"]]
    arguments += ["--task", results["task"], "--limit", str(results["questions"]), "--dtype", results["model"]["dtype"]]
    arguments += ["--engine", engine["name"]]
    if engine["attention"] is not None:
        arguments += ["--attention", engine["attention"]]
    if results["answers"] is not None:
        arguments += ["--max-new-tokens", str(results["answers"]["max_new_tokens"])]
    return shlex.join([*arguments, "--clock", results["headline"]["clock"]]), False
