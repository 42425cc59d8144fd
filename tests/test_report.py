"""The card and the document: what they say is what results.json says, and everything of it can be read."""

import copy
import functools
import io
import re
import runpy
import subprocess
from decimal import Decimal
from importlib import metadata
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from matplotlib.image import imread
from pypdf import PdfReader
from reportlab.pdfbase.pdfmetrics import stringWidth
from support.runs import results as results_of

from cecompile import demo
from cecompile.cli import cli
from cecompile.errors import UserError
from cecompile.report import units
from cecompile.report.document.card import HEIGHT, MARGIN, WIDTH, draw_card
from cecompile.report.document.credits import USED, credits
from cecompile.report.document.document import command_line, make_document
from cecompile.report.document.example import make_example
from cecompile.report.document.fonts import FAMILY, glyphs, shown
from cecompile.report.document.words import EXAMPLES, LANGUAGES, TEXTS, Words
from cecompile.results.clock import latencies
from cecompile.results.read import read_results

ROOT = Path(__file__).parents[1]
SUBMISSION = ROOT / "scripts" / "submission.py"
LONG = "an-organisation/" + "A-Model-Of-Which-The-Name-Goes-On-" * 6 + "70B"
ODD = "모델 $x^2$ <b>&amp;</b> 漢字 \u202egpj.\u2066 \x1b[31m 🙂 \t end"
COMPARISON = {
    "baseline": "results/reference", "max_drop": 0.5, "drop_points": {"acc": 0.7125, "acc_norm": -0.1175},
    "interval_points": {"acc": [0.2175, 1.1075], "acc_norm": None}, "agreement": 0.98765,
    "largest_difference": 0.00031, "differing": 3, "speed_ratio": 4.235, "verdict": "past",
}  # fmt: skip


