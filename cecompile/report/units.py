"""Writes numbers for the card and the document, so that both say the same."""

from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

from cecompile.tasks.judge import METRICS


def seconds(value: float) -> str:
    """Seconds without the unit: two decimals, or three significant digits below one second.

    Huge and tiny values have an exponent, so that the text is at most nine characters long.
    """
    if 0 < value < 1 or value >= 999_999.95:
        return f"{value:#.3g}"
    return f"{value:,.1f}" if value >= 1000 else f"{value:.2f}"


def percent(fraction: float) -> str:
    """A fraction of 1 in percent, without the sign."""
    return f"{100 * fraction:.2f}"


def count(value: int) -> str:
    return f"{value:,}"


def size(value: int) -> str:
    """Bytes in GB, or in MB below one GB."""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def magnitude(value: int) -> str:
    """A number of parameters in the usual short form."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= unit:
            return f"{value / unit:.3g}{letter}" if value < 999.5 * unit else f"{value / unit:.0f}{letter}"
    return str(value)


def minute(date: str) -> str:
    """An ISO date and time to the minute, in UTC; any other text unchanged."""
    try:
        moment = datetime.fromisoformat(date.replace("Z", "+00:00"))
    except ValueError:
        return date
    return moment.astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def main_metric(metrics: Mapping[str, float | None]) -> str:
    """The name of the metric that a result is known by."""
    return next(name for name in METRICS if name in metrics)


def short_name(name: str) -> str:
    """The last two parts of a path; hub ids stay whole."""
    parts = Path(name).parts
    return name if len(parts) <= 2 else str(Path(*parts[-2:]))
