"""The document's look: fonts, styles, and the elements of a page."""

from collections.abc import Sequence
from io import BytesIO
from typing import Any
from xml.sax.saxutils import escape

from reportlab.graphics.shapes import Drawing
from reportlab.lib.colors import HexColor
from reportlab.lib.enums import TA_CENTER, TA_RIGHT
from reportlab.lib.pagesizes import A4
from reportlab.lib.styles import ParagraphStyle
from reportlab.lib.units import mm
from reportlab.pdfbase import pdfmetrics
from reportlab.pdfbase.ttfonts import TTFont
from reportlab.platypus import CondPageBreak, Flowable, KeepTogether, Paragraph, SimpleDocTemplate, Spacer, Table

from cecompile.report.document.figures import FAINT, INK, RULE
from cecompile.report.document.fonts import BOLD, FAMILY, FAMILY_BOLD, REGULAR, shown
from cecompile.report.document.words import Words

MARGIN = 20 * mm
FRAME_PADDING = 6  # reportlab's own, around what the frame holds
WIDTH = A4[0] - 2 * MARGIN - 2 * FRAME_PADDING
PALE = HexColor("#f3f4f6")

BODY = ParagraphStyle("body", fontName=FAMILY, fontSize=9.5, leading=14.5, textColor=INK, spaceAfter=5)
CELL = ParagraphStyle("cell", BODY, fontSize=8.8, leading=12.6, spaceAfter=0)
NUMBER = ParagraphStyle("number", CELL, alignment=TA_RIGHT)
HEAD = ParagraphStyle("head", CELL, fontName=FAMILY_BOLD)
HEAD_NUMBER = ParagraphStyle("head number", HEAD, alignment=TA_RIGHT)
CAPTION = ParagraphStyle("caption", BODY, fontSize=8.2, leading=11.5, textColor=FAINT, spaceBefore=5, spaceAfter=10)
CODE = ParagraphStyle(
    "code", BODY, fontSize=8.8, leading=13.5, backColor=PALE, borderPadding=6, leftIndent=6, rightIndent=6,
    spaceBefore=6, spaceAfter=12,
)  # fmt: skip
TITLE = ParagraphStyle("title", BODY, fontName=FAMILY_BOLD, fontSize=18, leading=25, spaceAfter=4)
SUBTITLE = ParagraphStyle("subtitle", BODY, fontSize=11, leading=16, textColor=FAINT, spaceAfter=10)
SECTION = ParagraphStyle(
    "section", BODY, fontName=FAMILY_BOLD, fontSize=13, leading=19, spaceBefore=12, spaceAfter=6, keepWithNext=1
)
FIGURE = ParagraphStyle("figure", CELL, fontName=FAMILY_BOLD, fontSize=24, leading=31, alignment=TA_CENTER)
GLOSS = ParagraphStyle("gloss", CELL, fontSize=8.2, leading=11.5, textColor=FAINT, alignment=TA_CENTER)


def register_fonts() -> None:
    """Registers the fonts with reportlab, which embeds them in every document."""
    for name, path in ((FAMILY, REGULAR), (FAMILY_BOLD, BOLD)):
        pdfmetrics.registerFont(TTFont(name, path))
    pdfmetrics.registerFontFamily(FAMILY, FAMILY, FAMILY_BOLD, FAMILY, FAMILY_BOLD)


def literal(value: object, limit: int = 600) -> str:
    """Markup that shows a value as it is: printable, with a glyph for each character."""
    return escape(shown(str(value), limit))


