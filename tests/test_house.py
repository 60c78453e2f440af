"""The house rules: who may import whom, what starts fast, and that what the README says composes."""

import ast
import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from mixadv import config
from mixadv.unknown_keys import REFUSED, RENAMED

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "mixadv"
FILES = sorted(SOURCE.rglob("*.py"))

# What a part may import of ours at run time: itself, `errors`, and these. A part is a module or a package of
# src/mixadv, or a module of a package that has a line of its own.
ALLOWED = {
    "__init__": {"members", "mixture", "threat_model"},  # only when a name is first used
    "errors": set(),
    "files": set(),
    "redaction": set(),
    "console": {"redaction"},
    "unknown_keys": set(),
    "shipped": set(),
    "instantiate": set(),
    "setting_keys": set(),
    "seeding": set(),
    "signals": set(),
    "ranks": {"signals"},
    # The mathematics wing: tensors only.
    "simplex": set(),
    "intervals": set(),
    "game": {"simplex"},
    "lambda_solvers": {"simplex", "game"},
    "games": {"simplex", "game", "lambda_solvers", "seeding", "threat_model"},
    # The network wing.
    "threat_model": set(),
    "losses": set(),
    "models": set(),
    "data": {"files", "seeding"},
    "mixture": {"simplex"},
    "attacks": {"mixture", "losses", "threat_model", "shipped", "instantiate", "seeding"},
    # Where they meet.
    "mixture_game": {"attacks", "game", "losses", "mixture", "threat_model"},
    "evaluation": {"attacks", "game", "lambda_solvers", "mixture", "mixture_game", "ranks", "seeding", "signals"}
    | {"checkpoint_files", "console", "files", "intervals", "threat_model"},
    "training": {
        *("attacks", "game", "lambda_solvers", "losses", "mixture", "mixture_game", "simplex", "threat_model"),
        *("checkpoint_files", "data", "evaluation", "members", "models", "ranks", "seeding", "signals"),
    },
    # What watches, keeps and shows.
    "checkpoint_files": {"files"},
    "callbacks": {"training", "checkpoint_files", "files", "signals"},
    "loggers": {"redaction", "console", "files"},
    "members": {"evaluation", "mixture", "models", "checkpoint_files", "files", "seeding"},
    "runs": {"config", "console", "files", "setting_keys", "shipped"},
    "report": {"files", "intervals", "runs", "redaction", "setting_keys", "shipped", "unknown_keys"},
    # The shell.
    "config": {"setting_keys", "unknown_keys"},
    "composition": {"setting_keys", "shipped", "unknown_keys"},
    "main": {
        *("composition", "config", "console", "redaction", "runs", "shipped", "signals", "tasks"),
        "unknown_keys",
    },
    "__main__": {"main"},
    "tasks": None,  # everything
}


def part_of(module):
    """`mixadv.data.base` -> `data`, unless the module has a line of its own."""
    names = module.split(".")[1:] or ["__init__"]
    own = ".".join(names[:2])
    return own if own in ALLOWED else names[0]


def module_of(path):
    names = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" and len(names) > 2 else names)


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def imports(tree, typing_too=False):
    """(module, names) of every import at any depth, those for type checkers aside."""
    todo = [tree]
    while todo:
        node = todo.pop()
        if is_type_checking(node) and not typing_too:
            todo += node.orelse
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, ()
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield node.module, tuple(alias.name for alias in node.names)
        todo += ast.iter_child_nodes(node)


def imported_modules(tree):
    """Our modules that `tree` imports; `from mixadv import config` is mixadv.config."""
    for module, names in imports(tree):
        if module == "mixadv":
            yield from (
                f"mixadv.{name}" for name in names if (SOURCE / f"{name}.py").exists() or (SOURCE / name).is_dir()
            )
        elif module.startswith("mixadv."):
            yield module


# --- directions --------------------------------------------------------------------------------------------


def test_every_module_has_its_place_in_the_table():
    parts = {part_of(module_of(path).replace(".__init__", "")) for path in FILES}
    assert parts == set(ALLOWED)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_one_way(path):
    here = part_of(module_of(path).replace(".__init__", ""))
    allowed = ALLOWED[here]
    if allowed is None:
        return
    package = here.split(".")[0] if here == part_of(f"mixadv.{here.split('.')[0]}") else None
    for module in imported_modules(ast.parse(path.read_text())):
        part = part_of(module)
        inside = part == here or (package is not None and part.split(".")[0] == package)
        assert inside or part == "errors" or part in allowed, f"{here} imports {module}"


