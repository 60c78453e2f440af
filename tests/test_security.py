"""Files that others send run nothing, read nothing and give no orders; secrets stay where they are.

What holds for single readers of parameters is tested beside them (test_store.py, test_members.py, test_resume.py,
test_data_cifar10.py), and the page of a report in test_report_html.py.
"""

import ast
import csv
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from packaging.requirements import Requirement
from rich.console import Console

from builders.files import Bomb
from conftest import TINY
from evaluated_run import write_evaluation
from mixadv.checkpoint_files import read_checkpoint
from mixadv.data.image_folder import ImageFolder
from mixadv.errors import UserError
from mixadv.evaluation.state import EvaluationState, Worst
from mixadv.files import read_arrays
from mixadv.instantiate import held_to_mixadv, instantiate
from mixadv.loggers.wandb import WandbLogger
from mixadv.loggers.wandb_link import ID_FILE
from mixadv.members.source import Source
from mixadv.members.store import load_mixture
from mixadv.tasks import build
from wandb_service import Service

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "mixadv"
FILES = sorted(SOURCE.rglob("*.py"))


# --- what the program's own text may call ------------------------------------------------------------------

# Whole names of what runs text, code from a file, or a command that a shell reads.
FORBIDDEN = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "pty.spawn", "commands.getoutput"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open", "joblib.load"),
    *("dill.load", "dill.loads", "cloudpickle.load", "cloudpickle.loads", "pandas.read_pickle", "torch.jit.load"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all", "yaml.full_load_all"),
    *("subprocess.getoutput", "subprocess.getstatusoutput", "tempfile.mktemp", "runpy.run_path", "runpy.run_module"),
    *("hydra.utils.instantiate", "hydra.utils.call", "hydra.utils.get_object", "hydra.utils.get_class"),
    *("torch.serialization.add_safe_globals", "torch.hub.load", "shutil.unpack_archive"),
    *("ssl._create_unverified_context", "np.fromfile", "numpy.fromfile"),
}
# Calls that are safe with these arguments alone.
ONLY_WITH = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
# Methods that unpack what an archive says, wherever it says.
METHODS = {"extractall", "extract"}
# Who imports by name: what a person has named, names of a package's own, and what a checkpoint may name (ours alone).
IMPORTERS = {"members/factory.py", "instantiate.py", "__init__.py", "data/__init__.py"}
IMPORTERS |= {"training/recorded.py", "games/points.py"}
# Who builds what settings name: those that a person gave, after a record was held to mixadv's own classes.
BUILDERS = {"instantiate.py"}


def calls(tree):
    """(whole name, node) of every call; a name that was imported from a module counts as that module's."""
    origin = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            origin.update({alias.asname or alias.name: alias.name for alias in node.names})
        elif isinstance(node, ast.ImportFrom):
            origin.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            parts, function = [], node.func
            while isinstance(function, ast.Attribute):
                parts.append(function.attr)
                function = function.value
            # What a call returns, or stands in brackets, has no name of its own.
            parts.append(origin.get(function.id, function.id) if isinstance(function, ast.Name) else "")
            yield ".".join(reversed(parts)).replace("numpy.load", "np.load"), node


def misuses(tree, name=""):
    """What the text of a module calls and should not."""
    found = []
    for called, node in calls(tree):
        given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
        if called == "hydra.utils.instantiate" and name in BUILDERS:
            continue
        if called in FORBIDDEN or called.rpartition(".")[2] in METHODS or given.get("shell"):
            found.append(called)
        elif called in ONLY_WITH:
            argument, value = ONLY_WITH[called]
            found += [] if given.get(argument) is value else [called]
        elif called == "importlib.import_module":
            found += [] if name in IMPORTERS else [called]
        elif called.startswith("subprocess."):
            # A list of arguments, which no shell reads.
            found += [] if node.args and isinstance(node.args[0], (ast.List, ast.Name)) else [called]
    return found


@pytest.mark.parametrize("path", [*FILES, ROOT / "run.py"], ids=lambda path: path.name)
def test_nothing_in_the_source_runs_what_it_reads(path):
    name = path.relative_to(SOURCE).as_posix() if SOURCE in path.parents else path.name
    assert misuses(ast.parse(path.read_text()), name) == []


