"""The house rules: who may import whom, what starts fast, and what files must have."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

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
    "memory": set(),
    "wording": set(),
    "metrics_file": {"files"},
    "tensor_files": {"files"},
    "points_file": {"tensor_files", "threat_model"},
    "redaction": set(),
    "console": {"redaction", "signals"},
    "unknown_keys": set(),
    "shipped": set(),
    "instantiate": set(),
    "setting_keys": set(),
    "seeding": set(),
    "signals": set(),
    # Files of a run.
    "records": set(),
    "typed_json": {"intervals"},
    "results": {"files", "redaction", "typed_json"},
    "ranks": {"signals"},
    # The mathematics wing: tensors only.
    "simplex": set(),
    "intervals": set(),
    "game": {"seeding", "simplex"},
    "lambda_solvers": {"simplex", "game"},
    "games": {"simplex", "game", "lambda_solvers", "files", "seeding", "threat_model"},
    # The network wing.
    "ball_in_box": set(),
    "threat_model": {"ball_in_box"},
    "correctness": set(),
    "losses": {"correctness"},
    "models": set(),
    "data": {"files", "memory", "seeding"},
    "biased": set(),
    "mixture": {"biased", "correctness", "simplex"},
    "vote": {"correctness"},
    "attacks": {"correctness", "mixture", "losses", "threat_model", "shipped", "instantiate", "seeding"},
    # Where they meet.
    "mixture_game": {"attacks", "correctness", "game", "losses", "mixture", "threat_model"},
    "evaluation": {"attacks", "game", "lambda_solvers", "mixture", "mixture_game", "ranks", "seeding", "signals"}
    | {
        "checkpoint_files",
        "console",
        "correctness",
        "files",
        "intervals",
        "losses",
        "records",
        "results",
        "tensor_files",
        "threat_model",
        "vote",
    },
    "training": {
        *("attacks", "biased", "game", "lambda_solvers", "losses", "mixture", "mixture_game", "simplex"),
        *("threat_model", "checkpoint_files", "correctness", "data", "evaluation", "members", "models", "ranks"),
        *("seeding", "signals"),
    },
    # What watches, keeps and shows.
    "checkpoint_files": {"files"},
    "callbacks": {"training", "checkpoint_files", "files", "signals"},
    "loggers": {"redaction", "console", "files", "metrics_file", "results"},
    "members": {"biased", "wording", "evaluation", "mixture", "models", "checkpoint_files", "files", "seeding"},
    "runs": {"wording", "console", "files", "run_names", "records", "results", "setting_keys", "shipped"},
    "report": {"wording", "files", "intervals", "metrics_file", "records", "redaction", "results", "runs"}
    | {"setting_keys", "shipped", "unknown_keys"},
    # The shell.
    "run_names": set(),
    "command_line": set(),
    "config": {"run_names", "setting_keys", "unknown_keys"},
    "composition": {"command_line", "setting_keys", "shipped", "unknown_keys"},
    "main": {
        *("command_line", "composition", "config", "console", "redaction", "runs", "shipped", "signals", "tasks"),
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


def test_text_files_are_utf_8_on_every_system():
    """Without `encoding`, Windows and old locales write and read something else."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                given = {keyword.arg for keyword in node.keywords}
                mode = next((arg.value for arg in node.args if isinstance(arg, ast.Constant)), "")
                texts = node.func.attr in ("read_text", "write_text")
                texts |= node.func.attr == "open" and mode in ("r", "w", "a", "x", "") and not node.args[1:]
                binary = ast.unparse(node).startswith(("os.open", "tarfile.open", "Image.open"))
                assert not texts or binary or "encoding" in given, f"{path}:{node.lineno}"


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
    assert project["scripts"]["mixadv"] == "mixadv.__main__:start"