def test_the_table_has_no_cycle():
    order, left = [], {part: set(allowed or ()) for part, allowed in ALLOWED.items()}
    left["tasks"] = set(ALLOWED) - {"tasks", "main", "__main__"}
    while left:
        free = [part for part, needs in left.items() if not needs & set(left)]
        assert free, f"a cycle among {sorted(left)}"
        order += free
        left = {part: needs for part, needs in left.items() if part not in free}
    assert order.index("simplex") < order.index("mixture") < order.index("training") < order.index("tasks")


FOREIGN = {
    # part -> packages that it must never import, at any depth
    "config": {"torch", "pytorch_lightning", "torchvision", "numpy"},
    "main": {"torch", "pytorch_lightning", "torchvision", "numpy"},
    "report": {"torch", "pytorch_lightning", "torchvision", "wandb"},
    "simplex": {"pytorch_lightning", "torchvision", "wandb", "hydra", "omegaconf"},
    "game": {"pytorch_lightning", "torchvision", "wandb", "hydra", "omegaconf"},
    "lambda_solvers": {"pytorch_lightning", "torchvision", "wandb", "hydra", "omegaconf"},
    "attacks": {"pytorch_lightning", "torchvision", "wandb", "hydra", "omegaconf"},
    "mixture": {"pytorch_lightning", "torchvision", "wandb", "hydra", "omegaconf"},
    "evaluation": {"torchvision", "wandb", "hydra", "omegaconf"},
    "members": {"wandb", "hydra", "omegaconf"},
    "games": {"pytorch_lightning", "torchvision", "wandb", "hydra", "omegaconf"},
    "training": {"wandb", "hydra", "omegaconf"},
    "data": {"wandb", "hydra", "omegaconf"},
}


@pytest.mark.parametrize("part", FOREIGN)
def test_parts_stay_free_of_what_is_not_theirs(part):
    for path in FILES:
        if part_of(module_of(path)) == part:
            found = {module.split(".")[0] for module, _ in imports(ast.parse(path.read_text()))}
            assert not found & FOREIGN[part], path


def test_only_the_tasks_see_the_configuration():
    for path in FILES:
        part = part_of(module_of(path))
        # The report reads config.yaml as a file; `instantiate` sees plain settings, and Hydra builds from them.
        if part not in ("tasks", "config", "composition", "main", "report", "runs", "instantiate"):
            found = {module.split(".")[0] for module, _ in imports(ast.parse(path.read_text()), typing_too=True)}
            assert not found & {"hydra", "omegaconf"}, path


def test_wandb_and_matplotlib_are_imported_where_they_are_used():
    for path in FILES:
        tree = ast.parse(path.read_text())
        top = {m for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)) for m, _ in imports(node)}
        assert not {module.split(".")[0] for module in top} & {"wandb", "matplotlib"}, path


PROBE = """
import sys
heavy = ("torch", "pytorch_lightning", "torchvision", "matplotlib", "wandb", "sklearn", "scipy")
def loaded():
    return sorted(set(heavy) & set(sys.modules))
import mixadv
print("mixadv", loaded(), "numpy" in sys.modules)
import mixadv.config, mixadv.main, mixadv.errors
mixadv.config.register()
print("main", loaded(), "numpy" in sys.modules)
import mixadv.report
print("report", loaded())
mixadv.ThreatModel
print("used", "torch" in sys.modules, "mixadv.threat_model" in sys.modules, "mixadv.members.store" in sys.modules)
"""


def test_the_entry_and_the_report_load_no_torch(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    answer = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, cwd=tmp_path, env=environment, check=True
    )
    assert answer.stdout.splitlines() == [
        "mixadv [] False",
        "main [] False",
        "report []",
        "used True True False",
    ]


def test_the_package_offers_its_names_when_asked():
    import mixadv
    from mixadv.members.store import load_mixture
    from mixadv.mixture import Mixture
    from mixadv.threat_model import ThreatModel

    assert mixadv.Mixture is Mixture
    assert mixadv.ThreatModel is ThreatModel
    assert mixadv.load_mixture is load_mixture
    assert set(mixadv.__all__) <= set(dir(mixadv))
    with pytest.raises(AttributeError, match="has no attribute 'Mixtur'"):
        mixadv.Mixtur  # noqa: B018