@pytest.mark.parametrize(
    "text",
    [
        *("eval('1')", "import os\nos.system('x')", "from os import system\nsystem('x')", "__import__('os')"),
        *("import yaml\nyaml.load(t)", "import pickle as p\np.loads(b)", "from pickle import load\nload(f)"),
        *("import torch\ntorch.load(f)", "import torch\ntorch.load(f, weights_only=False)"),
        *("import numpy as np\nnp.load(f)", "from numpy import load\nload(f, allow_pickle=True)"),
        *("import subprocess\nsubprocess.run('ls')", "import subprocess\nsubprocess.run(['a'], shell=True)"),
        *("import tarfile\ntarfile.open(f).extractall()", "import importlib\nimportlib.import_module(n)"),
        *("from hydra.utils import instantiate\ninstantiate(c)", "import torch as t\nt.load(f, weights_only=no)"),
    ],
)
def test_the_rule_finds_what_it_is_for(text):
    assert misuses(ast.parse(text)) != []


def test_shipped_configurations_name_classes_and_models_of_this_package():
    targets = {}
    for path in sorted((ROOT / "conf").rglob("*.yaml")):
        for found in re.findall(r"_target_:\s*(\S+)", path.read_text()):
            targets.setdefault(found, path.relative_to(ROOT / "conf").parts[0])
    assert targets
    ours = {name for name in targets if name.startswith("mixadv.")}
    # Parts of Lightning, PyTorch and Hydra in the groups that are made of them; chosen by the command line alone.
    others = {targets[name] for name in set(targets) - ours}
    assert others <= {"launch", "hparams_search", "callbacks", "logger", "optimizer"}
    homes = ("pytorch_lightning.", "torch.optim.", "hydra_plugins.", "hydra.", "optuna.", "datetime.timedelta")
    assert all(name.startswith(homes) for name in set(targets) - ours)
    assert "mixadv.runs.sweep.Sweep" in ours


# Imports every module while connections and programs are refused. Then calls every class, as a record can have it
# called: with texts, numbers, lists and mappings for what it takes and for what it needs, and notes what that does.
PROGRAM = """
import importlib, inspect, json, os, pkgutil, sys
REFUSED = {"socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname",
           "urllib.Request", "http.client.connect", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn",
           "os.spawn", "os.fork", "os.forkpty", "webbrowser.open"}
CHANGES = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "shutil.rmtree", "exec", "compile"}
building, acts = None, {}
def hook(event, arguments):
    # How Python's ctypes asks where libraries lie, for one that torch needs; and matplotlib, once, where fonts do.
    asks = any(name in str(arguments) for name in ("/ldconfig", "fc-list"))
    if event in REFUSED and not asks:
        acts.setdefault(building or "import", []).append(event)
        raise PermissionError(f"{event} {arguments}")
    writes = event == "open" and set(str(arguments[1] or "")) & set("wax+")
    if building and (writes or event in CHANGES):
        acts.setdefault(building, []).append(f"{event} {str(arguments)[:200]}")
sys.addaudithook(hook)
import mixadv, mixadv.main
modules = [importlib.import_module(m.name) for m in pkgutil.walk_packages(mixadv.__path__, "mixadv.")]
left = os.listdir(".")
try:
    __import__("subprocess").run(["true"])
except PermissionError:
    works = acts.pop("import") == ["subprocess.Popen"]

# What a constructor may import is imported: that would write caches.
import fsspec.implementations.chained
import matplotlib.figure, PIL.Image, scipy.optimize, tarfile, torchvision.datasets, urllib.request, wandb
targets = sorted({f"{m.__name__}.{n}" for m in modules for n, c in vars(m).items()
                  if isinstance(c, type) and c.__module__.startswith("mixadv.")})
built = 0
for target in targets:
    module, _, name = target.rpartition(".")
    try:
        parameters = inspect.signature(getattr(sys.modules[module], name)).parameters.values()
    except ValueError:
        parameters = []
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    needed = [p.name for p in parameters if p.name in names and p.default is p.empty]
    for value in (SENT, 2, [SENT], {"a": SENT}):
        for given in (names, needed):
            building = target
            try:
                getattr(sys.modules[module], name)(**dict.fromkeys(given, value))
                built += 1
            except Exception:
                pass
            finally:
                building = None
print(json.dumps({"modules": len(modules), "left": left, "works": works, "targets": len(targets), "built": built,
                  "acts": acts}))
"""


