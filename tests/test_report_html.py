"""The page for readers: whole, harmless, and equal to the files that it is made from."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import get_data_path
from PIL import Image, ImageFont

from evaluated_run import ATTACKS, FLAGS, write_evaluation
from mixadv.report import page as page_module
from mixadv.report.citations import papers_of
from mixadv.report.figures.evaluation import evaluation_figures
from mixadv.report.files import read_run
from mixadv.report.page import CHECKS, write_report
from trained_run import write_run

EIGHT = (0.1, 0.2, 0.05, 0.15, 0.1, 0.1, 0.1, 0.2)
VOID = {"meta", "img", "br", "link", "input", "hr", "base"}
HOSTILE = '</title><script>alert(\'1\')</script><img src="http://evil.example/x.png" onerror=alert(2)> & "q" \x07\ud800'


class Page(HTMLParser):
    """What a browser would find: elements, tables as cells with their text and exact values, all text."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[tuple[str, list[float]]]]] = {}
        self.text = ""
        self.style = ""
        self._caption = ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "caption":
            self._caption = ""
        if tag == "tr":
            self.tables.setdefault(self._caption, []).append([])
        if tag in ("td", "th"):
            self.tables[self._caption][-1].append(("", []))
        if tag == "data" and "table" in self.open:
            self.tables[self._caption][-1][-1][1].append(float(dict(attrs)["value"] or ""))

    def handle_endtag(self, tag: str) -> None:
        assert tag not in VOID
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            self.style += data
            return
        self.text += data
        if "caption" in self.open:
            self._caption += data
        elif "td" in self.open or "th" in self.open:
            words, values = self.tables[self._caption][-1][-1]
            self.tables[self._caption][-1][-1] = (words + data, values)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def rows(self, caption: str) -> dict[str, list[tuple[str, list[float]]]]:
        """First cell of every row -> the other cells."""
        return {row[0][0]: row[1:] for row in self.tables[caption]}


CLASSIFIERS, ACCURACY = "Clean and robust accuracy", "Accuracy per attack"
COST, FOUND = "Cost and settings", "Images by the attack that found their worst case first"


def read(path: Path) -> Page:
    return Page((path / "report.html").read_text(encoding="utf-8"))


def pixel(build: Callable[[], Any], path: Path) -> Path:
    """In the place of `save`, for tests that do not look at figures: one white pixel."""
    Image.new("L", (1, 1), 255).save(path, format="png")
    return path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "save", pixel)


def edit(path: Path, **changes: Any) -> dict[str, Any]:
    file = path / "results.json"
    results = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in results.items() if value is not ...}))
    return results


def harmless(page: Page) -> None:
    """Nothing runs, nothing is loaded, and links lead to the papers alone."""
    assert {name for name, _ in page.elements} <= {
        *("html", "head", "meta", "title", "style", "body", "main", "header", "section", "h1", "h2", "p", "div"),
        *("strong", "code", "data", "table", "caption", "thead", "tbody", "tr", "th", "td", "ul", "li", "dl", "dt"),
        *("dd", "figure", "figcaption", "img", "details", "summary", "pre", "a"),
    }
    for _, attributes in page.elements:
        assert not [key for key in attributes if key.startswith("on") or key in ("style", "srcset", "background")]
        assert (attributes.get("src") or "data:image/png;base64,").startswith("data:image/png;base64,")
        assert (attributes.get("href") or "https://arxiv.org/abs/").startswith("https://arxiv.org/abs/")
    assert not re.search(r"url\(|@import|expression", page.style)
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


# The page ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Page]:
    """A page with all its figures."""
    path = tmp_path_factory.mktemp("whole") / "run"
    results = write_evaluation(path)
    assert write_report(path) == path / "report.html"
    return path, results, read(path)


def test_figures_are_inside_the_page(whole: tuple[Path, dict[str, Any], Page]) -> None:
    path, results, page = whole
    images = page.all("img")
    for name, image in zip(("attacks.png", "eps.png", "steps.png", "examples.png"), images, strict=True):
        kind, data = (image["src"] or "").split(",")
        assert kind == "data:image/png;base64"
        raw = base64.b64decode(data, validate=True)
        assert raw == (path / name).read_bytes()
        with Image.open(io.BytesIO(raw)) as picture_:
            picture_.load()
            assert picture_.format == "PNG"
            assert picture_.size == (int(image["width"] or 0), int(image["height"] or 0))
            assert picture_.size[0] == 1400
    alts = [image["alt"] or "" for image in images]
    for name in ATTACKS:
        assert f"{name} {100 * results['attacks'][name]['expected_accuracy']:.1f} %" in alts[0]
    assert "mixture from 83.0 % at ε = 0 to 0.5 % at ε = 64/255" in alts[1]
    assert "member 2 from 0.800 at 0 steps to 2.100 at 100 steps" in alts[2]
    assert "airplane: all members right; a rather long name of a class of things: all members wrong" in alts[3]


