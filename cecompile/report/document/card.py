"""Draws the card: one picture of a result, for a leaderboard. Its two large figures are legible 320 pixels wide."""

from bisect import bisect_left
from io import BytesIO
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyBboxPatch

from cecompile.report import units
from cecompile.report.document.fonts import BOLD, REGULAR, shown
from cecompile.report.document.words import Words

WIDTH, HEIGHT, DPI = 1200, 675, 100  # pixels
MARGIN = 48
GROUND, PANEL, INK, FAINT = "#0b1220", "#17223a", "#f8fafc", "#a5b4cb"
TIME, RIGHT, WRONG = "#fcd34d", "#6ee7b7", "#fda4af"
LEAST = 0.55  # the fraction of its size to which a text shrinks before it loses its middle


class Canvas:
    """A picture in pixels from the upper left corner. Every text on the picture keeps to a width."""

    def __init__(self) -> None:
        self.figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, facecolor=GROUND)
        self._canvas = FigureCanvasAgg(self.figure)
        self._fonts = {bold: FontProperties(fname=str(BOLD if bold else REGULAR)) for bold in (False, True)}

    def text(
        self, x: float, y: float, text: str, size: float, width: float, *,
        color: str = INK, bold: bool = False, align: str = "left",
    ) -> None:  # fmt: skip
        """Writes `text` with its baseline at y, `size` pixels large, or smaller and shortened to fit `width`."""
        drawn = self.figure.text(
            x / WIDTH, 1 - y / HEIGHT, "", ha=align, va="baseline", color=color, parse_math=False,
            fontproperties=self._fonts[bold],
        )  # fmt: skip
        line = shown(text)

        def needed(part: str, pixels: float) -> float:
            drawn.set_text(part)
            drawn.set_fontsize(pixels * 72 / DPI)
            return float(drawn.get_window_extent(self._canvas.get_renderer()).width)

        pixels = size * max(LEAST, min(1.0, 0.99 * width / max(1.0, needed(line, size))))
        if needed(line, pixels) > width:
            kept = bisect_left(range(2, len(line)), True, key=lambda n: needed(_shortened(line, n), pixels) > width)
            needed(_shortened(line, kept + 1), pixels)

    def panel(self, x: float, y: float, width: float, height: float) -> None:
        box = FancyBboxPatch(
            (x / WIDTH, 1 - (y + height) / HEIGHT), width / WIDTH, height / HEIGHT, transform=self.figure.transFigure,
            boxstyle="round,pad=0,rounding_size=0.015", mutation_aspect=WIDTH / HEIGHT, facecolor=PANEL, linewidth=0,
        )  # fmt: skip
        self.figure.add_artist(box)

    def png(self) -> bytes:
        out = BytesIO()
        self.figure.savefig(out, format="png", dpi=DPI, facecolor=GROUND)
        return out.getvalue()


def _shortened(text: str, kept: int) -> str:
    """The `kept` characters at both ends of a text, with an ellipsis for the middle."""
    return f"{text[: kept // 2]}…{text[len(text) - (kept - kept // 2) :]}"


def draw_card(results: dict[str, Any], language: str) -> Canvas:
    """The card of a result.

    Args:
        results: from `read_results`.
        language: one of LANGUAGES.
    """
    words, canvas = Words(language), Canvas()
    _heading(canvas, results, words)
    half = (WIDTH - 2 * MARGIN - 24) / 2
    for i, (label, figure, gloss, color) in enumerate(_panels(results, words)):
        left = MARGIN + i * (half + 24)
        canvas.panel(left, 200, half, 258)
        canvas.text(left + half / 2, 252, label, 36, half - 40, color=FAINT, align="center")
        canvas.text(left + half / 2, 374, figure, 112, half - 40, color=color, bold=True, align="center")
        canvas.text(left + half / 2, 434, gloss, 28, half - 40, color=FAINT, align="center")
    cells = _cells(results, words)
    room = (WIDTH - 2 * MARGIN) / len(cells)
    for i, (label, value) in enumerate(cells):
        canvas.text(MARGIN + i * room, 504, label, 21, room - 20, color=FAINT)
        canvas.text(MARGIN + i * room, 542, value, 32, room - 20, bold=True)
    _footing(canvas, results, words)
    return canvas