@pytest.fixture(scope="module")
def everything_imported(tmp_path_factory):
    """What `PROGRAM` found, run in an empty folder."""
    home = tmp_path_factory.mktemp("home")
    (home / "here").mkdir()
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("SENT", repr(str(home / "made")))],
        cwd=home / "here",
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert not (home / "made").exists()
    return json.loads(answer.stdout.splitlines()[-1])


def test_importing_opens_no_connection_and_starts_no_process(everything_imported):
    assert everything_imported["works"], everything_imported["acts"]
    assert everything_imported["modules"] == len(FILES) - 1
    assert everything_imported["left"] == []
    assert "import" not in everything_imported["acts"]


def test_building_any_class_of_ours_does_nothing_yet(everything_imported):
    """The record of a mixture may name all of them: a constructor writes nothing, starts nothing and asks nobody."""
    assert everything_imported["targets"] > 60
    assert everything_imported["built"] > 60
    assert everything_imported["acts"] == {}


# --- arrays, parameters, images ----------------------------------------------------------------------------


@pytest.fixture
def marker(tmp_path):
    """Must not be there when the test is over; a bomb like those of the test does make it."""
    place = tmp_path / "executed"
    yield place
    assert not place.exists()
    pickle.loads(pickle.dumps(Bomb(place)))
    assert place.exists()


def bombs(marker, *names):
    return {name: np.array([Bomb(marker)], dtype=object) for name in names}


def disarmed(message):
    assert "allow_pickle" in message or "cannot be read" in message
    assert "\n" not in message


def test_object_arrays_are_not_read(tmp_path, marker):
    path = tmp_path / "arrays.npz"
    np.savez(path, **bombs(marker, "x"))
    with pytest.raises(ValueError, match=r"arrays\.npz cannot be read") as error:
        read_arrays(path)
    disarmed(str(error.value))


NOWHERE = Worst(torch.zeros(3, 1), torch.zeros(3))


def test_a_state_of_an_evaluation_holds_no_objects(tmp_path, marker):
    state = EvaluationState(tmp_path / "evaluation", "mark")
    state.save(0, "pgd-20", {"correct": np.zeros(3)}, NOWHERE)
    (path,) = (tmp_path / "evaluation").glob("*.npz")
    np.savez(path, fingerprint=np.asarray("mark"), **bombs(marker, "correct"))
    with pytest.raises(UserError, match=r"remove .*evaluation, and the attacks are run again") as error:
        EvaluationState(tmp_path / "evaluation", "mark").load("pgd-20")
    disarmed(str(error.value))
    np.savez(path, **bombs(marker, "fingerprint"))
    with pytest.raises(UserError, match="cannot be read"):
        EvaluationState(tmp_path / "evaluation", "mark").load("pgd-20")


def test_names_of_passes_do_not_leave_their_folder(tmp_path):
    state = EvaluationState(tmp_path / "evaluation", "mark")
    for name in ("../../outside", "/tmp/outside", "..", "a\x00b"):
        state.save(0, name, {"x": np.zeros(1)}, NOWHERE)
    assert {path.parent for path in tmp_path.rglob("*.npz")} == {tmp_path / "evaluation"}


def test_a_cache_of_images_holds_no_objects(tmp_path, marker, monkeypatch):
    from PIL import Image

    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8), "red").save(tmp_path / "data" / split / name / "0.png")
    ImageFolder(tmp_path / "data").prepare_data()
    (cache,) = (tmp_path / "data" / ".mixadv-cache").glob("*.npz")
    np.savez(cache, **bombs(marker, "fingerprint", "train_images", "train_labels", "test_images", "test_labels"))
    corpus = ImageFolder(tmp_path / "data").load()
    assert corpus.train_images.shape == (2, 3, 8, 8)


EPS_FILE = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n0 0 8 8 rectfill\nshowpage\n%%EOF\n"


def test_a_picture_starts_no_program(tmp_path, monkeypatch):
    """PIL draws PostScript with Ghostscript, whatever the file is called."""
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin" / "gs"
    stub.write_text(f"#!/bin/sh\ntouch {tmp_path / 'started'}\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            (tmp_path / "data" / split / name / "0.png").write_bytes(EPS_FILE)
    with pytest.raises(UserError, match="it is not an image"):
        ImageFolder(tmp_path / "data").prepare_data()
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("reader", [read_checkpoint, load_mixture, lambda p: Source(str(p)).members(None)])
def test_no_variable_opens_the_readers_of_parameters(tmp_path, marker, monkeypatch, reader):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"state_dict": {"x": Bomb(marker)}}, tmp_path / "sent.ckpt")
    with pytest.raises(UserError):
        reader(tmp_path / "sent.ckpt")


