"""Says how a run met each rule of the contest, from the fields of its result."""

from collections.abc import Iterator
from typing import Any

from cecompile.report import units
from cecompile.report.document.page import Writer
from cecompile.report.document.words import DASH

SETTING, CREDITS, AGAIN = 5, 6, 7  # sections of the document
SHORT = 16  # characters of a digest that are shown


def rule_rows(results: dict[str, Any], w: Writer) -> list[tuple[str, str]]:
    """Pairs of (rule, how the run met the rule), as markup."""
    latency, phases, data = results["latency_s"], results["phases_s"], results["data"]
    seconds = {"strict": latency["strict"], "section3": latency["section3"], "preprocess": phases["preprocess"]}
    versions = results["environment"]["versions"]
    cache = w.words("none") if results["cache"] is None else results["cache"]["state"]
    torch = {name: versions.get(name) or w.words("not_recorded") for name in ("torch", "transformers")}
    name = units.short_name(data["name"])
    met = {
        "time": w.text("rule.time.met", **{key: units.seconds(value) for key, value in seconds.items()}),
        "accuracy": _accuracy(results["comparison"], w),
        "weights": " ".join(_weights(results["model"], w)),
        "output": None if results["answers"] is None else w.text("rule.output.met"),
        "data": w.text("rule.data.met", data=name, digest=data["digest"][:SHORT], cache=cache),
        "torch": w.text("rule.torch.met", architecture=results["model"]["architecture"], **torch),
        "credits": w.text("rule.credits.met", section=CREDITS),
        "reproducible": w.text("rule.reproducible.met", section=AGAIN),
    }
    return [(w.text(f"rule.{name}"), how) for name, how in met.items() if how is not None]


def _accuracy(comparison: dict[str, Any] | None, w: Writer) -> str:
    if comparison is None:
        return w.text("rule.accuracy.unmet")
    return w.text(
        "rule.accuracy.met",
        baseline=units.short_name(comparison["baseline"]),
        drops=w.words.drops(comparison["drop_points"]),
        max_drop=f"{comparison['max_drop']:g}",
        verdict=w.words("within" if comparison["verdict"] == "within" else "past"),
        agreement=DASH if comparison["agreement"] is None else w.words.percent(comparison["agreement"]),
    )


def _weights(model: dict[str, Any], w: Writer) -> Iterator[str]:
    yield w.text("rule.weights.met", fingerprint=model["fingerprint"][:SHORT], section=SETTING)
    if model["device_fingerprint"]:
        yield w.text("rule.weights.device", fingerprint=model["device_fingerprint"][:SHORT])
    if model["verified"]:
        yield w.text("rule.weights.verified", verified=model["verified"])
    if model["stored_dtypes"]:
        yield w.text("rule.weights.dtype", stored=", ".join(model["stored_dtypes"]), dtype=model["dtype"])
    else:
        yield w.text("rule.weights.computed", dtype=model["dtype"])
    changed = model["changed"]
    if changed:
        none = w.words("none")
        compiled = ", ".join(f"{name} × {count}" for name, count in (changed["compiled"] or {}).items())
        modules = changed["replaced_modules"]
        replaced = w.words("not_recorded") if modules is None else ", ".join(modules)
        facts = {"attention": changed["attention"] or none, "compiled": compiled or none, "replaced": replaced or none}
        yield w.text("rule.weights.changed", **facts)
