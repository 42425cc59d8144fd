"""The folder a contestant hands in, made from a result directory.

./scripts/submission RESULT_DIR OUT_DIR [--image TAG]

card.png                              inference time and accuracy as a picture, in Korean
report.pdf                            the document on the method, in Korean and then in English
results.json, samples.jsonl, ...      the result's own files, byte for byte
COMMAND.txt                           the command that made the result
IMAGE.txt                             the commands that build, name and push the Docker image; for chats, also the one
                                      that runs the contest's script in it
"""

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path

from cecompile.errors import CheckError, UserError
from cecompile.report.document.document import command_line
from cecompile.report.document.make import make_report
from cecompile.report.document.words import LANGUAGES
from cecompile.results.read import read_results
from cecompile.results.write import CARD, DOCUMENT, PREDICTIONS, RESULTS, SAMPLES

COMMAND, IMAGE = "COMMAND.txt", "IMAGE.txt"
# What Docker takes: [registry[:port]/]path[:tag], the path in lower case.
TAG = re.compile(r"([\w.-]+(:\d+)?/)?[a-z0-9]+([._-]+[a-z0-9]+)*(/[a-z0-9]+([._-]+[a-z0-9]+)*)*(:[\w][\w.-]{0,127})?")
PLACEHOLDER = "YOUR_DOCKER_ID/cecompile:final"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, metavar="RESULT_DIR", help="what `cecompile eval` wrote")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="a new or an empty directory")
    parser.add_argument("--image", metavar="TAG", help="the image's address, such as docker.io/name/cecompile:final")
    options = parser.parse_args()
    for path in hand_in(options.result, options.out, options.image):
        print(path)


def hand_in(result: Path, out: Path, image: str | None) -> list[Path]:
    """Makes the folder, whole or not at all, and returns its files.

    Raises:
        UserError: the result cannot be read, `out` is not empty, or `image` is no image's name.
        CheckError: the result contradicts itself.
    """
    if image is not None and not TAG.fullmatch(image):
        raise UserError(f"--image {image}: not the name of a Docker image")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already; a new or an empty directory is needed")
    results = read_results(result)
    command, recorded = command_line(results)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            make_report(result, png=folder / CARD, pdf=folder / DOCUMENT, languages=LANGUAGES, overwrite=False)
            for name in (RESULTS, SAMPLES, PREDICTIONS):
                if (result / name).is_file():
                    shutil.copyfile(result / name, folder / name)
            note = "" if recorded else "# put together from results.json, which records no command\n"
            (folder / COMMAND).write_text(f"{note}{command}\n", encoding="utf-8")
            (folder / IMAGE).write_text(image_commands(image, (result / PREDICTIONS).is_file()), encoding="utf-8")
            folder.chmod(0o755)
            folder.replace(out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from None
    return sorted(out.iterdir())


def image_commands(image: str | None, chats: bool) -> str:
    """The commands for a shell in the repository's root. For `chats`, the last one answers the contest's rows."""
    fill_in = "" if image else f"# Put your own address in the place of {PLACEHOLDER}, here and where you hand it in.\n"
    tag = image or PLACEHOLDER
    places = '-v cecompile-cache:/cache -v "$PWD/model:/model:ro" -v "$PWD/data:/data:ro"'
    run = f"docker run --rm --runtime nvidia {places} {tag} contest /model /data/test_dataset.jsonl\n" if chats else ""
    return f"{fill_in}docker build --tag cecompile .\ndocker tag cecompile {tag}\ndocker push {tag}\n{run}"


if __name__ == "__main__":
    try:
        main()
    except (UserError, CheckError) as error:
        print(f"submission: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