@pytest.mark.parametrize(
    "node",
    [
        *({"_target_": target} for target in ("os.system", "mine.Data", "mixadv", "mixadvance.Data", "", None, 3)),
        # A module of ours also holds functions and what it imports: neither may be called by a record.
        *({"_target_": f"mixadv.{name}"} for name in ("main.os.system", "export.Path", "data.download.fetch", ".os.x")),
        *({"_target_": target} for target in ("mixadv.models.linear", "mixadv.nothing.Nothing", ["mixadv.losses.AT"])),
        {"_target_": "mixadv.losses.AT", "a": {"b": [{"c": {"_target_": "os.system"}}]}},
        *({"_target_": "mixadv.losses.AT", key: True} for key in ("_partial_", "_args_", "_recursive_", "_convert_")),
        {"_target_": "mixadv.losses.AT", "a": [{"_args_": ["touch"]}]},
    ],
    ids=str,
)
def test_a_record_names_classes_of_mixadv_and_nothing_else(node):
    with pytest.raises(UserError) as error:
        held_to_mixadv(node, "sent")
    assert str(error.value).startswith("the record of sent ")
    assert "\n" not in str(error.value)


def test_a_record_may_name_classes_of_mixadv():
    held_to_mixadv({"_target_": "mixadv.attacks.pgd.PGD", "objective": {"_target_": "mixadv.attacks.ExpectedLoss"}}, "")


def test_what_hydra_never_calls_is_not_called_for_a_user_either(tmp_path):
    """Slips, as a copied line: a user may run whatever code they want."""
    for settings in (
        *({"_target_": name, "command": f"touch {tmp_path / 'executed'}"} for name in ("os.system", "posix.system")),
        {"_target_": "mixadv.attacks.pgd.PGD", "objective": {"_target_": "hydra.utils.get_class", "path": "os.system"}},
        {"_target_": "mixadv.instantiate.instantiate", "settings": {"_target_": "os.system"}, "key": "x"},
        {"_target_": ["os.system"]},
        {"_target_": "mixadv..os.system"},
        {"_target_": "mixadv.main.os.system", "command": f"touch {tmp_path / 'executed'}"},
    ):
        with pytest.raises(UserError) as error:
            instantiate(settings, "attack")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


# --- a mixture that was sent -------------------------------------------------------------------------------


def sent_mixture(trained, folder, change):
    shutil.copytree(trained.path / "mixture", folder)
    record = json.loads((folder / "config.json").read_text())
    change(record)
    (folder / "config.json").write_text(json.dumps(record))


def test_a_mixture_does_not_say_whom_to_ask_for_a_download(trained, compose, tmp_path):
    def change(record):
        record["data"] = {
            "_target_": "mixadv.data.cifar10.CIFAR10",
            "root": str(tmp_path / "none"),
            "mirrors": ["http://collector.example/?who=me"],
        }

    sent_mixture(trained, tmp_path / "mixture", change)
    record = json.loads((tmp_path / "mixture" / "config.json").read_text())
    merged = build.as_recorded(compose("task=evaluate", "data=cifar10"), record, ["task"])
    assert "collector" not in json.dumps(build.as_dict(merged.data))


def order(text):
    return f"\x1b]0;{text}\x07\x1b[2J\x1b[31m"


@pytest.mark.parametrize("place", ["schema", "model", "data", "parameters"])
def test_a_refused_mixture_gives_no_orders_to_the_terminal(trained, command, tmp_path, place):
    def change(record):
        if place == "schema":
            record["schema"] = order("owned")
        elif place == "model":
            record["model"] = {"name": order("owned")}
        elif place == "data":
            record["data"] = {"_target_": f"mixadv.{order('owned')}.X"}

    sent_mixture(trained, tmp_path / "mixture", change)
    if place == "parameters":
        from safetensors.torch import save_file

        save_file({f"weights\n{order('owned')}": torch.ones(1)}, tmp_path / "mixture" / "mixture.safetensors")
    finished = command("task=evaluate", "mixture=mixture", "name=x")
    assert "owned" in finished.refusal() or place == "parameters"
    assert not {"\x1b", "\x07"} & set(finished.out + finished.err)