def test_the_page_is_whole_and_harmless(whole: tuple[Path, dict[str, Any], Page]) -> None:
    path, _, page = whole
    source = (path / "report.html").read_text(encoding="utf-8")
    assert source.startswith("<!DOCTYPE html>\n<html")
    assert page.all("html") == [{"lang": "en"}]
    harmless(page)
    metas = page.all("meta")
    assert {"charset": "utf-8"} in metas
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in metas
    assert "prefers-color-scheme: dark" in page.style
    assert page.style.count("{") == page.style.count("}")
    for element in ("table", "img"):
        assert len(page.all(element)) > 2
    scrolling = [d for d in page.all("div") if d.get("class") == "scroll"]
    assert len(scrolling) == len(page.all("table")) + len(page.all("img"))
    assert not list(path.glob(".*"))


def test_the_sections_come_in_their_order(whole: tuple[Path, dict[str, Any], Page]) -> None:
    source = (whole[0] / "report.html").read_text(encoding="utf-8")
    titles = re.findall(r"<h[12]>(.*?)</h[12]>", source)
    assert titles == [
        *("Robustness of a mixture of 3 classifiers", "Reasons for doubt", "Classifiers", "Attacks", "The game"),
        *("Figures", "How it was measured", "How to cite"),
    ]
    assert "CIFAR-10 · ℓ∞, ε = 8/255 · protocol strict · 400 of 10,000 test images" in whole[2].text


def test_headline_and_game_give_the_numbers_of_the_results(whole: tuple[Path, dict[str, Any], Page]) -> None:
    _, results, page = whole
    robust = results["robust"]
    low, high = (f"{100 * end:.1f}" for end in robust["ci95"])
    percent = f"{100 * robust['expected_accuracy']:.1f}"
    assert f"Robust accuracy at most {percent} %, 95 % interval {low} to {high} %" in page.text
    assert "upper bound" in page.text
    game = results["game"]
    assert f"Risk of these weights on all points found: {game['value_at_weights']:.4f}." in page.text
    assert f"these points: {game['value_lp']:.4f}." in page.text
    assert f"Regret of these weights on these points: {game['gap']:.4f}." in page.text
    assert f"Matching-penny gap: {game['matching_penny_gap']:.4f}." in page.text
    members = np.array([member["robust"] for member in results["members"]])
    assert f"exceeds {members.max() - np.array(results['weights']) @ members:.4f}" in page.text


@pytest.mark.parametrize("weights", [(1.0,), (0.5, 0.2, 0.3), EIGHT], ids=["one", "three", "eight"])
def test_the_tables_equal_the_results(tmp_path: Path, quick: None, weights: tuple[float, ...]) -> None:
    results = write_evaluation(tmp_path / "run", weights=weights)
    write_report(tmp_path / "run")
    page, single = read(tmp_path / "run"), len(weights) == 1
    harmless(page)
    rows = page.rows(CLASSIFIERS)
    wanted: dict[str, list[list[float]]] = {}
    for k, member in enumerate([] if single else results["members"]):
        wanted[f"member {k}"] = [[member["robust"], *member["ci95"]], [member["clean"]], [results["weights"][k]]]
    both = [[results[m]["expected_accuracy"], *results[m]["ci95"]] for m in ("robust", "clean")]
    wanted["model" if single else "mixture"] = [*both, []]
    twin = results["averaged_twin"]
    wanted |= {} if single else {"averaged twin": [[twin["robust"], *twin["ci95"]], [twin["clean"]], []]}
    assert {name: [values for _, values in cells] for name, cells in rows.items() if name} == wanted

    head, *body = page.tables[ACCURACY]
    titles = [words for words, _ in head]
    assert [row[0][0] for row in body] == list(results["attacks"])
    for row in body:
        entry, cells = results["attacks"][row[0][0]], dict(zip(titles, row, strict=True))
        mean, low, high = cells["model % [95 %]" if single else "mixture % [95 %]"][1]
        assert mean == entry["expected_accuracy"]
        assert low < mean < high
        assert cells["worst found"] == (str(entry["worst_found"]), [entry["worst_found"]])
        if single:
            assert len(cells) == 3
            continue
        known = {"averaged twin %": [entry["averaged_twin"]], "from parts %": [entry["replayed_from_parts"]]}
        known["members %"] = entry["members"]
        assert len(known) + 3 == len(cells)
        for title, values in known.items():
            shown = (" ".join(f"{100 * value:.1f}" for value in values), values) if values[0] is not None else ("–", [])
            assert cells[title] == shown
    for name, (seconds, on_parts, settings) in list(page.rows(COST).items())[1:]:
        entry = results["attacks"][name]
        assert (seconds[1], on_parts[1]) == ([entry["seconds"]], [entry["seconds_on_parts"]])
        assert all(str(v) in settings[0] for k, v in entry["settings"].items() if k not in ("_target_", "objective"))


