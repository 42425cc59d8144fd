"""Writes a result's card and document as files."""

from collections.abc import Sequence
from pathlib import Path

from cecompile.errors import CheckError, UserError
from cecompile.report.document.card import draw_card
from cecompile.report.document.document import make_document
from cecompile.results.check import problems
from cecompile.results.read import read_results
from cecompile.results.write import CARD, DOCUMENT, PREDICTIONS, RESULTS, SAMPLES, same_file, write_whole


def make_report(
    directory: Path, *, png: Path | None = None, pdf: Path | None = None, languages: Sequence[str], overwrite: bool
) -> tuple[Path, Path]:
    """Writes a result's card and document.

    Args:
        directory: a result directory.
        png, pdf: the files to write; None is card.png and report.pdf in `directory`.
        languages: of the document, one after another; the card is in the first.
        overwrite: replaces existing files.

    Returns:
        The paths of both.

    Raises:
        UserError: the directory holds no result, a file exists already, or the file system refuses.
        CheckError: the result contradicts itself.
    """
    results = read_results(directory)
    wrong = problems(directory)
    if wrong:
        raise CheckError("; ".join(wrong))
    png, pdf = png or directory / CARD, pdf or directory / DOCUMENT
    if same_file(png, pdf):
        raise UserError(f"{png}: named for both the card and the document")
    for path in (png, pdf):
        own = next((name for name in (RESULTS, SAMPLES, PREDICTIONS) if same_file(path, directory / name)), None)
        if own is not None:
            raise UserError(f"{path}: is {own} of the result; choose another file")
        if path.is_dir():
            raise UserError(f"{path}: is a directory; a file is needed")
        if path.exists() and not overwrite:
            raise UserError(f"{path}: is there already; --overwrite replaces it")
    card, document = draw_card(results, languages[0]).png(), make_document(results, languages)
    write_whole(png, [card])
    if same_file(png, pdf):  # as names that differ in case are, where the file system knows no case
        raise UserError(f"{pdf}: is the file of the card, which was written; choose another --pdf")
    write_whole(pdf, [document])
    return png, pdf