# --- a run directory that was sent -------------------------------------------------------------------------

CONFIGS = {
    "tag": "!!python/object/apply:os.mkdir [MARKER]",
    "nested tag": "task: train\nname: !!python/object/apply:os.mkdir [MARKER]\n",
    "new": "a: !!python/object/new:os.mkdir [MARKER]\n",
    "module": "a: !!python/name:os.system\n",
    "no mapping": "just text",
    "cut": "[1, 2",
    "binary": "\x00\x01",
    "unhashable": "? [1, 2]\n: 3\n",
    # A thousand million entries, once they are written out.
    "aliases": "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join(10 * [f'*a{i - 1}'])}]\n" for i in range(1, 10)),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_saved_configuration_runs_nothing(command, tmp_path, marker, kind):
    folder = tmp_path / "outputs" / "train" / "sent"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIGS[kind].replace("MARKER", str(marker)))
    before = (folder / "config.yaml").read_bytes()
    message = command("data=digits", "name=sent", "logger=csv").refusal()
    assert "resume=never" in message
    assert (folder / "config.yaml").read_bytes() == before
    (folder / "FAILED").write_text("x")
    finished = command("task=report", "runs=outputs")
    assert finished.rc == 0
    assert "Failed: x" in finished.out


TAKES = ("${oc.env:DATABASE_PASSWORD}", "${oc.decode:${oc.env:DATABASE_PASSWORD}}", "${oc.env:NO_SUCH,x}${oc.env:HOME}")


@pytest.mark.parametrize("text", TAKES)
def test_a_saved_configuration_reads_no_variable(command, trained, tmp_path, text):
    folder = tmp_path / "outputs" / "train" / "sent"
    folder.mkdir(parents=True)
    config = yaml.safe_load((trained.path / "config.yaml").read_text())
    config["model"]["_target_"] = text
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "DONE").touch()
    secret = "[4321, 8765]"
    refused = command(*TINY, "L=3", "seed=5", "name=sent", DATABASE_PASSWORD=secret)
    assert "oc.env" in refused.refusal()
    (folder / "DONE").unlink()
    shown = command("task=report", "runs=outputs", DATABASE_PASSWORD=secret)
    for finished in (refused, shown):
        assert "4321" not in finished.out + finished.err
    assert str(tmp_path) not in refused.refusal().replace(str(folder), "")
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"4321" not in path.read_bytes()


# What HTML, a terminal, rich, matplotlib, a spreadsheet and a shell would each obey.
SENT = (
    "<script>alert(1)</script>\x1b]0;owned\x07\x1b[2J\x9b31m\x08\u202e[link=http://evil.example]x[/link][/] "
    '$\\frac{ =HYPERLINK("http://evil.example") {0} %s `id` $(id)'
)
FORMULA = "=cmd|' /C calc'!A0"


def hostile(value, keys):
    """Every text in nested containers replaced, and every key that the readers do not ask for by its name."""
    if isinstance(value, dict):
        return {key if key in keys else f"{key} {SENT}": hostile(part, keys) for key, part in value.items()}
    if isinstance(value, list):
        return [hostile(part, keys) for part in value]
    return f"{FORMULA} {SENT}" if isinstance(value, str) else value


def keys_of(value):
    if isinstance(value, dict):
        for key, part in value.items():
            yield key
            yield from keys_of(part)
    elif isinstance(value, list):
        for part in value:
            yield from keys_of(part)