def run(*arguments):
    return CliRunner().invoke(cli, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report") / "scored"
    found = run("eval", "--engine", "eager", "--device", "cpu", "--limit", 40, "--output", out)
    assert found.exit_code == 0, found.output
    return out


@pytest.fixture(scope="module")
def answered(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report") / "answered"
    found = run("eval", "--task", "chat", "--engine", "eager", "--device", "cpu", "--limit", 5, "--output", out)
    assert found.exit_code == 0, found.output
    return out


@pytest.fixture
def results(scored) -> dict:
    """A real result's fields, to be changed at will."""
    return read_results(scored)


TIMES = (
    {"load_model": 4.5678, "preprocess": 0.30456, "warmup": 12.3456, "inference": 0.98765, "score": 0.012345},
    {"load_model": 12345.678, "preprocess": 1000.04, "warmup": 0, "inference": 999.994, "score": 0.00012345},
)


@pytest.fixture(params=TIMES, ids=["short", "long"])
def timed(results, request) -> dict:
    """A real result's fields, with times that do not depend on the machine."""
    phases = request.param
    seconds = latencies(phases, [phases["inference"]])
    headline = results["headline"] | {"seconds": seconds[results["headline"]["clock"]]}
    return results | {"phases_s": phases, "latency_s": seconds, "headline": headline}


def pages(pdf: bytes) -> str:
    return "\n".join(page.extract_text() for page in PdfReader(io.BytesIO(pdf)).pages)


def card_texts(results, language="en") -> list[str]:
    return [text.get_text() for text in draw_card(results, language).figure.texts]


def has(text: str, *wanted: str) -> None:
    """All of `wanted` are in `text`, line breaks aside."""
    flat = re.sub(r"\s+", "", text)
    assert [w for w in wanted if re.sub(r"\s+", "", w) not in flat] == []


# What is said


@pytest.mark.parametrize("language", LANGUAGES)
def test_document_has_the_results_figures(timed, language):
    r = timed
    text = pages(make_document(r, [language]))
    plan, metrics = r["plan"], r["metrics"]
    w = Words(language)
    has(text, *(f"{clock} {w(f'clock.{clock}')} {written(s)}" for clock, s in r["latency_s"].items()))
    has(text, *(phase + w("seconds", value=written(s)) for phase, s in r["phases_s"].items()))
    has(
        text,
        *(f"{name} {100 * metrics[name]:.2f} {100 * metrics[name + '_stderr']:.2f}" for name in ("acc", "acc_norm")),
    )
    has(text, r["model"]["fingerprint"], r["data"]["digest"])
    has(text, *(f"{plan[name]:,}" for name in plan if name.endswith("_tokens") or name == "slots"))
    assert len(plan["buckets"]) > 1
    assert sum(b["useful_tokens"] for b in plan["buckets"]) == plan["useful_tokens"]
    for b in plan["buckets"]:
        has(text, f"{b['rows']:,} × {b['length']:,}", f"{b['readouts']:,}")
        has(text, f"{100 * b['useful_tokens'] / (b['rows'] * b['length'] * b['runs']):.2f} %")
    has(text, f"{r['model']['parameters']:,}", r["model"]["architecture"], r["model"]["dtype"], r["model"]["name"])
    peak = r["memory"]["peak_bytes"]
    has(text, f"{peak / 1e6:.1f} MB" if peak < 1e9 else f"{peak / 1e9:.2f} GB")
    has(text, r["environment"]["device"], "torch " + versions(r)["torch"])


def written(seconds: float) -> str:
    """Seconds as the report is to write them: two decimals, or three significant digits below one second.

    Of a thousand seconds and more, one decimal.
    """
    if seconds >= 1000:
        return f"{seconds:,.1f}"
    return f"{seconds:.2f}" if seconds >= 1 else format(Decimal(f"{seconds:.2e}"), "f")


def versions(r: dict) -> dict[str, str]:
    return r["environment"]["versions"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_card_has_the_results_figures(timed, language):
    r = timed
    texts = " | ".join(card_texts(r, language))
    per_question = r["latency_s"]["inference"] / r["questions"]
    unit = "초" if language == "ko" else " s"
    has(texts, *(written(s) + unit for s in (*r["latency_s"].values(), per_question)))
    has(texts, *(f"{100 * r['metrics'][name]:.2f} %" for name in ("acc", "acc_norm")), "acc", "acc_norm", "strict")
    has(texts, f"± {100 * r['metrics']['acc_norm_stderr']:.2f}", r["model"]["fingerprint"], "LlamaForCausalLM")
    has(texts, f"| {r['model']['fingerprint'][:12]} |", "float32", "574K", r["environment"]["device"], "40")


@pytest.mark.parametrize("language", LANGUAGES)
def test_answers_are_told_of(answered, language):
    r = results_of(answered)
    text = pages(make_document(read_results(answered), [language]))
    has(text, "exact_match", f"{100 * r['metrics']['exact_match']:.2f}", '[{"generated_text": "..."}]')
    has(text, Words(language)("method.answers", questions=5, in_tree=r["answers"]["in_tree"],
                              tokens=r["answers"]["tokens"], decoded=r["answers"]["decoded_tokens"]))  # fmt: skip
    has(" ".join(card_texts(read_results(answered), language)), "exact_match", f"{r['answers']['in_tree']} / 5")


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_comparison_and_proofs_are_told_of(results, language):
    results["comparison"] = COMPARISON
    results["date"], results["command"] = "2026-11-23T21:34:56+09:00", ["cecompile", "eval", "--data", "my rows.jsonl"]
    results["model"] |= {
        "device_fingerprint": "ab" * 32, "verified": "equal to the checkpoint", "stored_dtypes": {"bfloat16": 39},
        "changed": {"attention": "a_function", "compiled": {"LlamaDecoderLayer": 4}, "replaced_modules": ["x.y"]},
    }  # fmt: skip
    text = pages(make_document(results, [language]))
    has(text, "0.71", "-0.12", "0.22 … 1.11", "98.77 %", "0.00031", "4.24", "reference", "2026-11-23 12:34 UTC")
    has(text, "ab" * 32, "equal to the checkpoint", "bfloat16", "a_function", "LlamaDecoderLayer × 4", "x.y")
    has(text, "cecompile eval --data 'my rows.jsonl'")
    for verdict in ("past", "within"):
        results["comparison"]["verdict"] = verdict
        has(" ".join(card_texts(results, language)), "0.71", Words(language)(f"verdict.{verdict}", max_drop="0.5",
            baseline="results/reference", drops="").strip(), "2026-11-23 12:34 UTC")  # fmt: skip
        has(pages(make_document(results, [language])), Words(language)(verdict))


@pytest.mark.parametrize("language", LANGUAGES)
def test_ranks_are_told_of(results, language):
    one = " ".join(card_texts(results, language)), pages(make_document(results, [language]))
    results["ranks"] = {"size": 1024, "passes": [1] * 1024, "tokens": [9] * 1024, "devices": ["CPU"] * 1024}
    ranks = Words(language)("ranks", ranks=1024)
    for alone, shared in zip(
        one, (" ".join(card_texts(results, language)), pages(make_document(results, [language]))), strict=True
    ):
        assert ranks not in alone
        has(shared, ranks)


def test_without_labels_or_plan(results):
    results["metrics"] = dict.fromkeys(results["metrics"])
    results["plan"], results["engine"] = None, {"name": "reference", "attention": None, "note": None}
    for language in LANGUAGES:
        has(" ".join(card_texts(results, language)), Words(language)("no_labels"))
        has(pages(make_document(results, [language])), Words(language)("no_labels"),
            Words(language)("method.reference"))  # fmt: skip


def test_a_command_is_put_together_where_none_was_recorded(results):
    results["command"] = None
    results["data"]["name"] = "my rows.jsonl"
    command, recorded = command_line(results)
    assert not recorded
    has(command, "cecompile eval --model", "'my rows.jsonl'", "--limit 40", "--dtype float32", "--engine eager")
    assert run(*command.replace("'my rows.jsonl'", str(demo.HELLASWAG)).split()[1:], "--help").exit_code == 0


# How it is said


def test_both_languages_say_the_same_things():
    for name, (english, korean) in TEXTS.items():
        fields = [sorted(re.findall(r"(?<!\{)\{(\w+)\}", text)) for text in (english, korean)]
        assert fields[0] == fields[1], name
        assert english.count("<b>") == korean.count("<b>"), name


def test_every_character_of_both_languages_has_a_glyph():
    texts = [text for both in TEXTS.values() for text in both]
    texts += [word for context, choices in EXAMPLES.values() for words in (context, *choices) for word in words]
    assert {c for text in texts for c in text if ord(c) not in glyphs()} == set()
    ks_x_1001 = {bytes([a, b]).decode("euc-kr") for a in range(0xB0, 0xC9) for b in range(0xA1, 0xFF)}
    assert len(ks_x_1001) == 2350
    assert {c for c in ks_x_1001 if ord(c) not in glyphs()} == set()


def test_what_has_no_glyph_is_escaped():
    assert shown("한국어 café Ελλάδα") == "한국어 café Ελλάδα"
    assert shown("\u1112\u1161\u11ab") == "한"  # as macOS writes file names
    assert shown("a\u202eb\u2066\x1b\n漢🙂") == r"a\u202eb\u2066\x1b\n\u6f22\U0001f642"
    assert len(shown("x" * 10_000)) < 610


@pytest.mark.parametrize("language", LANGUAGES)
def test_odd_names_are_shown_as_they_are(results, language):
    results["model"]["name"] = results["data"]["name"] = results["environment"]["device"] = ODD
    results["command"] = ["cecompile", "eval", "--model", ODD]
    wanted = r"모델 $x^2$ <b>&amp;</b> \u6f22\u5b57 \u202egpj.\u2066 \x1b[31m \U0001f642 \t end"
    has(pages(make_document(results, [language])), wanted)
    texts = [t for t in draw_card(results, language).figure.texts if "$x^2$" in t.get_text()]
    assert len(texts) >= 2
    assert not any(t.get_parse_math() for t in texts)
    assert all(ord(c) in glyphs() for t in card_texts(results, language) for c in t)


def test_fonts_are_embedded(results):
    fonts = {}
    for page in PdfReader(io.BytesIO(make_document(results, LANGUAGES))).pages:
        for font in page["/Resources"]["/Font"].values():
            fonts[font.get_object()["/BaseFont"]] = font.get_object()
    used = {name: font for name, font in fonts.items() if name != "/Helvetica"}  # reportlab names it on every page
    assert {re.sub(r"/\w{6}\+", "", name) for name in used} == {"CecompileSans-Regular", "CecompileSans-Bold"}
    assert all("/FontFile2" in font["/FontDescriptor"] for font in used.values())


def test_the_font_has_its_licence_and_no_reserved_name():
    assert FAMILY == "Cecompile Sans"
    folder = ROOT / "cecompile" / "report" / "document" / "fonts"
    licence = (folder / "OFL.txt").read_text()
    assert "SIL OPEN FONT LICENSE Version 1.1" in licence
    assert "Reserved Font Name Pretendard" in licence
    for path in folder.glob("*.ttf"):
        assert path.stat().st_size < 1e6
        assert b"Pretendard" not in path.read_bytes()


# The pictures


def extremes(results: dict) -> list[dict]:
    """Results whose card has little room: long names, huge and tiny numbers, nothing known, a long verdict."""
    out = [copy.deepcopy(results) for _ in range(4)]
    out[0]["model"] |= {"name": LONG, "architecture": "AnArchitectureForCausalLM" * 3, "parameters": 70_553_706_496}
    out[0]["environment"]["device"] = "a device with a long name " * 4
    out[0]["data"]["name"], out[0]["task"] = "x" * 300 + ".jsonl", "t" * 200
    for case, seconds in ((out[1], 123_456_789.0), (out[2], 1.23e-8)):
        case["latency_s"] = dict.fromkeys(case["latency_s"], seconds)
        case["headline"]["seconds"] = seconds
    out[1] |= {"questions": 10**12, "comparison": COMPARISON | {"baseline": LONG, "max_drop": 12.5}}
    out[2]["metrics"] = dict.fromkeys(results["metrics"])
    out[3]["model"]["name"] = ODD
    out[3]["date"] = "2026-11-23T12:34:56+00:00"
    return out


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_text_of_a_card_is_cut_off_or_over_another(results, language):
    for case in [results, *extremes(results)]:
        canvas = draw_card(case, language)
        boxes = [t.get_window_extent() for t in canvas.figure.texts if t.get_text()]
        assert len(boxes) >= 16
        for box in boxes:
            assert box.x0 >= MARGIN - 2
            assert box.x1 <= WIDTH - MARGIN + 2
            assert 0 <= box.y0 < box.y1 <= HEIGHT
        for a, b in combinations(boxes, 2):
            assert not a.overlaps(b)
        texts = " | ".join(t.get_text() for t in canvas.figure.texts)  # names lose their middle, figures do not
        has(texts, *(units.seconds(s) for s in case["latency_s"].values()), case["model"]["fingerprint"])
        has(texts, units.seconds(case["headline"]["seconds"]), units.magnitude(case["model"]["parameters"]))


def test_the_two_figures_that_matter_are_large_in_a_thumbnail(results):
    for case in [results, *extremes(results)[1:3]]:
        sizes = sorted(t.get_window_extent().height * 320 / WIDTH for t in draw_card(case, "en").figure.texts)
        assert sizes[-2] > 14  # pixels at 320 across


def test_a_card_is_a_picture_with_both_figures_in_their_colours(scored, tmp_path):
    assert run("report", scored, "--png", tmp_path / "a.png", "--pdf", tmp_path / "a.pdf").exit_code == 0
    picture = imread(tmp_path / "a.png")
    assert picture.shape[:2] == (HEIGHT, WIDTH)
    for half, color in ((picture[:, : WIDTH // 2], (252, 211, 77)), (picture[:, WIDTH // 2 :], (110, 231, 183))):
        near = np.abs(half[..., :3] * 255 - color).max(axis=-1) < 3
        assert near.sum() > 4000


@pytest.mark.parametrize("language", LANGUAGES)
def test_extremes_fit_the_document(results, language):
    for case in extremes(results):
        reader = PdfReader(io.BytesIO(make_document(case, [language])))
        assert 3 <= len(reader.pages) <= 8
        for page in reader.pages:
            outside = []
            page.extract_text(visitor_text=functools.partial(_note_outside, outside, float(page.mediabox.width)))
            assert outside == []


def _note_outside(outside, width, text, cm, tm, font, size):
    left = tm[4] * cm[0] + cm[4]
    right = left + max(stringWidth(line, FAMILY, size * abs(tm[0])) for line in text.strip().split("\n"))
    if text.strip() and not 50 <= left <= right <= width - 50:
        outside.append((left, right, text))


def test_the_example_is_the_readmes_tree():
    example = make_example(*EXAMPLES["en"])
    assert (len(example.words), example.unshared) == (10, 21)
    assert [word for _, word in example.predicted] == [".", ".", "."]
    for node in range(10):  # a token sees its path and nothing else
        seen = np.flatnonzero(example.visible[node]).tolist()
        path, up = [], example.parent[node]
        while up >= 0:
            path.append(up)
            up = example.parent[up]
        assert seen == sorted([*path, node])


# The command


def test_report_writes_both_beside_the_result(scored, tmp_path):
    for name in ("results.json", "samples.jsonl"):
        (tmp_path / name).write_bytes((scored / name).read_bytes())
    out = run("report", tmp_path, "--lang", "ko")
    assert out.exit_code == 0, out.output
    assert out.output.splitlines() == [str(tmp_path / "card.png"), str(tmp_path / "report.pdf")]
    assert "대회 규칙" in pages((tmp_path / "report.pdf").read_bytes())
    again = run("report", tmp_path)
    assert again.exit_code == 2
    assert again.stderr == f"cecompile: {tmp_path / 'card.png'}: is there already; --overwrite replaces it\n"
    assert run("report", tmp_path, "--overwrite").exit_code == 0
    assert "The rules" in pages((tmp_path / "report.pdf").read_bytes())


def test_a_new_run_removes_the_old_ones_card(scored, tmp_path):
    from cecompile.results.write import write_samples

    for name in ("results.json", "card.png", "report.pdf"):
        (tmp_path / name).write_bytes(b"old")
    write_samples(tmp_path, [])
    assert [p.name for p in tmp_path.iterdir()] == ["samples.jsonl"]


def replaced(old: bytes, new: bytes):
    return lambda text: re.sub(old, new, text, count=1)


BROKEN = {
    "none": (None, "cannot be read: No such file or directory"),
    "cut off": (lambda text: text[:200], "damaged: "),
    "not UTF-8": (lambda text: b"\xff" + text, "damaged: not UTF-8"),
    "not a number": (replaced(rb'"runs": 1,', b'"runs": NaN,'), "damaged: NaN is no number"),
    "a list": (lambda text: b"[1]", "field 'schema': expected 1, found null"),
    "another schema": (replaced(rb'"schema": 1', b'"schema": 99'), "field 'schema': expected 1, found 99"),
    "no model": (replaced(rb'"model": {', b'"modal": {'), "field 'model': expected an object, found null"),
    "a text for a number": (
        replaced(rb'"strict": [\d.]+', b'"strict": "12 s"'),
        "field 'latency_s.strict': expected a number, found \"12 s\"",
    ),
    "an infinite time": (
        replaced(rb'"warmup": [\d.]+', b'"warmup": 1e999'),
        "field 'phases_s.warmup': expected a number up to 1e+15, found Infinity",
    ),
    "an unknown metric": (lambda text: text.replace(b'"acc', b'"bcc'), "field 'metrics': expected one of exact_match"),
    "no questions": (replaced(rb'"questions": 40', b'"questions": 0'), "field 'questions': expected at least 1"),
    "an unknown clock": (replaced(rb'"clock": "strict"', b'"clock": "x"'), "field 'headline.clock': expected one"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_result_is_refused_in_one_line(scored, tmp_path, case):
    change, message = BROKEN[case]
    if change is not None:
        (tmp_path / "results.json").write_bytes(change((scored / "results.json").read_bytes()))
    out = run("report", tmp_path)
    assert out.exit_code == 2
    assert len(out.stderr.splitlines()) == 1
    assert str(tmp_path / "results.json") in out.stderr
    assert message in out.stderr
    assert not (tmp_path / "card.png").exists()
    with pytest.raises(UserError, match=re.escape(message)):
        read_results(tmp_path)


def test_one_path_for_both_files_is_refused(scored, tmp_path):
    out = run("report", scored, "--png", tmp_path / "x", "--pdf", tmp_path / "x")
    assert out.exit_code == 2
    assert "named for both" in out.stderr
    assert run("report", scored, "--png", tmp_path, "--pdf", tmp_path / "x").exit_code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("png", "pdf", "words"),
    [
        ("x.png", "sub/../x.png", "named for both"),
        ("x.png", "link/x.png", "named for both"),
        ("old.png", "hard.png", "named for both"),
        ("result/report.pdf", None, "named for both"),
        ("result/results.json", None, "is results.json of the result"),
        ("x.png", "result/../result/samples.jsonl", "is samples.jsonl of the result"),
        ("result/predictions.jsonl", "x.pdf", "is predictions.jsonl of the result"),
        ("to results", "x.pdf", "is results.json of the result"),
    ],
)
def test_no_output_of_a_report_is_another_file_of_it(png, pdf, words, scored, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("result", "sub"):
        Path(folder).mkdir()
    for name in ("results.json", "samples.jsonl"):
        Path("result", name).write_bytes((scored / name).read_bytes())
    Path("link").symlink_to(".")
    Path("to results").symlink_to("result/results.json")
    Path("old.png").write_text("old")
    Path("hard.png").hardlink_to("old.png")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    out = run("report", "result", "--overwrite", "--png", png, *([] if pdf is None else ["--pdf", pdf]))
    assert out.exit_code == 2, out.output
    assert words in out.stderr
    assert len(out.stderr.splitlines()) == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# What the numbers look like, and whose work is credited


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0.00"), (12.345, "12.35"), (1, "1.00"), (999.994, "999.99"), (123456.78, "123,456.8"),
     (1.23e8, "1.23e+08"), (0.99961, "1.00"), (0.5, "0.500"), (0.0208, "0.0208"),
     (0.000123, "0.000123"), (0.000012345, "1.23e-05"), (1.23e-8, "1.23e-08")],
)  # fmt: skip
def test_seconds(value, text):
    assert units.seconds(value) == text


def test_magnitudes():
    found = [units.magnitude(n) for n in (999, 574_336, 1_000_000, 13_960_238_080, 70_553_706_496, 671_026_419_200)]
    assert found == ["999", "574K", "1M", "14B", "70.6B", "671B"]


def test_all_that_is_used_is_credited(results):
    text = (ROOT / "pyproject.toml").read_text()
    listed = (
        re.search(r"^dependencies = \[(.*?)^\]", text, re.M | re.S)[1] + re.search(r"^report = (.*)$", text, re.M)[1]
    )
    assert {re.match(r"[\w-]+", quoted)[0] for quoted in re.findall(r'"([^"]+)"', listed)} <= set(USED)
    found = {one.name: one for one in credits(versions(results) | {"triton": "9.9"})}
    assert found["torch"].version == metadata.version("torch")
    assert found["triton"].version == "9.9"
    assert "triton" not in {one.name for one in credits({"triton": None})}
    assert all(one.licence and len(one.licence) < 200 for one in found.values() if one.name != "triton")
    page = pages(make_document(results, ["en"]))
    has(page, *(f"{one.name} {one.version}" for one in credits(versions(results))), "Pretendard")


# The folder to hand in


def hand_in(monkeypatch, *arguments) -> int:
    monkeypatch.setattr("sys.argv", ["submission.py", *(str(a) for a in arguments)])
    try:
        runpy.run_path(str(SUBMISSION), run_name="__main__")
    except SystemExit as end:
        return end.code
    return 0


def test_submission(answered, tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "hand-in"
    assert hand_in(monkeypatch, answered, out, "--image", "docker.io/me/cecompile:final") == 0
    files = ["COMMAND.txt", "IMAGE.txt", "card.png", "predictions.jsonl", "report.pdf", "results.json", "samples.jsonl"]
    assert [str(out / name) for name in files] == capsys.readouterr().out.splitlines()
    assert sorted(p.name for p in out.iterdir()) == files
    for name in ("results.json", "samples.jsonl", "predictions.jsonl"):
        assert (out / name).read_bytes() == (answered / name).read_bytes()
    has(pages((out / "report.pdf").read_bytes()), Words("ko")("title"), Words("en")("title"))
    assert (out / "COMMAND.txt").read_text().splitlines()[-1] == command_line(read_results(answered))[0]
    assert (out / "IMAGE.txt").read_text().splitlines() == [
        "docker build --tag cecompile .",
        "docker tag cecompile docker.io/me/cecompile:final",
        "docker push docker.io/me/cecompile:final",
    ]
    assert [p.name for p in out.parent.iterdir()] == ["hand-in"]


@pytest.mark.parametrize(
    ("result", "out", "image", "message"),
    [
        ("missing", "out", None, "results.json: cannot be read: No such file or directory"),
        (None, "full", None, "full: is there already; a new or an empty directory is needed"),
        (None, "out", "Me/Bad Name", "--image Me/Bad Name: not the name of a Docker image"),
        (None, "out", "x; rm -rf /", "not the name of a Docker image"),
    ],
)
def test_submission_says_what_is_wrong(answered, tmp_path, monkeypatch, capsys, result, out, image, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    arguments = [tmp_path / result if result else answered, tmp_path / out, *(["--image", image] if image else [])]
    assert hand_in(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert message in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.process
def test_the_submission_script_is_a_shell_script_that_runs_it():
    assert subprocess.run(["bash", "-n", str(SUBMISSION.with_suffix(""))], check=False).returncode == 0
    assert SUBMISSION.with_suffix("").stat().st_mode & 0o111
