"""README and docs: every command composes, the examples run, and pages, numbers and links fit the program."""

import csv
import json
import pkgutil
import re
import shlex
import sys
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

import mixadv
from conftest import TINY, run_command
from mixadv import config
from mixadv.checkpoint_files import read_checkpoint
from mixadv.data.digits import Digits
from mixadv.unknown_keys import REFUSED, RENAMED

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = sorted((ROOT / "docs").glob("*.md"))
TOURS = (
    *("README.md", "benchmarks/README.md"),
    *(f"docs/{name}.md" for name in ("configuration", "sweeps", "evaluation", "reliability")),
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELL = ("", "bash", "sh", "shell", "console")


def blocks(page, *languages):
    """The fenced blocks of a page in one of the languages."""
    return [text for language, text in FENCE.findall((ROOT / page).read_text()) if language in languages]


def shell_lines(page):
    """The lines of the page's shell blocks, continued lines joined."""
    return [
        line.strip()
        for block in blocks(page, *SHELL)
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip()
    ]


def commands(page="README.md"):
    """The arguments of every `python run.py` and `mixadv` line in the page's shell blocks, as a shell splits them."""
    found = []
    for line in shell_lines(page):
        words = shlex.split(line, comments=True)
        words = words[1:] if words[:1] == ["srun"] else words
        if words[:2] == ["python", "run.py"] or words[:1] == ["mixadv"]:
            found.append(words[2 if words[0] == "python" else 1 :])
    return found


def python_block(page, *texts):
    """The one Python block of the page that holds these texts."""
    (block,) = (block for block in blocks(page, "python") if all(text in block for text in texts))
    return block


def small(words, *more):
    """`words` and the overrides of TINY, except those that `words` decide; `more` comes last."""
    keys = {word.partition("=")[0] for word in words}
    evaluates = {"task=evaluate", "task=solve"} & set(words)
    starts = ("trainer.acc", "logger") if "protocol=strict" in words else ("protocol", "trainer.acc", "logger")
    own = [text for text in TINY if text.startswith(starts)] if evaluates else TINY
    return [*words, *(text for text in own if text.partition("=")[0] not in keys), *more]


def results_in(path):
    return json.loads((path / "results.json").read_text())


# --- commands ----------------------------------------------------------------------------------------------


def filled(word, places):
    """A placeholder in capitals, as DIR, PATH or RUN, becomes a folder that exists."""
    key, equals, value = word.partition("=")
    if not equals:
        return word
    # L is no placeholder, and neither is a key.
    value = re.sub(r"(?<![\w./-])[A-Z][A-Z_]*(?![\w./-])", lambda found: places(found[0]), value)
    if key == "mixture":
        value = places(value)
    return f"{key}={value}"


@pytest.mark.parametrize("words", [words for page in TOURS for words in commands(page)], ids=" ".join)
def test_every_command_composes(words, compose, tmp_path, monkeypatch):
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    def places(name):
        folder = Path(name) if Path(name).is_absolute() else tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    monkeypatch.chdir(tmp_path)
    multirun = bool({"-m", "--multirun"} & set(words))
    if "--help" in words:
        return
    flags = {"-m", "--multirun", "--cfg", "-c", "--resolve"}
    values = {word for flag, word in pairwise(words) if flag in ("--cfg", "-c")}
    overrides = [filled(word, places) for word in words if word not in flags | values]
    parsed = OverridesParser.create().parse_overrides(overrides)
    jobs = BasicSweeper.split_arguments(parsed, max_batch_size=None)[0] if multirun else [overrides]
    assert not multirun or len(jobs) > 1
    for job in jobs:
        config.check(compose(*(text for text in job if not text.startswith("hydra."))))


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in PAGES)])
def test_a_shell_takes_the_lines_as_they_are_printed(page):
    """Bash and zsh: what they would expand is quoted, and zsh takes no comments on its command line."""
    for line in shell_lines(page):
        bare = re.sub(r"'[^']*'", "", line)
        assert not set(bare) & set("[]{}*?~"), line
        assert "#" not in bare or line.startswith("#SBATCH"), line