def sent_run(path, state="DONE"):
    results = write_evaluation(path)
    asked = set(keys_of(results)) - set(results["attacks"])
    record = {
        **hostile(results, asked),
        "task": "evaluate",
        "config": {"L": 3, SENT: [SENT], "loss": {"name": FORMULA}},
    }
    record["data"] = {"name": f"{FORMULA}{SENT}", "num_test": 10}
    (path / "results.json").write_text(json.dumps(record))
    with (path / "metrics.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["epoch", "step", "val/robust_accuracy", "train/loss", "lambda/0", SENT, FORMULA])
        rows.writerows([[1, 1, 0.5, 1, 1, 1, 1], [2, 2, 0.6, 2, 1, 1, 1]])
    (path / "DONE").unlink()
    (path / state).write_text("" if state == "DONE" else f"{FORMULA} {SENT}")


def obeyed(text):
    """Characters that a terminal takes for more than text."""
    return {c for c in text if not c.isprintable() and c != "\n"}


def test_what_a_run_says_is_shown_and_not_obeyed(command, tmp_path):
    sent_run(tmp_path / "runs" / "a")
    sent_run(tmp_path / "runs" / "b", "FAILED")
    for path in (tmp_path / "runs" / "a", tmp_path / "runs" / "b", tmp_path / "runs"):
        finished = command("task=report", f"runs={path}", COLUMNS="400")
        assert finished.rc == 0, finished.err
        assert finished.err == ""
        assert obeyed(finished.out) == set()
        assert "[link=http://evil.example]" in finished.out
    page = (tmp_path / "runs" / "a" / "report.html").read_text()
    assert "<script" not in page
    assert obeyed(page) == set()
    with (tmp_path / "runs" / "report.csv").open(newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert [cell for cell in cells if cell.lstrip()[:1] in ("=", "+", "@")] == []
    assert any(cell.startswith(f"'{FORMULA}") for cell in cells)
    # Numbers below zero stay numbers.
    assert not [cell for cell in cells if re.fullmatch(r"'-?\d.*", cell)]


GAME = {
    "name": "motivating",
    "eps": f"1/2 {SENT}",
    "exact": {"deterministic_risks": [SENT, "1"], "weights": [SENT, SENT], "value": SENT, "dual": "1", "gap": "0"},
    "solvers": [],
    "attack": [],
}


def sent_game(path, game, arrays=None):
    path.mkdir(parents=True)
    config = {"task": "game", "game": {"name": SENT}}
    (path / "results.json").write_text(json.dumps({"task": "game", "game": game, "config": config}))
    (path / "DONE").touch()
    if arrays:
        np.savez(path / "game.npz", **arrays)


def test_what_a_game_says_is_shown_and_not_obeyed(command, tmp_path, marker):
    sent_game(tmp_path / "games" / "a", GAME, bombs(marker, "thresholds", "curve"))
    sent_game(tmp_path / "games" / "b", {**GAME, "exact": {**GAME["exact"], "pure_attacker": SENT}})
    sent_game(tmp_path / "games" / "c", {"name": "gaussians", "eps": [SENT]}, {"thresholds": np.zeros(1)})
    whole = command("task=report", f"runs={tmp_path / 'games'}")
    assert whole.rc == 0, whole.err
    assert obeyed(whole.out) == set()
    for name in "abc":
        finished = command("task=report", f"runs={tmp_path / 'games' / name}")
        assert obeyed(finished.out + finished.err) == set()
        if finished.rc:
            finished.refusal()


def test_arrays_of_a_run_hold_no_objects(command, tmp_path, marker):
    write_evaluation(tmp_path / "runs" / "a")
    for name in ("records", "examples"):
        with np.load(tmp_path / "runs" / "a" / f"{name}.npz") as file:
            np.savez(tmp_path / "runs" / "a" / f"{name}.npz", **bombs(marker, *file.files))
    finished = command("task=report", "runs=runs/a")
    assert finished.rc == 0, finished.err
    page = (tmp_path / "runs" / "a" / "report.html").read_text()
    assert page.count("npz cannot be read") >= 2


@pytest.mark.parametrize("text", ["../../../outside", "/outside", "a b", "", "\x00", "x" * 300])
def test_an_id_that_was_sent_does_not_leave_its_folder(tmp_path, monkeypatch, text):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    run = tmp_path / "deep" / "deeper" / "run"
    run.mkdir(parents=True)
    (run / ID_FILE).write_text(text)
    logger = WandbLogger(run, project="p", console=Console(file=io.StringIO()))
    logger.log_hyperparams({})
    logger.finish(0)
    assert re.fullmatch(r"[0-9a-f]{8}", logger.run.id)
    assert (run / ID_FILE).read_text() == f"{logger.run.id}\n"
    written = list(tmp_path.rglob("*.wandb"))
    assert written
    assert all(path.is_relative_to(run / "wandb") for path in written)


@pytest.mark.parametrize("there", ["a link", "a directory"])
def test_what_lies_in_place_of_the_id_is_not_written_through(tmp_path, monkeypatch, there):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))
    precious, run = tmp_path / "precious", tmp_path / "run"
    precious.write_text("mine")
    run.mkdir()
    if there == "a link":
        (run / ID_FILE).symlink_to(precious)
    else:
        (run / ID_FILE).mkdir()
    said = io.StringIO()
    logger = WandbLogger(run, project="p", console=Console(file=said, width=300))
    logger.log_metrics({"train/loss": 1.0}, 1)
    logger.finish(0)
    assert precious.read_text() == "mine"
    assert ("cannot be used" in said.getvalue()) == (there == "a directory")