@pytest.mark.parametrize("weights", [(0.5, 0.2, 0.3), EIGHT], ids=["three", "eight"])
def test_who_found_the_worst_cases_adds_up(tmp_path: Path, quick: None, weights: tuple[float, ...]) -> None:
    results = write_evaluation(tmp_path / "run", weights=weights)
    with np.load(tmp_path / "run" / "records.npz") as file:
        records = dict(file)
    found = [str(name) for name in records["found_by"]]
    found[:3] = ["arc on other weights 1", "arc on other weights 0", "arc on other weights 0"]
    np.savez(tmp_path / "run" / "records.npz", **{**records, "found_by": np.array(found)})
    write_report(tmp_path / "run")
    page = read(tmp_path / "run")
    head, *body = page.tables[FOUND]
    assert [words for words, _ in head] == [
        "attack",
        *(f"on {target}" for target in ("mixture", "members", "averaged twin", "other weights")),
    ]
    assert [row[0][0] for row in body] == list(results["attacks"])
    for row in body:
        name = row[0][0]
        on_members = sum(f.startswith(f"{name} on member ") for f in found)
        others = sum(f.startswith(f"{name} on other") for f in found)
        counts = [found.count(name), on_members, found.count(f"{name} on averaged twin"), others]
        assert [values for _, values in row[1:]] == [[count] for count in counts]
    assert f"than the clean image itself: {found.count('clean')}." in page.text


def test_what_was_used_is_named_and_cited(whole: tuple[Path, dict[str, Any], Page]) -> None:
    _, results, page = whole
    links = [link["href"] for link in page.all("a")]
    numbers = ("2102.06905", "2003.01690", "1912.00049", "2206.06737", "1706.06083")
    assert links == [f"https://arxiv.org/abs/{n}" for n in numbers]
    assert "Mixed Nash Equilibria in the Adversarial Examples Game. ICML 2021" in page.text
    known = (results[key] for key in ("git", "device", "date", "command"))
    for fact in (*known, "torch 2.8.0", "evaluate 61.5", "outputs/train/quickstart"):
        assert fact in page.text
    assert json.dumps(results["config"], indent=2) in page.text
    assert [words[:4] for words, _ in papers_of(["pgd-20", "pgd-100", "noise"])] == ["PGD:"]
    assert papers_of(["subsets", "apgdx"]) == []


# Reasons for doubt ------------------------------------------------------------------------------------------


def test_flags_come_with_evidence_and_remedy(tmp_path: Path, quick: None) -> None:
    write_evaluation(tmp_path / "run")
    edit(tmp_path / "run", flags=[*FLAGS, {"evidence": "without a name"}], checks=["zero-gradients", FLAGS[0]["name"]])
    write_report(tmp_path / "run")
    page = read(tmp_path / "run")
    assert len([d for d in page.all("div") if d.get("class") == "flag"]) == 2
    for words in (*FLAGS[0].values(), CHECKS[FLAGS[0]["name"]], "without a name"):
        assert words in page.text
    assert "No flag was raised" not in page.text
    assert f"Checked: zero-gradients, {FLAGS[0]['name']}." in page.text
    assert "Not checked: non-finite-logits, saturated-logits, probabilities, random-outputs," in page.text