def test_the_readme_shows_the_commands_of_the_contract():
    shown = [set(words) for words in commands()]
    assert any({"loss=trades", "lambda_solver=entropic", "L=3"} <= words for words in shown)
    assert any("-m" in words for words in shown)
    assert any("task=report" in words for words in shown)
    assert any("task=evaluate" in words for words in shown)


def test_what_the_readme_installs_and_makes_exists(compose):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = re.findall(r"pip install -e (\S+)", README.replace("'", "").replace("`", " "))
    assert installed[0] == "."
    extras = {extra for text in installed[1:] for extra in Requirement(f"mixadv{text[1:]}").extras}
    assert extras == {"parallel", "slurm"}
    assert extras <= set(project["optional-dependencies"])
    assert "pip install mixadv" not in README
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z][\w-]*)", " ".join(shell_lines("README.md")) + README):
        assert re.search(rf"^{target}:", makefile, re.M), target
    target = re.search(r"^quickstart:.*\n((?:\t.*\n)+)", makefile, re.M)[1]
    sweep, report = (line.split() for line in re.findall(r"\$\(BIN\)/python run\.py (.*)", target))
    flag, experiments, *rest = sweep
    assert (flag, "name=quickstart" in rest) == ("-m", True)
    for experiment in experiments.removeprefix("experiment=").split(","):
        config.check(compose(f"experiment={experiment}", *rest))
    assert report == ["task=report", "runs=outputs/sweeps/quickstart"]


# --- three doors -------------------------------------------------------------------------------------------