def _heading(canvas: Canvas, results: dict[str, Any], words: Words) -> None:
    model, machine, width = results["model"], results["environment"], WIDTH - 2 * MARGIN
    date = units.minute(results["date"]) if results["date"] else ""
    about = words("card.questions", task=shown(results["task"], 40), questions=units.count(results["questions"]))
    canvas.text(MARGIN, 58, f"cecompile · {about}", 24, width - 320, color=FAINT)
    canvas.text(WIDTH - MARGIN, 58, date, 24, 300, color=FAINT, align="right")
    canvas.text(MARGIN, 118, units.short_name(model["name"]), 50, width, bold=True)
    parameters = words("card.parameters", parameters=units.magnitude(model["parameters"]))
    facts = [shown(model["architecture"], 36), shown(model["dtype"], 20), parameters, shown(machine["device"], 44)]
    if results["ranks"] is not None:
        facts.append(words("ranks", ranks=results["ranks"]["size"]))
    canvas.text(MARGIN, 166, " · ".join(facts), 27, width, color=FAINT)


def _panels(results: dict[str, Any], words: Words) -> list[tuple[str, str, str, str]]:
    """(label, figure, gloss, colour) of the two large figures."""
    clock, metric = results["headline"]["clock"], units.main_metric(results["metrics"])
    value, error = results["metrics"][metric], results["metrics"].get(f"{metric}_stderr")
    seconds, gloss = words.seconds(results["headline"]["seconds"]), words(f"clock.{clock}")
    spread = "" if error is None else f"± {units.percent(error)}"
    return [
        (words("card.latency", clock=clock), seconds, gloss, TIME),
        (metric, words.percent(value), spread, FAINT if value is None else RIGHT),
    ]


def _cells(results: dict[str, Any], words: Words) -> list[tuple[str, str]]:
    """(label, value) of the other clocks, inference per question, and the other metric or answers from the tree."""
    latency, metrics, answers = results["latency_s"], results["metrics"], results["answers"]
    cells = [(clock, words.seconds(s)) for clock, s in latency.items() if clock != results["headline"]["clock"]]
    cells.append((words("card.per_question"), words.seconds(latency["inference"] / results["questions"])))
    for name, value in metrics.items():
        if name != units.main_metric(metrics) and not name.endswith("_stderr"):
            cells.append((name, words.metric(name, value)))
    if answers is not None and answers["in_tree"] is not None:
        share = f"{units.count(answers['in_tree'])} / {units.count(results['questions'])}"
        cells.append((words("card.in_tree"), share))
    return [*cells, (words("card.fingerprint"), results["model"]["fingerprint"][:12])]


def _footing(canvas: Canvas, results: dict[str, Any], words: Words) -> None:
    comparison, width = results["comparison"], WIDTH - 2 * MARGIN
    if comparison is not None:
        verdict = "within" if comparison["verdict"] == "within" else "past"
        baseline, drops = units.short_name(comparison["baseline"]), words.drops(comparison["drop_points"])
        text = words(f"verdict.{verdict}", max_drop=f"{comparison['max_drop']:g}", baseline=baseline, drops=drops)
        canvas.text(MARGIN, 596, text, 25, width, color=RIGHT if verdict == "within" else WRONG)
    canvas.text(MARGIN, 640, f"SHA-256 {results['model']['fingerprint']}", 19, width - 260, color=FAINT)
    data = units.short_name(results["data"]["name"])
    canvas.text(WIDTH - MARGIN, 640, data, 19, 250, color=FAINT, align="right")
