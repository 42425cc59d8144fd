"""The card and the document: what they say is what results.json says, and everything of it can be read."""

import copy
import functools
import io
import re
from decimal import Decimal
from importlib import metadata
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from pypdf import PdfReader
from reportlab.pdfbase.pdfmetrics import stringWidth
from support.documents import has, pages
from support.runs import results as results_of
from support.runs import run_command as run

from cecompile import demo
from cecompile.report import units
from cecompile.report.document.card import HEIGHT, MARGIN, WIDTH, draw_card
from cecompile.report.document.credits import USED, credits
from cecompile.report.document.document import command_line, make_document
from cecompile.report.document.example import make_example
from cecompile.report.document.fonts import FAMILY, glyphs, shown
from cecompile.report.document.words import EXAMPLES, LANGUAGES, Words, read_texts
from cecompile.results.clock import latencies
from cecompile.results.read import read_results

ROOT = Path(__file__).parents[1]
LONG = "an-organisation/" + "A-Model-Of-Which-The-Name-Goes-On-" * 6 + "70B"
ODD = "모델 $x^2$ <b>&amp;</b> 漢字 \u202egpj.\u2066 \x1b[31m 🙂 \t end"
COMPARISON = {
    "baseline": "results/reference", "max_drop": 0.5, "drop_points": {"acc": 0.7125, "acc_norm": -0.1175},
    "interval_points": {"acc": [0.2175, 1.1075], "acc_norm": None}, "agreement": 0.98765,
    "largest_difference": 0.00031, "differing": 3, "speed_ratio": 4.235, "verdict": "past",
}  # fmt: skip


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


def document(results, language: str) -> str:
    """The document's text."""
    return pages(make_document(results, [language]))


def card(results, language: str) -> str:
    """The card's texts."""
    return " | ".join(text.get_text() for text in draw_card(results, language).figure.texts)


# What is said


@pytest.mark.parametrize("language", LANGUAGES)
def test_document_has_the_results_figures(timed, language):
    r, w, text = timed, Words(language), document(timed, language)
    plan, metrics = r["plan"], r["metrics"]
    has(text, *(f"{clock} {w(f'clock.{clock}')} {written(s)}" for clock, s in r["latency_s"].items()))
    has(text, *(phase + w("seconds", value=written(s)) for phase, s in r["phases_s"].items()))
    for name in ("acc", "acc_norm"):
        has(text, f"{name} {100 * metrics[name]:.2f} {100 * metrics[name + '_stderr']:.2f}")
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
    """Seconds as the report is to write them: three significant digits below 1, two decimals below 1000, then one."""
    if seconds >= 1000:
        return f"{seconds:,.1f}"
    return f"{seconds:.2f}" if seconds >= 1 else format(Decimal(f"{seconds:.2e}"), "f")