@pytest.mark.parametrize("place", ["wandb", ".wandb"])
def test_settings_of_a_folder_do_not_say_where_the_key_goes(tmp_path, monkeypatch, place):
    from wandb_service import Service

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / place).mkdir()
    service = Service()
    try:
        (tmp_path / place / "settings").write_text(f"[default]\nbase_url = {service.url}\n")
        said = io.StringIO()
        logger = WandbLogger(tmp_path / "run", project="p", init_timeout=3, console=Console(file=said, width=300))
        logger.log_hyperparams({})
        logger.finish(0)
        assert service.received == []
    finally:
        service.close()
    assert logger.mode == "offline"
    assert "could send your key elsewhere" in said.getvalue()


def test_what_a_server_says_is_shown_without_passwords():
    from mixadv.redaction import shown

    words = shown(f"proxy http://me:pw12345678@host:3128 refused the key {40 * 'a'}")
    assert words == "proxy http://***@host:3128 refused the key ***"


# --- .env --------------------------------------------------------------------------------------------------


def test_only_the_names_of_the_example_are_taken_from_dotenv(command, tmp_path):
    named = {line.split("=")[0] for line in (ROOT / ".env.example").read_text().splitlines() if "=" in line[:20]}
    assert {"WANDB_API_KEY", "DATA_DIR"} <= named
    others = {
        *("LD_PRELOAD", "PATH", "PYTHONPATH", "GIT_SSH_COMMAND", "WANDB_BASE_URL", "_WANDB_CORE_PATH", "HTTPS_PROXY"),
        *("WANDB_SERVICE", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "MPLBACKEND", "CXX", "HYDRA_FULL_ERROR", "SOME_TOKEN"),
    }
    lines = [f"{name}=from-dotenv-{name}" for name in sorted(named | others)]
    (tmp_path / ".env").write_text("\n".join(lines))
    seen = {}

    def look(*_):
        seen.update({name: os.environ.get(name, "") for name in named | others})
        raise UserError("seen")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mixadv.config.check", look)
        assert command("data=digits").refusal() == "seen"
    assert {name for name, value in seen.items() if value.startswith("from-dotenv")} == named


def test_a_dotenv_takes_nothing_from_the_environment(command, tmp_path):
    (tmp_path / ".env").write_text("WANDB_PROJECT=${SOME_TOKEN}\n")
    finished = command("--cfg", "job", "--resolve", SOME_TOKEN="hunter2hunter2")
    assert finished.rc == 0
    assert "hunter2" not in finished.out + finished.err


@pytest.mark.parametrize("content", [b"\xff\xfe\x00A\x00=\x00b", b"WANDB_PROJECT=a\x00b\n"])
def test_a_dotenv_that_is_no_text_is_one_message(command, tmp_path, content):
    (tmp_path / ".env").write_bytes(content)
    assert ".env cannot be read" in command("data=digits").refusal()


# --- secrets -----------------------------------------------------------------------------------------------

KEY = "0123456789abcdef" * 2 + "01234567"
SECRETS = {
    "WANDB_API_KEY": KEY,
    "HF_TOKEN": "hf_AbCdEfGhIjKlMnOp",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI-K7MDENG",
    "DB_PASSWORD": "correct-horse-battery",
    "client_secret": "staple-of-the-client",
}


def files_and_members_of_archives(root):
    """(place, bytes) of every file below `root` and of every member of the archives among them."""
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.name != ".env":
            yield path, path.read_bytes()
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    for name in archive.namelist():
                        yield path / name, archive.read(name)


def no_secret(root, *texts):
    """None of the secrets in the files below, nor in the texts."""
    for name, secret in SECRETS.items():
        for text in texts:
            assert secret not in text, name
        for place, content in files_and_members_of_archives(root):
            assert secret.encode() not in content, (name, place)


