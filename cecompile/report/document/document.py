"""The document: a PDF on the task, the rules, the method and the figures, written from the run itself."""

import shlex
from collections.abc import Sequence
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
ROW = 19  # points: a line of a table, and room for some of two lines


def make_document(results: Results, languages: Sequence[str]) -> bytes:
    """The PDF, whole in each language, one after another.

    Args:
        results: as `read_results` gives them.
        languages: of LANGUAGES, at least one.
    """
    register_fonts()
    story: list[Flowable] = []
    for language in languages:
        story += [PageBreak()] if story else []
        story += _story(results, Writer(Words(language)))
    name = units.short_name(results["model"]["name"])
    footer = shown(f"cecompile {results['environment']['versions'].get('cecompile') or ''} · {name}", 90)
    return typeset(story, Words(languages[0])("title"), footer)


def _story(results: Results, w: Writer) -> list[Flowable]:
    parts = (_front, _task, _rules, _method, _measured, _setting, _credits, _again)
    return [flowable for part in parts for flowable in part(results, w)]


def _front(results: Results, w: Writer) -> list[Flowable]:
    clock, seconds = results["headline"]["clock"], results["headline"]["seconds"]
    inference = results["latency_s"]["inference"]
    name = units.main_metric(results["metrics"])
    value, error = results["metrics"][name], results["metrics"].get(f"{name}_stderr")
    accuracy = w.text("no_labels") if value is None else _percent(value, w)
    about = units.short_name(results["model"]["name"])
    return [
        Paragraph(w.words("title"), TITLE),
        Paragraph(literal(f"{about} · {results['task']} · {units.short_name(results['data']['name'])}"), SUBTITLE),
        w.summary([
            (w.text("seconds", value=units.seconds(seconds)),
             w.text("summary.latency", clock=clock, gloss=w.words(f"clock.{clock}"))),
            (w.text("seconds", value=units.seconds(inference)),
             w.text("summary.inference", per=units.seconds(inference / results["questions"]))),
            (accuracy, name if error is None else f"{name} ± {units.percent(error)}"),
        ]),
    ]  # fmt: skip


def _task(results: Results, w: Writer) -> list[Flowable]:
    counts = {"questions": units.count(results["questions"]), "choices": units.count(results["choices"])}
    counts["data"] = units.short_name(results["data"]["name"])
    answers = results["answers"]
    story = w.section("task")
    if answers is None:
        story.append(w.paragraph("task.scoring", **counts))
    else:
        story.append(w.paragraph("task.chat", **counts, new_tokens=units.count(answers["max_new_tokens"])))
    if results["truncated_questions"]:
        story.append(w.paragraph("task.truncated", count=units.count(results["truncated_questions"])))
    if None in results["metrics"].values():
        story.append(w.paragraph("task.no_labels"))
    return story


def _rules(results: Results, w: Writer) -> list[Flowable]:
    rows = [(w.text("rules.rule"), w.text("rules.met")), *rule_rows(results, w)]
    return [*w.section("rules"), w.table(rows, (0.32, 0.68))]


def _method(results: Results, w: Writer) -> list[Flowable]:
    story, plan = w.section("method"), results["plan"]
    if plan is None:
        return [*story, w.paragraph("method.reference")]
    context, choices = EXAMPLES[w.words.language]
    example = make_example(context, choices)
    story.append(w.paragraph("method.tree", figure=w.figures + 1, tree=len(example.words), unshared=example.unshared))
    story.append(w.figure(tree_and_mask(WIDTH, example), "figure.tree", choices=len(choices)))
    story.append(w.paragraph("method.mask"))
    engine = "method.compiled" if results["engine"]["name"] == "compiled" else "method.eager"
    story.append(w.paragraph("method.pack", engine=w.words(engine)))
    answers = results["answers"]
    if answers is not None:
        story.append(w.paragraph("method.chat"))
        if answers["tokens"] is not None:
            facts = {"in_tree": answers["in_tree"], "tokens": answers["tokens"], "decoded": answers["decoded_tokens"]}
            shown_facts = {key: units.count(value or 0) for key, value in facts.items()}
            story.append(w.paragraph("method.answers", questions=units.count(results["questions"]), **shown_facts))
    story.append(w.paragraph("method.check"))
    if results["engine"]["name"] == "compiled":
        story.append(w.paragraph("method.check.compiled"))
    return [*story, _saved(plan, w), _fill(plan, w)]


def _saved(plan: Results, w: Writer) -> Flowable:
    names = ("unshared", "question_tree", "slots", "useful", "prefix_tree")
    values = [plan["slots" if name == "slots" else f"{name}_tokens"] for name in names]
    rows = [
        Bar(w.words(f"tokens.{name}"), value, units.count(value), name == "useful")
        for name, value in zip(names, values, strict=True)
    ]
    return w.figure(bars(WIDTH, rows), "figure.saved")


def _fill(plan: Results, w: Writer) -> Flowable:
    """A bar per bucket where the result says how many useful tokens each has, and one for all."""
    rows = []
    for bucket in plan["buckets"]:
        fill = _bucket_fill(bucket)
        if fill is not None:
            label = w.text("fill.bucket", **bucket | {"runs": units.count(bucket["runs"])})
            rows.append(Bar(label, fill, _percent(fill, w)))
    fill = plan["useful_tokens"] / max(1, plan["slots"])
    rows.append(Bar(w.words("fill.all"), fill, _percent(fill, w), True))
    return w.figure(bars(WIDTH, rows, 1.0), "figure.fill")


def _bucket_fill(bucket: Results) -> float | None:
    slots = bucket["rows"] * bucket["length"] * bucket["runs"]
    return None if bucket["useful_tokens"] is None or not slots else bucket["useful_tokens"] / slots