class Writer:
    """Makes paragraphs, tables and figures in one language; numbers sections and figures."""

    def __init__(self, words: Words) -> None:
        self.words = words
        self.sections = self.figures = 0

    def text(self, name: str, **fields: object) -> str:
        """A text of `words`, its fields shown literally."""
        return self.words(name, **{key: literal(value) for key, value in fields.items()})

    def texts(self, group: str, *names: str) -> list[str]:
        """Texts without fields, such as a table's heading."""
        return [self.words(f"{group}.{name}") for name in names]

    def paragraph(self, name: str, **fields: object) -> Paragraph:
        return Paragraph(self.text(name, **fields), BODY)

    def section(self, name: str, height: float = 30 * mm) -> list[Flowable]:
        """A numbered heading, on a new page where less than `height` points are left."""
        self.sections += 1
        return [CondPageBreak(height), Paragraph(f"{self.sections}. {self.words(name)}", SECTION)]

    def figure(self, drawing: Drawing, name: str, **fields: object) -> KeepTogether:
        """A drawing with a numbered caption."""
        self.figures += 1
        caption = f"{self.words('figure', figure=self.figures)} {self.text(name, **fields)}"
        return KeepTogether([Spacer(1, 6), drawing, Paragraph(caption, CAPTION)])

    def table(
        self, rows: Sequence[Sequence[str]], widths: Sequence[float], *, numbers: Sequence[int] = (), head: bool = True
    ) -> KeepTogether:
        """A table whose cells are markup.

        Args:
            rows: of cells; the first is the heading if `head`.
            widths: of the columns, as fractions of the page's width.
            numbers: the columns set flush right.
        """

        def cell(text: str, row: int, column: int) -> Paragraph:
            plain, heading = (NUMBER, HEAD_NUMBER) if column in numbers else (CELL, HEAD)
            return Paragraph(text, heading if head and row == 0 else plain)

        cells = [[cell(text, r, c) for c, text in enumerate(row)] for r, row in enumerate(rows)]
        style: list[Any] = [("VALIGN", (0, 0), (-1, -1), "TOP"), ("LINEBELOW", (0, 0), (-1, -1), 0.4, RULE)]
        for side, points in (("TOP", 2.5), ("BOTTOM", 3.5), ("LEFT", 4), ("RIGHT", 4)):
            style.append((f"{side}PADDING", (0, 0), (-1, -1), points))
        if head:
            style += [("BACKGROUND", (0, 0), (-1, 0), PALE), ("LINEBELOW", (0, 0), (-1, 0), 0.8, FAINT)]
        table = Table(cells, [WIDTH * w for w in widths], style=style, hAlign="LEFT", repeatRows=int(head))
        return KeepTogether([table, Spacer(1, 9)])

    def summary(self, figures: Sequence[tuple[str, str]]) -> Table:
        """The main figures in large type, each above its explanation."""
        room = WIDTH / len(figures) - 14
        cells = [[[Paragraph(big, _fitted(FIGURE, big, room)), Paragraph(gloss, GLOSS)] for big, gloss in figures]]
        style = [("BACKGROUND", (0, 0), (-1, -1), PALE), ("BOTTOMPADDING", (0, 0), (-1, -1), 9)]
        return Table(cells, [WIDTH / len(figures)] * len(figures), style=style, spaceAfter=10)


def _fitted(style: ParagraphStyle, text: str, width: float) -> ParagraphStyle:
    """The style, made smaller where the text would not fit on one line."""
    needed = pdfmetrics.stringWidth(text, style.fontName, style.fontSize)
    return ParagraphStyle("fitted", style, fontSize=style.fontSize * min(1.0, width / needed))


def typeset(story: list[Flowable], title: str, footer: str) -> bytes:
    """The PDF of a story on A4, with a footer and the page's number on every page."""

    def draw_footer(canvas: Any, _: Any) -> None:
        canvas.setFont(FAMILY, 7.5)
        canvas.setFillColor(FAINT)
        canvas.drawString(MARGIN + FRAME_PADDING, 11 * mm, footer)
        canvas.drawRightString(A4[0] - MARGIN - FRAME_PADDING, 11 * mm, str(canvas.getPageNumber()))

    out = BytesIO()
    frame = {"leftMargin": MARGIN, "rightMargin": MARGIN, "topMargin": 18 * mm, "bottomMargin": 20 * mm}
    document = SimpleDocTemplate(out, pagesize=A4, title=title, creator="cecompile", **frame)
    document.build(story, onFirstPage=draw_footer, onLaterPages=draw_footer)
    return out.getvalue()