def test_flags_of_members_that_are_never_drawn_come_last(tmp_path: Path, quick: None) -> None:
    write_evaluation(tmp_path / "run", weights=(0.5, 0.0, 0.5, 0.0))
    evidence = {
        "zero-gradients": ("member 3: the gradient of the cross-entropy is 0 on 100.0% of the images", True),
        "saturated-logits": ("members 1, 3: on 40.0%, 50.0% of the images", True),
        "probabilities": ("members 0, 1: the logits sum to 1", False),
        "non-finite-logits": ("member 1: logits; member 2: logits", False),
        "more-steps-do-not-hurt": ("the mixture: 0.1; member 3: 0.2", False),
        "noise-beats-pgd": ("noise found what pgd-20 missed on 3 of 400 images", False),
    }
    flags = [{"name": name, "evidence": text, "remedy": "Look."} for name, (text, _) in evidence.items()]
    edit(tmp_path / "run", flags=flags)
    write_report(tmp_path / "run")
    text = read(tmp_path / "run").text
    places = {name: text.index(words) for name, (words, _) in evidence.items()}
    assert sorted(places, key=lambda name: places[name]) == [*list(evidence)[2:], *list(evidence)[:2]]
    assert text.count("Only about members of weight 0") == 2
    assert text.index("Only about members of weight 0") > places["noise-beats-pgd"]


def test_members_have_their_names_in_tables_and_figures_and_their_sources_on_the_page(tmp_path: Path) -> None:
    results = write_evaluation(tmp_path / "run")
    names = ("plain", "a/rather/long/folder/with/resnet-18.pt", "mixer")
    members = [
        {**member, "name": name, "source": f"/data/{name}", "note": "normalised inside"}
        for member, name in zip(results["members"], names, strict=True)
    ]
    edit(tmp_path / "run", members=members, content="0123abcd", config={"task": "evaluate", "members": ["x"]})
    write_report(tmp_path / "run")
    page, run = read(tmp_path / "run"), read_run(tmp_path / "run")
    for k, name in enumerate(names):
        assert f"member {k}: {name}, /data/{name}, normalised inside" in page.text
        assert f"member {k}: {name}" in page.rows(CLASSIFIERS)
    assert "0123abcd" in page.text
    assert "not recorded" not in page.text[page.text.index("Mixture") : page.text.index("Trained with")]
    for build in evaluation_figures(run, None).values():
        labels = {text.get_text() for legend in build().legends for text in legend.get_texts()}
        assert {"0: plain", "1: …/resnet-18.pt", "2: mixer"} <= labels


@pytest.mark.parametrize("weights", [(1.0,), EIGHT], ids=["one", "eight"])
def test_a_phone_shows_the_robust_accuracy_without_scrolling(
    tmp_path: Path, quick: None, weights: tuple[float, ...]
) -> None:
    write_evaluation(tmp_path / "run", weights=weights)
    write_report(tmp_path / "run")
    page = read(tmp_path / "run")
    heading, *body = page.tables[CLASSIFIERS]
    assert [words for words, _ in heading][:2] == ["", "robust % [95 %]"]
    # The widest of the fonts that the page names, at 0.92 rem; names may break, up to 9 rem.
    bold = ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf", 15)
    robust = max(bold.getlength(row[1][0]) for row in [heading, *body])
    name = min(9 * 16, max(bold.getlength(row[0][0]) for row in body))
    assert name + robust + 3 * 8 <= 390 - 2 * 16
    # What is beyond the edge can be scrolled to, and a shadow says so.
    assert "overflow-x: auto" in page.style
    assert page.style.count("no-repeat scroll") == page.style.count("no-repeat local") == 2


def test_without_flags_the_page_says_what_was_checked(tmp_path: Path, quick: None) -> None:
    write_evaluation(tmp_path / "run")
    for checks, words in (
        (list(CHECKS), f"Checked: {', '.join(CHECKS)}."),
        ([], "Checked: nothing."),
        (..., f"Not recorded which of these checks ran: {', '.join(CHECKS)}."),
    ):
        edit(tmp_path / "run", checks=checks)
        write_report(tmp_path / "run")
        said = read(tmp_path / "run").text
        assert "No flag was raised." in said
        assert words in said
        assert ("Not checked" in said) == (checks == [])
    edit(tmp_path / "run", flags=...)
    write_report(tmp_path / "run")
    said = read(tmp_path / "run").text
    assert "Flags are not recorded" in said
    assert "No flag was raised" not in said


# What files may hold ----------------------------------------------------------------------------------------