def _measured(results: Results, w: Writer) -> list[Flowable]:
    metrics, latency = results["metrics"], results["latency_s"]
    rows = [[w.text(f"measured.{name}") for name in ("metric", "value", "error")]]
    for name in (n for n in metrics if not n.endswith("_stderr")):
        value, error = metrics[name], metrics.get(f"{name}_stderr")
        shown_value = w.text("no_labels") if value is None else units.percent(value)
        rows.append([literal(name), shown_value, DASH if error is None else units.percent(error)])
    times = [[w.text(f"measured.{name}") for name in ("latency", "covers", "seconds")]]
    times += [[clock, w.text(f"clock.{clock}"), units.seconds(value)] for clock, value in latency.items()]
    phases = results["phases_s"]
    total = sum(phases.values())
    chart = [
        Bar(name, value, w.words("seconds", value=units.seconds(value)), name == "inference")
        for name, value in phases.items()
    ]
    chart.append(Bar(w.words("measured.total"), total, w.words("seconds", value=units.seconds(total))))
    story = [
        *w.section("measured"),
        w.table(rows, (0.4, 0.3, 0.3), numbers=(1, 2)),
        w.table(times, (0.25, 0.5, 0.25), numbers=(2,)),
        w.figure(bars(WIDTH, chart), "figure.phases"),
    ]
    runs = results["inference_s"]
    if runs["runs"] > 1:
        spread = {"min": units.seconds(runs["min"]), "max": units.seconds(runs["max"])}
        story.append(w.paragraph("measured.runs", runs=runs["runs"], **spread))
    story += [] if results["plan"] is None else _plan(results["plan"], w)
    story += [] if results["comparison"] is None else _comparison(results["comparison"], w)
    return [*story, _memory(results["memory"], w)]


def _plan(plan: Results, w: Writer) -> list[Flowable]:
    useful = max(1, plan["useful_tokens"])
    facts = {
        "useful": units.count(plan["useful_tokens"]),
        "slots": units.count(plan["slots"]),
        "fill": units.percent(useful / max(1, plan["slots"])),
        "ratio": f"{plan['unshared_tokens'] / useful:.2f}",
        "above": f"{100 * (useful / max(1, plan['prefix_tree_tokens']) - 1):.1f}",
    }
    rows = [[w.text(f"measured.{name}") for name in ("bucket", "bucket_runs", "readouts", "bucket_fill")]]
    for bucket in plan["buckets"]:
        fill = _bucket_fill(bucket)
        shape = f"{units.count(bucket['rows'])} × {units.count(bucket['length'])}"
        shown_fill = DASH if fill is None else _percent(fill, w)
        rows.append([shape, units.count(bucket["runs"]), units.count(bucket["readouts"]), shown_fill])
    return [w.paragraph("measured.sharing", **facts), w.table(rows, (0.34, 0.22, 0.22, 0.22), numbers=(1, 2, 3))]


def _comparison(comparison: Results, w: Writer) -> list[Flowable]:
    title = w.text("measured.comparison", baseline=units.short_name(comparison["baseline"]))
    rows = [[title, w.text("measured.drop"), w.text("measured.interval")]]
    for name, drop in comparison["drop_points"].items():
        interval = comparison["interval_points"].get(name)
        shown_interval = DASH if not interval else " … ".join(f"{value:.2f}" for value in interval)
        rows.append([literal(name), _known(drop, lambda d: f"{d:.2f}"), shown_interval])
    return [
        w.table(rows, (0.5, 0.2, 0.3), numbers=(1, 2)),
        w.paragraph(
            "measured.compared",
            agreement=_known(comparison["agreement"], lambda a: _percent(a, w)),
            differing=_known(comparison["differing"], units.count),
            largest=_known(comparison["largest_difference"], lambda d: f"{d:.3g}"),
            speed=_known(comparison["speed_ratio"], lambda s: f"{s:.2f}"),
        ),
    ]


def _percent(fraction: float, w: Writer) -> str:
    return w.words("percent", value=units.percent(fraction))


def _known(value: Any, write: Any) -> str:
    return DASH if value is None else str(write(value))


def _memory(memory: Results, w: Writer) -> Flowable:
    rows = [[w.text("measured.memory"), ""]]
    for name in ("peak", "predicted", "limit"):
        rows.append([w.text(f"measured.{name}"), _known(memory[f"{name}_bytes"], units.size)])
    return w.table(rows, (0.6, 0.4), numbers=(1,))


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
    rows = [[w.text(f"credits.{name}") for name in ("name", "version", "licence")]]
    rows += [
        [literal(one.name), literal(one.version), literal(one.licence or w.words("not_recorded"))]
        for one in credits(results["environment"]["versions"])
    ]
    story = [*w.section("credits"), w.paragraph("credits.about"), w.table(rows, (0.2, 0.2, 0.6))]
    return [*story, w.paragraph("credits.font")]


def _again(results: Results, w: Writer) -> list[Flowable]:
    command, recorded = command_line(results)
    report = shlex.join(["cecompile", "report", "DIR", "--lang", w.words.language])
    return [
        *w.section("again"),
        w.paragraph("again.recorded" if recorded else "again.made_up"),
        Paragraph(literal(command, 4000), CODE),
        w.paragraph("again.same"),
        w.paragraph("again.report"),
        Paragraph(literal(report), CODE),
    ]


def command_line(results: dict[str, Any]) -> tuple[str, bool]:
    """For a shell: the command that made the result, and whether it was recorded.

    Where it was not, one of the same effect is put together from what the result says.
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