def versions(r: dict) -> dict[str, str]:
    return r["environment"]["versions"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_card_has_the_results_figures(timed, language):
    r, texts = timed, card(timed, language)
    per_question = r["latency_s"]["inference"] / r["questions"]
    unit = "초" if language == "ko" else " s"
    has(texts, *(written(s) + unit for s in (*r["latency_s"].values(), per_question)))
    has(texts, *(f"{100 * r['metrics'][name]:.2f} %" for name in ("acc", "acc_norm")), "acc", "acc_norm", "strict")
    has(texts, f"± {100 * r['metrics']['acc_norm_stderr']:.2f}", r["model"]["fingerprint"], "LlamaForCausalLM")
    has(texts, f"| {r['model']['fingerprint'][:12]} |", "float32", "574K", r["environment"]["device"], "40")


@pytest.mark.parametrize("language", LANGUAGES)
def test_answers_are_told_of(answered, language):
    r, results = results_of(answered), read_results(answered)
    counts = {"in_tree": r["answers"]["in_tree"], "tokens": r["answers"]["tokens"]}
    method = Words(language)("method.answers", questions=5, decoded=r["answers"]["decoded_tokens"], **counts)
    exact = f"{100 * r['metrics']['exact_match']:.2f}"
    has(document(results, language), "exact_match", exact, '[{"generated_text": "..."}]', method)
    has(card(results, language), "exact_match", f"{r['answers']['in_tree']} / 5")


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_comparison_and_proofs_are_told_of(results, language):
    results["comparison"] = COMPARISON
    results["date"], results["command"] = "2026-11-23T21:34:56+09:00", ["cecompile", "eval", "--data", "my rows.jsonl"]
    results["model"] |= {
        "device_fingerprint": "ab" * 32, "verified": "equal to the checkpoint", "stored_dtypes": {"bfloat16": 39},
        "changed": {"attention": "a_function", "compiled": {"LlamaDecoderLayer": 4}, "replaced_modules": ["x.y"]},
    }  # fmt: skip
    text, words = document(results, language), Words(language)
    has(text, "0.71", "-0.12", "0.22 … 1.11", "98.77 %", "0.00031", "4.24", "reference", "2026-11-23 12:34 UTC")
    has(text, "ab" * 32, "equal to the checkpoint", "bfloat16", "a_function", "LlamaDecoderLayer × 4", "x.y")
    has(text, "cecompile eval --data 'my rows.jsonl'")
    for verdict in ("past", "within"):
        results["comparison"]["verdict"] = verdict
        said = words(f"verdict.{verdict}", max_drop="0.5", baseline="results/reference", drops="").strip()
        has(card(results, language), "0.71", said, "2026-11-23 12:34 UTC")
        has(document(results, language), words(verdict))


@pytest.mark.parametrize("language", LANGUAGES)
def test_ranks_are_told_of(results, language):
    ranks, alone = Words(language)("ranks", ranks=1024), [card(results, language), document(results, language)]
    results["ranks"] = {"size": 1024, "passes": [1] * 1024, "tokens": [9] * 1024, "devices": ["CPU"] * 1024}
    assert not [text for text in alone if ranks in text]
    has(card(results, language), ranks)
    has(document(results, language), ranks)


KINDS = {  # how questions are judged: the metrics that tell, and what the document calls them
    "true": ({"acc": 0.4321, "acc_stderr": 0.0123}, ("43.21 1.23", "43.21 %")),
    "continuation": (
        {"perplexity": 1234.5678, "perplexity_stderr": 9.876, "acc": 0.4321, "acc_stderr": 0.0123},
        ("1,234.57", "9.88", "43.21 1.23", "43.21 %"),
    ),
}


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_metrics_that_are_no_share_of_right_choices(kind, results, language):
    metrics, figures = KINDS[kind]
    results["metrics"] = dict(metrics)
    counts = {"questions": "40", "choices": "160", "data": units.short_name(results["data"]["name"])}
    has(document(results, language), Words(language)(f"task.{kind}", **counts), *figures)
    has(card(results, language), "43.21 %", *(figure for figure in figures if figure.startswith("1,")))
    if kind == "continuation":
        results["metrics"] |= dict.fromkeys(("perplexity", "perplexity_stderr"))
        assert Words(language)("no_labels") not in document(results, language)


@pytest.mark.parametrize("language", LANGUAGES)
def test_without_labels_or_plan(results, language):
    results["metrics"] = dict.fromkeys(results["metrics"])
    results["plan"], results["engine"] = None, {"name": "reference", "attention": None, "note": None}
    words = Words(language)
    has(card(results, language), words("no_labels"))
    has(document(results, language), words("no_labels"), words("method.reference"))


def test_a_command_is_put_together_where_none_was_recorded(results):
    results["command"] = None
    results["data"]["name"] = "my rows.jsonl"
    command, recorded = command_line(results)
    assert not recorded
    has(command, "cecompile eval --model", "'my rows.jsonl'", "--limit 40", "--dtype float32", "--engine eager")
    run(*command.replace("'my rows.jsonl'", str(demo.HELLASWAG)).split()[1:], "--help")


# How it is said


def test_both_languages_say_the_same_things():
    for name, text in read_texts().items():
        english, korean = text["en"], text["ko"]
        fields = [sorted(re.findall(r"(?<!\{)\{(\w+)\}", text)) for text in (english, korean)]
        assert fields[0] == fields[1], name
        assert english.count("<b>") == korean.count("<b>"), name


def test_every_character_of_both_languages_has_a_glyph():
    texts = [text for both in read_texts().values() for text in both.values()]
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
    has(document(results, language), wanted)
    texts = [t for t in draw_card(results, language).figure.texts if "$x^2$" in t.get_text()]
    assert len(texts) >= 2
    assert not any(t.get_parse_math() for t in texts)
    assert all(ord(c) in glyphs() for c in card(results, language))


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
        texts = card(case, language)  # names lose their middle, figures do not
        has(texts, *(units.seconds(s) for s in case["latency_s"].values()), case["model"]["fingerprint"])
        has(texts, units.seconds(case["headline"]["seconds"]), units.magnitude(case["model"]["parameters"]))


def test_the_two_figures_that_matter_are_large_in_a_thumbnail(results):
    for case in [results, *extremes(results)[1:3]]:
        sizes = sorted(t.get_window_extent().height * 320 / WIDTH for t in draw_card(case, "en").figure.texts)
        assert sizes[-2] > 14  # pixels at 320 across


def test_a_card_is_a_picture_with_both_figures_in_their_colours(scored, tmp_path):
    run("report", scored, "--png", tmp_path / "a.png", "--pdf", tmp_path / "a.pdf")
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
    listed = "".join(re.search(rf"^{name} = (.*?\])$", text, re.M | re.S)[1] for name in ("dependencies", "report"))
    assert {re.match(r"[\w-]+", quoted)[0] for quoted in re.findall(r'"([^"]+)"', listed)} <= set(USED)
    found = {one.name: one for one in credits(versions(results) | {"triton": "9.9"})}
    assert found["torch"].version == metadata.version("torch")
    assert found["triton"].version == "9.9"
    assert "triton" not in {one.name for one in credits({"triton": None})}
    assert all(one.licence and len(one.licence) < 200 for one in found.values() if one.name != "triton")
    has(document(results, "en"), *(f"{one.name} {one.version}" for one in credits(versions(results))), "Pretendard")
