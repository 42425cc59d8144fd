"""Draws the document's figures as vectors, in the document's own font. Sizes are in points."""

from collections.abc import Sequence
from dataclasses import dataclass

from reportlab.graphics.shapes import Drawing, Line, Rect, String
from reportlab.lib.colors import Color, HexColor
from reportlab.pdfbase.pdfmetrics import stringWidth

from cecompile.report.document.example import Example
from cecompile.report.document.fonts import FAMILY

INK, FAINT, RULE = HexColor("#111827"), HexColor("#6b7280"), HexColor("#d1d5db")
ACCENT, PALE, GREEN = HexColor("#1d4ed8"), HexColor("#dbeafe"), HexColor("#047857")
Point = tuple[float, float]  # or a box's width and height


@dataclass(frozen=True, slots=True)
class Bar:
    """A horizontal bar.

    Attributes:
        label, note: the texts left and right of the bar.
        value: its length, in a unit that all bars of a figure share.
        marked: drawn in the colour that stands out.
    """

    label: str
    value: float
    note: str
    marked: bool = False


def bars(width: float, rows: Sequence[Bar], whole: float | None = None) -> Drawing:
    """Bars under one another; `whole` is the length of a full bar, by default the longest."""
    step, height, size = 17.0, 10.0, 8.5
    drawing = Drawing(width, step * len(rows), initialFontName=FAMILY)
    left = max(stringWidth(row.label, FAMILY, size) for row in rows) + 8
    right = max(stringWidth(row.note, FAMILY, size) for row in rows) + 8
    room = max(20.0, width - left - right)
    most = whole or max(row.value for row in rows) or 1.0
    for i, row in enumerate(rows):
        y = drawing.height - step * (i + 1) + (step - height) / 2
        length = room * row.value / most
        drawing.add(_text(left - 8, y + 2, row.label, size, anchor="end"))
        drawing.add(Rect(left, y, room, height, fillColor=HexColor("#f3f4f6"), strokeColor=None))
        drawing.add(Rect(left, y, length, height, fillColor=ACCENT if row.marked else FAINT, strokeColor=None))
        drawing.add(_text(left + room + 8, y + 2, row.note, size))
    return drawing


def tree_and_mask(width: float, example: Example) -> Drawing:
    """The example's tree on the left and its mask on the right."""
    lane, top, cell = 44.0, 34.0, 11.5  # from line to line, above the first box's lower edge, a square of the mask
    lanes = _lanes(example)
    grid = cell * len(example.words)
    labels = max(stringWidth(word, FAMILY, 8) for word in example.words) + 20
    drawing = Drawing(width, max(top + lane * max(lanes) + 12, grid + 18), initialFontName=FAMILY)
    columns = int(example.layout.depth.max()) + 2  # one more for tokens that are only predicted
    _draw_tree(drawing, example, lanes, (width - grid - labels - 14) / columns, (top, lane))
    _draw_mask(drawing, example, width - grid, cell)
    return drawing


def _lanes(example: Example) -> list[int]:
    """The line of each node: a first child goes on beside its parent, any other node opens a new line."""
    lanes: list[int] = []
    for node, parent in enumerate(example.parent):
        lanes.append(max(lanes, default=-1) + 1 if parent != node - 1 or node == 0 else lanes[-1])
    return lanes


def _draw_tree(drawing: Drawing, example: Example, lanes: list[int], step: float, lines: Point) -> None:
    layout, box = example.layout, (step - 7, 17.0)

    def corner(depth: int, line: int) -> Point:
        return depth * step, drawing.height - lines[0] - line * lines[1]

    places = [corner(int(depth), line) for depth, line in zip(layout.depth, lanes, strict=True)]
    for node, (x, y) in enumerate(places):
        if example.parent[node] >= 0:
            _connect(drawing, places[example.parent[node]], (x, y), box)
        _draw_box(drawing, (x, y), box, example.words[node])
        facts = f"{node} · {layout.depth[node]} · {layout.end[node]}"
        drawing.add(_text(x + box[0] / 2, y - 8, facts, 6.2, FAINT, "middle"))
    for node, word in example.predicted:
        place = corner(int(layout.depth[node]) + 1, lanes[node])
        _connect(drawing, places[node], place, box)
        _draw_box(drawing, place, box, word, dashed=True)


def _connect(drawing: Drawing, parent: Point, child: Point, box: Point) -> None:
    """Draws a line from the parent's right side, straight or by a step down, to the child's left side."""
    start, end = (parent[0] + box[0], parent[1] + box[1] / 2), (child[0], child[1] + box[1] / 2)
    middle = start[0] + (end[0] - start[0]) / 2
    for a, b in ((start, (middle, start[1])), ((middle, start[1]), (middle, end[1])), ((middle, end[1]), end)):
        drawing.add(Line(*a, *b, strokeColor=FAINT, strokeWidth=0.8))


def _draw_box(drawing: Drawing, place: Point, box: Point, word: str, dashed: bool = False) -> None:
    x, y = place
    style = {"strokeColor": FAINT, "strokeDashArray": [2, 2]} if dashed else {"strokeColor": ACCENT}
    drawing.add(Rect(x, y, *box, rx=3, ry=3, fillColor=None if dashed else PALE, strokeWidth=0.8, **style))
    size = min(8.5, 8.5 * (box[0] - 3) / stringWidth(word, FAMILY, 8.5))
    drawing.add(_text(x + box[0] / 2, y + 5.5, word, size, FAINT if dashed else INK, "middle"))


def _draw_mask(drawing: Drawing, example: Example, left: float, cell: float) -> None:
    top = drawing.height - 16
    for query, row in enumerate(example.visible):
        y = top - (query + 1) * cell
        drawing.add(_text(left - 6, y + 3, f"{example.words[query]}  {query}", 7.5, INK, "end"))
        drawing.add(_text(left + (query + 0.5) * cell, top + 4, str(query), 7, FAINT, "middle"))
        for key, seen in enumerate(row.tolist()):
            fill = (GREEN if key == query else ACCENT) if seen else None
            drawing.add(Rect(left + key * cell, y, cell, cell, fillColor=fill, strokeColor=RULE, strokeWidth=0.5))


def _text(x: float, y: float, text: str, size: float, color: Color = INK, anchor: str = "start") -> String:
    return String(x, y, text, fontName=FAMILY, fontSize=size, fillColor=color, textAnchor=anchor)
