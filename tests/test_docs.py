"""README and docs/: links lead somewhere, tests and scripts exist, commands take the options that are shown."""

import re
import shlex
from pathlib import Path

import pytest

from cecompile.cli import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LAUNCHER = re.compile(r"^torchrun .*?-m (?=cecompile )")
IN_THE_IMAGE = re.compile(r"^run (?=[a-z])")  # docs/jetson.md's short name for the command in the image
page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def anchors(path: Path) -> set[str]:
    """Names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(path: Path) -> list[list[str]]:
    """The words of each command in a page's blocks without a language."""
    blocks = re.findall(r"^```\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    known = [IN_THE_IMAGE.sub("cecompile ", LAUNCHER.sub("", line)) for line in lines]
    return [shlex.split(line, comments=True) for line in known if re.match(r"cecompile [a-z]|python ", line)]


def options(words: list[str]) -> set[str]:
    return {word for word in words if word.startswith("--") and word != "--"}


def taken_by(command: str) -> set[str]:
    return {option for parameter in cli.commands[command].params for option in parameter.opts}


def test_readme_is_read_in_minutes():
    assert len(PAGES[0].read_text().splitlines()) <= 200


@page
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


@page
def test_files_and_tests_exist(page):
    text = page.read_text()
    for name in set(re.findall(r"\b(?:tests|scripts)/[\w./]*\w", text)):
        assert (ROOT / name).exists(), name
    tests = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    for name in set(re.findall(r"`(test_\w+)`", text)):
        assert f"def {name}(" in tests, name


@page
def test_commands_take_the_options_shown(page):
    for program, name, *rest in commands(page):
        if program == "cecompile":
            shown = rest[: rest.index("--")] if "--" in rest else rest
            assert options(shown) <= taken_by(name), (name, rest)
        else:  # some scripts hand their options on to `cecompile eval`
            quoted = set(re.findall(r'"(--[\w-]+)"', (ROOT / name).read_text()))
            assert options(rest) <= quoted | taken_by("eval"), (name, rest)