@pytest.fixture
def checkout(tmp_path):
    """The working directory is a checkout whose remote has a password in its address, as some do."""
    git = shutil.which("git")
    if git is None:
        pytest.skip("no git")
    for arguments in (
        ["init", "-q"],
        ["remote", "add", "origin", f"https://me:{SECRETS['HF_TOKEN']}@example.org/x.git"],
    ):
        subprocess.run([git, "-C", str(tmp_path), *arguments], check=True, capture_output=True)
    yield tmp_path
    shutil.rmtree(tmp_path / ".git")


@pytest.mark.parametrize(
    "fault",
    ["none", "refused", *(pytest.param(fault, marks=pytest.mark.slow) for fault in ("offline", "taken no more"))],
)
def test_secrets_are_nowhere(command, checkout, fault):
    import wandb

    service = Service()
    # A service, or a proxy before it, may repeat what it was sent.
    echo = json.dumps({"errors": [{"message": f"no account for {KEY} and {SECRETS['DB_PASSWORD']}"}]})
    if fault == "refused":
        service.fail = lambda path, body: (401, echo) if path.endswith("/graphql") else None
    elif fault == "taken no more":
        service.fail = lambda path, body: (403, echo) if path.endswith("/file_stream") else None
    environment = {name: value for name, value in SECRETS.items() if name != "WANDB_API_KEY"}
    (checkout / ".env").write_text("".join(f"{name}={value}\n" for name, value in SECRETS.items()))
    wandb.teardown()
    try:
        argv = [*(text for text in TINY if text != "logger=csv"), "trainer.max_epochs=1", "L=2", "name=kept"]
        mode = {"WANDB_MODE": "offline"} if fault == "offline" else {}
        finished = command(*argv, "logger.wandb.images=0", **environment, **mode, WANDB_BASE_URL=service.url)
        again = command(*argv, "logger.wandb.images=0", "eps=0.06", **environment, **mode, WANDB_BASE_URL=service.url)
        shown = command("task=report", "runs=outputs", **environment)
    finally:
        wandb.teardown()
        service.close()
    assert finished.rc == 0, finished.err
    assert (again.rc, shown.rc) == (1, 0)
    shutil.rmtree(checkout / ".git")
    (checkout / ".git").mkdir()
    said = [finished.out, finished.err, again.out, again.err, shown.out, shown.err]
    if fault in ("refused", "taken no more"):
        # What the service repeats is in wandb's own log of the answer; nowhere else.
        for path in (checkout / "outputs").rglob("debug*.log"):
            path.unlink()
    no_secret(checkout, *said, *service.received)
    if fault != "offline":
        assert any("graphql" in text for text in service.received)


# --- what is installed beside it ---------------------------------------------------------------------------

# Releases that public advisories name, for what this package does with them.
BAD = {
    # Malicious releases (GHSA-w37p-236h-pfx3); before 2.5, checkpoints were unpickled (VU#252619).
    "pytorch-lightning": ("2.6.2", "2.6.3", "2.4.0"),
    # Code from files read with weights_only=True: CVE-2025-32434 up to 2.5.1, CVE-2026-24747 up to 2.9.1.
    "torch": ("2.5.1", "2.6.0", "2.9.1"),
    # Ways around the names that hydra.utils.instantiate refuses: CVE-2026-68508, GHSA-37p2.
    "hydra-core": ("1.3.2", "1.3.3", "1.3.5"),
    # Decoders: CVE-2023-4863 (WebP), CVE-2024-28219, CVE-2026-25990, CVE-2026-59199.
    "pillow": ("10.0.0", "10.2.0", "12.1.0", "12.2.0"),
}


def test_releases_with_known_holes_are_kept_out():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {Requirement(text).name: Requirement(text).specifier for text in project["dependencies"]}
    for name, releases in BAD.items():
        for release in releases:
            assert not wanted[name].contains(release), f"{name} {release}"
    # wandb learned then to give up waiting at the end of a run.
    assert not wanted["wandb"].contains("0.26.1")
    assert wanted["wandb"].contains("0.27.0")


def test_what_is_installed_is_what_is_wanted():
    from importlib.metadata import version

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in map(Requirement, project["dependencies"]):
        assert requirement.specifier.contains(version(requirement.name), prereleases=True), requirement