def door(title):
    """The commands under a heading of README."""
    section = README.split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = [line for language, text in FENCE.findall(section) if language in SHELL for line in text.splitlines()]
    return [shlex.split(line)[2:] for line in lines]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the first command of the first door has run, made small. Shared: later doors use its run."""
    cwd = tmp_path_factory.mktemp("doors")
    finished = run_command(cwd, *small(door("I train")[1], "trainer.max_epochs=1"))
    assert finished.rc == 0, finished.err
    return cwd


def test_the_first_door_trains_a_mixture_and_attacks_it(place):
    _, train, strict, *_ = door("I train")
    path = place / "outputs" / "train" / "first"
    found = results_in(path)
    assert (found["L"], found["threat_model"]) == (3, {"norm": "linf", "eps": 0.1})
    assert results_in(path / "baseline")["L"] == 1
    again = run_command(place, *small(train, "trainer.max_epochs=1"))
    assert again.rc == 0
    assert "is done" in again.out
    finished = run_command(place, *small(strict, "data.num_test=4", "protocol.diagnosed=0"))
    assert finished.rc == 0, finished.err
    attacked = results_in(place / "outputs" / "evaluate" / "first")
    assert attacked["weights"] == found["weights"]
    assert {"noise", "pgd-50", "arc", "subsets", "square", "climber"} <= set(attacked["attacks"])


def test_the_first_door_asks_for_the_ceiling_and_labels_images(place):
    ceiling, predict = door("I train")[0], door("I train")[3]
    finished = run_command(place, *ceiling, "data.num_train=120", "logger=none", "name=ceiling")
    assert finished.rc == 0, finished.err
    rows = results_in(place / "outputs" / "ceiling" / "ceiling")["ceiling"]
    assert [row["eps"] for row in rows] == [0.8, 1.0, 1.1]
    (place / "DIR").mkdir()
    for name, image in zip("ba", (load_digits().images[:2] * 255 / 16).astype("uint8"), strict=True):
        Image.fromarray(image).save(place / "DIR" / f"{name}.png")
    finished = run_command(place, *predict, "name=labels")
    assert finished.rc == 0, finished.err
    with open(place / "outputs" / "predict" / "labels" / "predictions.csv") as file:
        assert [row["file"] for row in csv.DictReader(file)] == ["a.png", "b.png"]


def test_the_first_door_sweeps_and_reports(command, tmp_path):
    *_, sweep, report, _, _ = door("I train")
    assert sweep[0] == "-m"
    finished = command(*small(sweep, "trainer.max_epochs=1"))
    assert finished.rc == 0, finished.err
    folder = tmp_path / "outputs" / "sweeps" / "curve"
    done = [results_in(path.parent) for path in folder.glob("*/results.json")]
    found = sorted((results["threat_model"]["eps"], results["L"]) for results in done)
    assert found == [(0.05, 1), (0.05, 2), (0.1, 1), (0.1, 2)]
    shown = command(*report)
    assert (shown.rc, shown.err) == (0, "")
    assert (folder / "report.png").exists()
    assert (folder / "report.csv").exists()


def test_the_first_door_takes_images_and_shows_settings(command, tmp_path):
    *_, images, _, _, _, settings, usage = door("I train")
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            folder = tmp_path / "DIR" / split / label
            folder.mkdir(parents=True)
            for number in range(12):
                Image.new("RGB", (16, 16), (number * 20, 0, 90 * (label == "cat"))).save(folder / f"{number}.png")
    less = ["data.num_train=null", "data.num_test=null", "data.batch_size=8", "trainer.max_epochs=1", "name=own"]
    finished = command(*small(images, *less))
    assert finished.rc == 0, finished.err
    assert results_in(tmp_path / "outputs" / "train" / "own")["config"]["data"]["root"] == "DIR"
    shown = yaml.safe_load(command(*settings).out)
    assert (shown["L"], shown["loss"]["_target_"]) == (3, "mixadv.losses.TRADES")
    assert "task=evaluate" in command(*usage).out


def learned(network, path):
    """Save the state dict of `network` after some steps on digits at `path`."""
    data = Digits(batch_size=64)
    data.setup()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _, (x, y) in zip(range(20), data.train_dataloader(), strict=False):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    torch.save(network.state_dict(), path)


@pytest.fixture
def fresh_nets():
    """The module `nets` of the README is imported anew, and forgotten afterwards."""
    sys.modules.pop("nets", None)
    yield
    sys.modules.pop("nets", None)


def two_state_dicts(folder):
    """a.pt and b.pt of the README: the state dicts of the network that it shows, learned on digits."""
    assert "nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))  # your network" in README
    for seed, name in enumerate(("a.pt", "b.pt")):
        torch.manual_seed(seed)
        learned(nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), folder / name)


@pytest.mark.usefixtures("fresh_nets")
def test_the_second_door_weighs_and_measures_two_files(command, tmp_path):
    two_state_dicts(tmp_path)
    (tmp_path / "nets.py").write_text(python_block("README.md", "def first()"))
    solve, own, strict, *_ = door("I have checkpoints")
    # As printed: these take seconds.
    for words in (solve, own):
        finished = command(*words)
        assert finished.rc == 0, finished.err
    solved = results_in(tmp_path / "outputs" / "solve" / "weighed")
    assert [row["who"] for row in solved["solve"]["rows"][:2]] == ["nets:first", "nets:second"]
    assert sum(solved["weights"]) == pytest.approx(1)
    measured = results_in(tmp_path / "outputs" / "evaluate" / "mine")
    assert measured["weights"] == pytest.approx([0.3, 0.7])
    assert measured["clean"]["expected_accuracy"] > 0.5
    # The members are the same two networks: clean accuracy is that of the weights.
    means = [sum(w * m["clean"] for w, m in zip(each["weights"], each["members"], strict=True))
             for each in (solved, measured)]  # fmt: skip
    assert [each["clean"]["expected_accuracy"] for each in (solved, measured)] == pytest.approx(means)
    finished = command(*small(strict, "data.num_test=4", "protocol.diagnosed=0"))
    assert finished.rc == 0, finished.err
    again = results_in(tmp_path / "outputs" / "evaluate" / "strict")
    assert again["weights"] == pytest.approx(solved["weights"])


def test_the_second_door_takes_state_dicts_of_a_shipped_network(command, tmp_path):
    two_state_dicts(tmp_path)
    words = door("I have checkpoints")[3]
    finished = command(*small(words, "name=files"))
    assert finished.rc == 0, finished.err
    rows_of_members = results_in(tmp_path / "outputs" / "solve" / "files")["solve"]["rows"][:2]
    assert [row["who"] for row in rows_of_members] == ["a", "b"]
    assert finished.out.count("no normalisation") == 2


def test_the_second_door_takes_runs_with_what_they_record(place):
    words = door("I have checkpoints")[4]
    finished = run_command(place, *small(words, "name=runs"))
    assert finished.rc == 0, finished.err
    found = results_in(place / "outputs" / "solve" / "runs")
    assert found["threat_model"] == {"norm": "linf", "eps": 0.1}
    assert [row["who"] for row in found["solve"]["rows"][:4]] == ["first#0", "first#1", "first#2", "baseline"]


def test_the_third_door_solves_a_table_of_losses(command, tmp_path):
    """The weights by hand: each move costs the same, 1/12, with the weights 1/4, 5/12, 1/3."""
    (table,) = blocks("README.md", "csv")
    (tmp_path / "losses.csv").write_text(table)
    finished = command(*door("I have a game")[0])
    assert finished.rc == 0, finished.err
    found = results_in(tmp_path / "outputs" / "game" / "game=table,game.file=losses.csv")
    assert found["game"]["exact"]["weights"] == ["1/4", "5/12", "1/3"]
    assert found["game"]["exact"]["value"] == "1/12"


def test_the_third_door_solves_the_motivating_example():
    names = {}
    exec(python_block("README.md", "FiniteGame"), names)
    assert names["game"].deterministic_values().tolist() == [0.75, 0.75]
    solution = names["solution"]
    torch.testing.assert_close(solution.weights, torch.tensor([0.5, 0.5], dtype=torch.float64), atol=1e-9, rtol=0)
    assert solution.value == pytest.approx(0.5, abs=1e-9)
    assert 0 <= solution.gap <= 1e-9
    # The middle point goes both ways with the same probability.
    assert solution.attack[0].tolist() == pytest.approx([0.25, 0.25])


def test_the_third_door_solves_the_same_game_from_its_geometry(command, tmp_path):
    _, words, triangle, gaussians = door("I have a game")
    assert command(*words).rc == command(*triangle).rc == 0
    exact = results_in(tmp_path / "outputs" / "game" / "game=motivating")["game"]["exact"]
    assert (exact["deterministic_risks"], exact["weights"]) == (["3/4", "3/4"], ["1/2", "1/2"])
    assert (exact["value"], exact["dual"]) == ("1/2", "1/2")
    # What the README says below its picture.
    exact = results_in(tmp_path / "outputs" / "game" / "game=triangle")["game"]["exact"]
    assert (exact["value"], min(map(Fraction, exact["deterministic_risks"]))) == ("1/2", Fraction(2, 3))
    less = [f"game.{key}=40" for key in ("num_points", "num_steps")]
    assert command(*gaussians, *less, "game.draws=1", "name=gaussians").rc == 0
    assert (tmp_path / "outputs" / "game" / "gaussians" / "game.png").exists()


# Lightning prints hints for authors of Python programs; which ones depends on the installed packages.
@pytest.mark.filterwarnings("ignore")
def test_the_training_in_python_gives_the_members_of_its_command(tmp_path, monkeypatch):
    block = python_block("README.md", "pl.Trainer")
    comment = " ".join(line.strip("# \\") for line in block.splitlines() if line.startswith("#"))
    assert comment.startswith("python run.py ")
    # Of the measurement at the end as little as possible: the members are known by then.
    less = ["protocol.diagnosed=0", "data.num_test=1", "~protocol.attacks.arc", "~protocol.attacks.subsets"]
    done = run_command(tmp_path, *comment.split()[2:], *less, "trainer.accelerator=cpu", "logger=csv", "name=run")
    assert done.rc == 0, done.err
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block.replace("max_epochs=2)", "max_epochs=2, accelerator='cpu')"), names)
    last = read_checkpoint(tmp_path / "outputs" / "train" / "run" / "checkpoints" / "last.ckpt")
    found = names["trainer"].lightning_module.state_dict()
    assert found.keys() == last["state_dict"].keys()
    assert all(torch.equal(found[name], last["state_dict"][name]) for name in found)
    assert len(set(names["mixture"].weights.tolist())) == 3
    assert 0.4 < names["trainer"].callback_metrics["test/robust_accuracy"] < 0.6
    # Two epochs, and the file is that of the last.
    loaded = names["module"]
    assert loaded is not names["trainer"].lightning_module
    assert all(torch.equal(value, last["state_dict"][name]) for name, value in loaded.state_dict().items())


def test_the_attacks_in_python_run():
    names = {}
    exec(python_block("docs/evaluation.md", "AttackSuite"), names)
    assert names["x_adv"].shape == names["x"].shape
    assert {"apgd-ce", "arc", "subsets", "apgd-ce on member 1", "apgd-ce on averaged twin"} == {
        key for key in names["record"].by_attack if key != "apgd-ce on member 0"
    }


# --- numbers -----------------------------------------------------------------------------------------------


def rows(text, heading):
    """The rows of the first table below a heading, without its two head lines: lists of cells."""
    section = text.split(f"\n{heading}\n")[1]
    table = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_the_table_of_the_small_study_is_that_of_its_results():
    means = {
        label: [re.match(r"[\d.]+", cell)[0] for cell in (clean, pgd, everything)]
        for label, _, clean, pgd, _, everything, *_ in rows(
            (ROOT / "results" / "README.md").read_text(), "### Accuracy, %"
        )
    }
    shown = rows(README, "## Does a mixture pay?")
    assert len(shown) == 4
    for label, _, *numbers in shown:
        assert numbers == means[label]


def test_the_table_of_the_first_screen_is_that_of_the_study():
    page = (ROOT / "results" / "pays" / "README.md").read_text()
    shown = rows(README.replace("two CPU cores):\n", "two CPU cores):\n\n## pays\n"), "## pays")
    headings = {
        "triangle": "Triangle",
        "averages of 32": "averages of 32",
        "averages of 16": "averages of 16",
        "raw digits, l2": "Digits (8x8), ℓ2",
        "raw digits, linf": "Digits (8x8), ℓ∞",
    }
    assert len(shown) == len(headings)
    for label, *cells in shown:
        (part,) = (headings[key] for key in headings if label.startswith(key))
        (heading,) = (line for line in page.splitlines() if line.startswith("### ") and part in line)
        section = page.split(f"\n{heading}\n")[1]
        bounds = re.findall(r"more than ([\d. ]+) %", section)[:2]
        means = {name.strip("*"): mean for name, mean, *_ in rows(page, heading)}
        singles = [float(mean) for name, mean in means.items() if name.startswith("one model")]
        wanted = [
            *(f"{sum(map(float, bound.split())) / len(bound.split()):.1f}" for bound in bounds),
            *(means.get(name, "–") for name in ("recipe", "one network, biases", "Algorithm 2, shared attacks")),
            f"{max(singles):.1f}",
            means["constant answer"],
        ]
        assert [cell.strip("*") for cell in cells] == wanted, label


# --- pages and links ---------------------------------------------------------------------------------------


def anchors(page):
    """What the headings of a page are linked by."""
    headings = re.findall(r"^#+ (.*)", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", *(f"docs/{path.name}" for path in PAGES)]
)
def test_links_lead_somewhere(page):
    path = ROOT / page
    text = path.read_text()
    for target, _, anchor in re.findall(r"\]\((?!http)([^)#]*)(#([^)]*))?\)", text):
        there = (path.parent / target) if target else path
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), (target, anchor)
    assert not re.search(r"\b(TODO|TBD|FIXME|XXX|RESULTS_HERE)\b", text)


def test_the_readme_shows_the_game_and_stays_narrow():
    assert "](docs/triangle.png)" in README
    assert max(map(len, README.splitlines())) <= 120


def test_the_index_lists_every_page():
    listed = re.findall(r"^\d+\. \[[^]]+\]\((\w+\.md)\)", (ROOT / "docs" / "README.md").read_text(), re.MULTILINE)
    assert sorted([*listed, "README.md"]) == [path.name for path in PAGES]


def test_the_house_of_the_contributors_names_every_module_and_room():
    house = blocks("CONTRIBUTING.md", "")[1]
    entries = [path for path in (ROOT / "src" / "mixadv").iterdir() if not path.name.startswith("__")]
    names = {f"{path.name}/" if path.is_dir() else path.name for path in entries}
    assert len(names) > 20
    assert [name for name in sorted(names) if name not in re.split(r"[\s,]+", house)] == []


def test_the_names_of_code_that_contributors_read_exist():
    """`tasks.members.load_members` is found below mixadv; a file such as `results.json` is none of these."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rooms = {path.stem for path in (ROOT / "src" / "mixadv").iterdir() if not path.name.startswith("_")}
    found = re.findall(r"`((?:[a-z_]+\.)+\w+)`", text)
    names = {name for name in found if name.partition(".")[0] in rooms and name != "mixture.weights"}
    # Files: results.json, mixture.safetensors.
    names = {name for name in names if name.rpartition(".")[2] not in ("json", "npz", "csv", "py", "safetensors")}
    assert len(names) > 8
    for name in sorted(names):
        assert pkgutil.resolve_name(f"mixadv.{name}") is not None


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "benchmarks/README.md", *(f"docs/{path.name}" for path in PAGES)])
def test_the_tests_that_a_page_names_exist(page):
    defined = {
        name
        for path in (ROOT / "tests").glob("*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    for name in re.findall(r"\btest_\w+(?:\.py)?", (ROOT / page).read_text()):
        assert (ROOT / "tests" / name).is_file() if name.endswith(".py") else name in defined, name


def test_the_citation_is_that_of_the_package():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "type"} <= set(cited)
    assert (cited["cff-version"], cited["type"], cited["title"]) == ("1.2.0", "software", "mixadv")
    assert cited["version"] == mixadv.__version__
    assert cited["license"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]
    (paper,) = cited["references"]
    assert {"type", "title", "authors"} <= set(paper)
    # The paper as README cites it.
    for author in paper["authors"]:
        assert f"{author['given-names'][0]}. {author['family-names']}" in README
    assert paper["title"] in " ".join(README.replace("\n> ", " ").split())
    assert {f"arXiv:{i['value'].split(':')[1]}" for i in paper["identifiers"]} == {"arXiv:2102.06905"}


# --- the page of the configuration -------------------------------------------------------------------------

PAGE = ROOT / "docs" / "configuration.md"


def table(first, second):
    """The rows of the page's table with these heads, as texts without back quotes around the first."""
    rows = re.search(rf"^\| {first} \| {second}.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE.read_text(), re.MULTILINE)[1]
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows.splitlines()]
    return {key.strip("| `"): [value.strip(" |") for value in values] for key, *values in cells}


def test_the_page_lists_every_group_with_its_choices():
    listed = {group: set(cells[0].split(", ")) for group, cells in table("group", "choices").items()}
    folders = [path for path in (ROOT / "conf").iterdir() if path.is_dir() and path.name != "hydra"]
    assert listed == {folder.name: {path.stem for path in folder.glob("*.yaml")} for folder in folders}


def shown(value):
    """A default as the page writes it."""
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def test_the_page_lists_every_key_and_every_argument_of_the_trainer_with_its_default():
    shipped = yaml.safe_load((ROOT / "conf" / "config.yaml").read_text())
    keys = {key: value for key, value in shipped.items() if key not in ("defaults", "hydra")}
    assert {key: cells[0] for key, cells in table("key", "default").items()} == {
        key: shown(value) for key, value in keys.items()
    }
    schema = config.TrainerConfig()
    assert {key: cells[0] for key, cells in table("argument", "default").items()} == {
        key: shown(value) for key, value in vars(schema).items()
    }


def test_the_page_says_what_is_refused_and_what_is_renamed():
    assert {key: cells[0] for key, cells in table("argument", "why").items()} == REFUSED
    assert {key: cells[0].strip("`") for key, cells in table("old", "new").items()} == RENAMED