# --- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_are_named_for_what_they_hold(path):
    assert path.stem not in ("utils", "util", "helpers", "helper", "misc", "common")


def public(tree):
    """Public functions and classes, and the public methods of classes."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                for method in node.body:
                    if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                        yield f"{node.name}.{method.name}", method


# Said where they are declared: by a framework, or by a protocol or base class of ours.
DECLARED_ELSEWHERE = {
    *("forward", "setup", "prepare_data", "train_dataloader", "val_dataloader", "test_dataloader"),
    *("load", "inner", "outer", "search", "solve", "state_dict", "load_state_dict"),
}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_what_is_public_is_documented(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the module"
    missing = []
    for name, node in public(tree):
        owner, _, method = name.rpartition(".")
        # A property's name and type say what its class's docstring does not.
        is_property = any(isinstance(d, ast.Name) and d.id.endswith("property") for d in node.decorator_list)
        if not ast.get_docstring(node) and not (owner and (is_property or method in DECLARED_ELSEWHERE)):
            missing.append(name)
    assert missing == []


def test_nothing_evaluates_text():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "__import__"), path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert node.func.attr != "cuda" or not isinstance(node.func.value, ast.Name), path
                if node.func.attr == "load" and isinstance(node.func.value, ast.Name) and node.func.value.id == "torch":
                    keywords = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                    assert keywords.get("weights_only") is True, path


def test_every_group_of_the_defaults_exists_and_every_group_is_a_default():
    import yaml

    defaults = yaml.safe_load((ROOT / "conf" / "config.yaml").read_text())["defaults"]
    named = {key for entry in defaults if isinstance(entry, dict) for key in entry if not key.startswith("override")}
    # hydra/ holds choices for groups of Hydra's own.
    folders = {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()} - {"hydra"}
    assert named == folders
    for entry in defaults:
        for group, choice in entry.items() if isinstance(entry, dict) else ():
            if choice is not None and not group.startswith("override"):
                assert (ROOT / "conf" / group / f"{choice}.yaml").is_file()


def test_every_configuration_file_says_what_it_is():
    for path in sorted((ROOT / "conf").rglob("*.yaml")):
        first = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
        assert any(line.lstrip().startswith("#") for line in first) or path.parent.name == "task", path


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_what_the_pages_point_to_exists(page):
    text = page.read_text()
    defined = {
        name
        for path in (ROOT / "tests").glob("*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    for name in re.findall(r"\btest_\w+(?:\.py)?", text):
        assert (ROOT / "tests" / name).is_file() if name.endswith(".py") else name in defined, name
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / target).exists(), target


def test_ignored_folders_are_anchored():
    lines = [line.strip() for line in (ROOT / ".gitignore").read_text().splitlines()]
    entries = [line for line in lines if line and not line.startswith("#")]
    generated = {"__pycache__/", "*.egg-info/"}
    for entry in entries:
        if entry.endswith("/") and entry not in generated:
            assert entry.startswith("/"), entry
    for folder in ("data", "outputs", "wandb", ".venv"):
        assert f"/{folder}/" in entries
    assert "/.env" in entries


def test_requirements_keep_the_malicious_releases_out():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {Requirement(text).name: Requirement(text) for text in project["dependencies"]}
    lightning = wanted["pytorch-lightning"].specifier
    for version in ("2.6.2", "2.6.3", "2.6.1"):
        assert not lightning.contains(version)
    assert lightning.contains("2.6.4")
    assert wanted["hydra-core"].specifier.contains("1.3.8")
    assert not wanted["hydra-core"].specifier.contains("1.4.0")
    assert not {specifier.operator for specifier in wanted["torch"].specifier} & {"==", "~=", "==="}
    assert not {"optuna", "hydra-optuna-sweeper", "torchattacks", "auto-lirpa"} & {name.lower() for name in wanted}
    assert project["scripts"]["mixadv"] == "mixadv.main:main"


# --- the README --------------------------------------------------------------------------------------------

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page, *languages):
    """The fenced blocks of a page in one of the languages."""
    return [text for language, text in FENCE.findall((ROOT / page).read_text()) if language in languages]


def readme_commands(page="README.md"):
    """The arguments of every `python run.py` and `mixadv` line in the page's fenced blocks."""
    found = []
    for block in blocks(page, "", "bash", "sh", "shell", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.strip().removeprefix("$ "), comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words[:2] == ["python", "run.py"] or words[:1] == ["mixadv"]:
                found.append(words[2 if words[0] == "python" else 1 :])
    return found


def filled(word, places):
    """A placeholder in capitals, as DIR, PATH or PATH_OF_IMAGES, becomes a folder that exists."""
    key, equals, value = word.partition("=")
    if not equals:
        return word
    # L is no placeholder, and neither is a key.
    value = re.sub(r"(?<![\w./-])[A-Z][A-Z_]*(?![\w./-])", lambda found: places(found[0]), value)
    if key == "mixture":
        value = places(value)
    return f"{key}={value}"


TOURS = ("README.md", "docs/configuration.md", "docs/sweeps.md")


@pytest.mark.parametrize("words", [words for page in TOURS for words in readme_commands(page)], ids=" ".join)
def test_every_command_of_the_readme_composes(words, compose, tmp_path, monkeypatch):
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    def places(name):
        folder = Path(name) if Path(name).is_absolute() else tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    monkeypatch.chdir(tmp_path)
    multirun = bool({"-m", "--multirun"} & set(words))
    if {"--help", "--hydra-help", "--version"} & set(words):
        return
    flags = {"-m", "--multirun", "--cfg", "-c", "--resolve"}
    values = {word for flag, word in pairwise(words) if flag in ("--cfg", "-c")}
    overrides = [filled(word, places) for word in words if word not in flags | values]
    parsed = OverridesParser.create().parse_overrides(overrides)
    jobs = BasicSweeper.split_arguments(parsed, max_batch_size=None)[0] if multirun else [overrides]
    assert not multirun or len(jobs) > 1
    for job in jobs:
        config.check(compose(*(text for text in job if not text.startswith("hydra."))))


def test_the_readme_shows_the_commands_of_the_contract():
    shown = [set(words) for words in readme_commands()]
    assert any({"loss=trades", "lambda_solver=entropic", "L=3"} <= words for words in shown)
    assert any("-m" in words or "--multirun" in words for words in shown)
    assert any("task=report" in words for words in shown)
    assert any("task=evaluate" in words for words in shown)


def test_the_readme_is_finished_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert "docs/quickstart.png" in links
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []
    assert not re.search(r"\b(TODO|TBD|FIXME|XXX|RESULTS_HERE)\b", text)


def test_the_python_of_the_readme_runs():
    import torch

    _, block = blocks("README.md", "python")
    names = {}
    exec(block, names)
    assert names["x_adv"].shape == names["x"].shape
    record, solution = names["record"], names["solution"]
    assert {"apgd-ce", "arc", "subsets", "apgd-ce on member 1", "apgd-ce on averaged twin"} == {
        key for key in record.by_attack if key != "apgd-ce on member 0"
    }
    torch.testing.assert_close(solution.weights, torch.tensor([0.4, 0.6], dtype=torch.float64), atol=1e-9, rtol=0)
    assert solution.value == pytest.approx(0.6, abs=1e-9)
    assert 0 <= solution.gap <= 1e-9 * 3


# Lightning prints hints for authors of Python programs; which ones depends on the installed packages.
@pytest.mark.filterwarnings("ignore")
def test_the_training_of_the_readme_gives_the_members_of_its_command(tmp_path, monkeypatch):
    import torch

    from conftest import run_command
    from mixadv.checkpoint_files import read_checkpoint

    block, _ = blocks("README.md", "python")
    first = block.splitlines()[0]
    assert first.startswith("# python run.py ")
    # Of the measurement at the end as little as possible: the members are known by then.
    less = ["protocol.diagnosed=0", "data.num_test=1", "~protocol.attacks.arc", "~protocol.attacks.subsets"]
    done = run_command(tmp_path, *first.split()[3:], *less, "trainer.accelerator=cpu", "logger=csv", "name=run")
    assert done.rc == 0, done.err
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block.replace("max_epochs=2", "max_epochs=2, accelerator='cpu'"), names)
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
    import yaml

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