def test_text_from_files_stays_text(tmp_path: Path, quick: None) -> None:
    path = tmp_path / "run"
    results = write_evaluation(path)
    settings = {HOSTILE: HOSTILE}
    attacks = {f"{name} {HOSTILE}": {**entry, "settings": settings} for name, entry in results["attacks"].items()}
    edit(
        path,
        **dict.fromkeys(("protocol", "device", "git", "task"), HOSTILE),
        attacks=attacks,
        data={"name": HOSTILE, "num_test": 10_000},
        threat_model={"norm": HOSTILE, "eps": 0.25},
        versions={HOSTILE: HOSTILE},
        seconds={HOSTILE: 3.0},
        config={"mixture": HOSTILE, HOSTILE: [HOSTILE]},
        flags=[{"name": HOSTILE, "evidence": HOSTILE, "remedy": HOSTILE}],
        checks=[HOSTILE],
    )
    with np.load(path / "records.npz") as file:
        records = dict(file)
    records["found_by"][0] = '<b onclick="x">on'[: records["found_by"].dtype.itemsize // 4]
    np.savez(path / "records.npz", **records)
    with np.load(path / "examples.npz") as file:
        pictures = dict(file)
    np.savez(path / "examples.npz", **{**pictures, "labels": np.array([HOSTILE.replace("\ud800", "")] * 5)})
    (path / "DONE").unlink()
    (path / "FAILED").write_text(HOSTILE.replace("\ud800", ""))
    write_report(path)
    page = read(path)
    harmless(page)
    shown = "".join(c if c.isprintable() else " " for c in HOSTILE)
    assert page.text.count(shown) > 20
    (alt,) = [image["alt"] for image in page.all("img") if "images, each clean" in (image["alt"] or "")]
    assert alt is not None
    assert alt.count(shown[:-1]) == 5


def test_a_hostile_name_is_drawn_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "run"
    write_evaluation(path, weights=(1.0,), pictures=0)
    edit(path, data={"name": HOSTILE}, curves=...)
    write_report(path)
    harmless(read(path))
    assert (path / "attacks.png").stat().st_size > 10_000


# Where an entry is, and something that it cannot be.
WRONG = [
    (("weights",), [None, 0.5, 0.5]),
    (("num_examples",), "x"),
    (("L",), 10**400),
    (("clean",), []),
    (("robust",), 3),
    (("robust", "expected_accuracy"), math.nan),
    (("robust", "ci95"), [0.1]),
    (("averaged_twin",), "x"),
    (("averaged_twin", "ci95"), ["x", 1]),
    (("members",), {}),
    (("members", 1), "x"),
    (("members", 1, "robust"), True),
    (("attacks",), []),
    (("attacks", "arc"), 3),
    (("attacks", "apgd-ce", "members"), [0.5, "x", 0.5]),
    (("attacks", "apgd-ce", "worst_found"), 1.5),
    (("attacks", "apgd-ce", "settings"), []),
    (("game", "gap"), "x"),
    (("threat_model",), "x"),
    (("threat_model", "eps"), [0.1]),
    (("data", "num_test"), True),
    (("device",), 3),
    (("versions", "torch"), 2.8),
    (("seed",), "0"),
    (("seconds", "total"), None),
    (("config",), "x"),
    (("flags",), [3]),
    (("checks",), "x"),
    (("curves", "eps"), {"eps": [0, 0.1], "mixture": [1]}),
    (("curves", "steps"), 3),
]


def changed(results: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A copy of `results` in which `path` holds `value`, or is gone where that is `...`."""
    copy = json.loads(json.dumps(results))
    node = copy
    for key in path[:-1]:
        node = node[key]
    if value is ...:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return copy


@pytest.mark.parametrize(("path", "value"), WRONG, ids=lambda part: str(part)[:40])
def test_damaged_entries_are_named_and_the_rest_is_shown(
    tmp_path: Path, quick: None, path: tuple[Any, ...], value: Any
) -> None:
    results = {**write_evaluation(tmp_path / "run", pictures=0, count=40), "checks": list(CHECKS)}
    (tmp_path / "run" / "results.json").write_text(json.dumps(changed(results, path, value)))
    run = page_module.opened(tmp_path / "run")
    write_report(run)
    page = read(tmp_path / "run")
    harmless(page)
    name = ".".join(str(key) for key in path).replace(".1", "[1]")
    if value is not None:
        assert f"Damaged: {tmp_path / 'run' / 'results.json'}: {name}" in page.text
    # The sections of what is not damaged.
    if path[0] not in ("attacks",):
        assert list(page.rows(COST))[1:] == list(results["attacks"])
    if path[0] not in ("robust", "members"):
        assert f"Robust accuracy at most {100 * results['robust']['expected_accuracy']:.1f} %" in page.text
    # Figures stand what pages stand.
    for build in page_module.evaluation_figures(run, None).values():
        build()


@pytest.mark.parametrize("path", [path for path, _ in WRONG], ids=str)
def test_missing_entries_are_no_damage(tmp_path: Path, quick: None, path: tuple[Any, ...]) -> None:
    results = {**write_evaluation(tmp_path / "run", pictures=0, count=40), "checks": list(CHECKS)}
    if path == ("members", 1):
        path = ("members",)
    (tmp_path / "run" / "results.json").write_text(json.dumps(changed(results, path, ...)))
    write_report(tmp_path / "run")
    page = read(tmp_path / "run")
    harmless(page)
    assert "results.json: " not in page.text


def test_what_is_not_there_is_said(tmp_path: Path, quick: None) -> None:
    path = tmp_path / "run"
    write_evaluation(path, pictures=0)
    edit(path, game=None, curves=..., robust=..., attacks=..., device=...)
    (path / "records.npz").unlink()
    write_report(path)
    said = read(path).text
    for words in (
        "Robust accuracy: not measured.",
        "No attack is recorded.",
        "Not computed in this run.",
        "No data for: attacks.png, eps.png, steps.png, examples.png.",
        "Hardwarenot recorded",
    ):
        assert words in said
    assert "Damaged" not in said


def test_damage_is_told_at_the_top(tmp_path: Path, quick: None) -> None:
    path = tmp_path / "run"
    write_evaluation(path)
    (path / "examples.npz").write_bytes(b"PK no archive")
    (path / "curves.png").write_bytes(b"no picture")
    with np.load(path / "records.npz") as file:
        stale = {**file, "robust": file["robust"] * 0.9}
    np.savez(path / "records.npz", **stale)
    edit(path, curves={"eps": 3})
    write_report(path)
    said = read(path).text
    top = said[: said.index("Robust accuracy at most")]
    for words in ("examples.npz cannot be read", "curves.eps is not an object", "not a png"):
        assert words in top
    assert "records.npz does not match the results.json" in top
    assert "does not contain which attack found each worst case" in said


def test_runs_in_every_state_have_a_page(tmp_path: Path, quick: None) -> None:
    for state, words in (
        ("FAILED", "This run is failed: the loss became NaN in step 17."),
        ("", "This run is unfinished."),
    ):
        path = write_run(tmp_path / f"run{state}", state=state)
        write_report(path)
        page = read(path)
        harmless(page)
        assert words in page.text
        assert "Robust accuracy: not measured." in page.text
    (tmp_path / "empty").mkdir()
    write_report(tmp_path / "empty")
    assert "data and threat model unknown" in read(tmp_path / "empty").text


def test_a_run_of_training_has_its_baseline_and_curves(tmp_path: Path, quick: None) -> None:
    path = write_run(tmp_path / "run")
    write_run(path / "baseline", weights=[1.0], robust=0.42, noise=5)
    Image.new("RGB", (14, 6)).save(path / "curves.png")
    write_report(path)
    page = read(path)
    harmless(page)
    base = json.loads((path / "baseline" / "results.json").read_text())
    robust, clean, _ = page.rows(CLASSIFIERS)["baseline (one model)"]
    assert clean[1] == [base["clean"]["expected_accuracy"], *base["clean"]["ci95"]]
    assert robust[1] == [base["robust"]["expected_accuracy"], *base["robust"]["ci95"]]
    assert "Mixture minus baseline:" in page.text
    assert (page.all("img")[-1]["width"], page.all("img")[-1]["height"]) == ("14", "6")
    assert "black box" in page.text


def test_the_page_is_replaced_whole_or_not_at_all(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run"
    write_evaluation(path, pictures=0)
    write_report(path)
    before = (path / "report.html").read_bytes()

    def torn(self: Path, data: str, **kwargs: Any) -> int:
        with open(self, "w", encoding="utf-8") as file:
            file.write(data[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", torn)
    with pytest.raises(KeyboardInterrupt):
        write_report(path)
    assert (path / "report.html").read_bytes() == before
    assert not list(path.glob(".*"))
