"""What is typed arrives as typed: Hydra's own parser reads back what `for_hydra` writes."""

import os
import re
from pathlib import Path

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from builders.runs import read_results
from conftest import TINY
from mixadv.command_line import as_typed, for_hydra, quoted
from mixadv.models import build_member

NAMES = [
    "données",
    "日本",
    "R&D",
    "C#",
    "a b",
    "a,b",
    "eps=8-255,L=3",
    "l'été",
    'say "x"',
    "[x]",
    "(1)",
    "a:b",
    "50%",
    "{k}",
]
NAMES += [
    "2024",
    "007",
    "1e5",
    "true",
    "null",
    "~x",
    "a!b",
    "a;b",
    "a\\b",
    "x^y",
    "<x>",
    "a\tb",
    "${x}",
    "'q'",
    "-m",
    "é/日",
]


def read(argument):
    (override,) = OverridesParser.create().parse_overrides([for_hydra(argument)])
    assert not override.is_sweep_override(), argument
    value = override.value()
    # OmegaConf resolves this escape.
    return value.replace("\\${", "${") if isinstance(value, str) else value


@pytest.fixture(params=NAMES)
def existing(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(request.param).mkdir(parents=True)
    return request.param


@pytest.mark.parametrize("key", ["mixture", "runs", "data.root"])
def test_a_path_that_exists_is_one_value(existing, key):
    assert read(f"{key}={existing}") == existing


def test_members_are_taken_apart_where_paths_exist(existing):
    Path("plain").mkdir()
    entries = [text.replace("\\${", "${") for text in read(f"members=[{existing},plain,pkg.mod:fn, {existing}]")]
    assert entries == [existing, "plain", "pkg.mod:fn", existing]


def test_a_sweep_over_lists_of_members(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a=1,b=2", "plain", "é"):
        Path(name).mkdir()
    argument = for_hydra("members=[plain,a=1,b=2],[é,pkg.mod:fn]")
    assert argument == "members=[plain,'a=1,b=2'],['é','pkg.mod:fn']"
    (override,) = OverridesParser.create().parse_overrides([argument])
    assert isinstance(override.value(), ChoiceSweep)


@pytest.mark.parametrize("name", ["läuf 1", "日本", "R&D", "007", "1e3", "true", "a=b", "l'été", "3.10", "x\\"])
@pytest.mark.parametrize("key", ["name", "data.name"])
def test_text_stays_text(key, name):
    assert read(f"{key}={name}") == name


@given(st.text(st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="$"), min_size=1))
@example("\\")
@example("a\\'")
@example("\"'")
@example("\\\"'\\\\")
def test_quotes_keep_any_text(text):
    (override,) = OverridesParser.create().parse_overrides([f"x={quoted(text)}"])
    assert override.value() == text


@given(st.text(st.characters(whitelist_categories=("L", "N", "S"), blacklist_characters="'\"$=\\`"), min_size=1))
def test_letters_and_symbols_need_no_quotes(text):
    assert str(read(f"name={text}")) == text or text.lower() == "null"
    assert [str(entry) for entry in read(f"members=[{text},b]")] == [text, "b"] or text.lower() == "null"


@pytest.mark.parametrize(
    "argument",
    [
        *("L=1,2", "eps=8/255", "eps=2/255,4/255", "weights=[0.5,0.5]", "x=null", "x=-1", "x=1e-3", "x=", "name=null"),
        *("members=['a=1,b=2,c=3',plain]", 'members=["a=1,b=2,c=3","d=4"]', "members=[]", "x=range(start=1,stop=3)"),
        *(
            "x=choice(a,b)",
            "seed=range(0,3)",
            "x={a:1,b:[2,3]}",
            "x=${oc.env:HOME,é}",
            "~x",
            "+x=1",
            "-m",
            "--cfg",
            "job",
        ),
        *(
            "x='é, b'",
            "hydra.run.dir=out/${name}",
            "x=a\\,b",
            "members=[A,",
            "B]",
            "x=glob(*)",
            "x=[a[1],b]",
            "--config-dir=é",
        ),
    ],
)
def test_what_the_grammar_reads_and_what_it_must_refuse_stay_as_they_are(argument):
    assert for_hydra(argument) == argument


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("x={a:é,b:1}", {"a": "é", "b": 1}),
        ("x=[é,[R&D,1],2.5,true]", ["é", ["R&D", 1], 2.5, True]),
        ("logger.wandb.project=Größe", "Größe"),
        ("y=a\\,é", "a,é"),
        ("model.mean=[0.1,0.2,0.3]", [0.1, 0.2, 0.3]),
    ],
)
def test_other_values_are_quoted_word_by_word(argument, value):
    assert read(argument) == value


def test_home_is_expanded_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("mixture=~/é") == f"{tmp_path}/é"
    assert read("members=[~/a.pt,~/b c.pt,b]") == [f"{tmp_path}/a.pt", f"{tmp_path}/b c.pt", "b"]
    assert read("hydra.run.dir=~/out") == f"{tmp_path}/out"
    assert read("x=~/é") == "~/é"


# --- through the command -----------------------------------------------------------------------------------

SHORT = [text for text in TINY if not text.startswith(("data=", "data.", "trainer.max", "model="))] + [
    "trainer.max_epochs=1"
]


def pictures(root):
    for number, (split, label) in enumerate((s, c) for s in ("train", "test") for c in ("ant", "bee")):
        (root / split / label).mkdir(parents=True)
        for k in range(6):
            Image.new("RGB", (8, 8), (40 * number, 20 * k, 90)).save(root / split / label / f"{k}.png")


def test_data_mixture_runs_and_name_take_any_letter(command, tmp_path):
    pictures(tmp_path / "R&D é")
    argv = ["data=image_folder", "data.num_val=4", "model=linear", *SHORT]
    assert command("data.root=R&D é", *argv, "name=läuf 1").rc == 0
    run = tmp_path / "outputs" / "train" / "läuf 1"
    assert read_results(run)["data"]["name"] == "R&D é"
    moved = tmp_path / "日本, C#"
    run.rename(moved)
    assert command("task=evaluate", "mixture=日本, C#", "protocol.diagnosed=0", "name=~e").rc == 0
    assert command("task=report", "runs=日本, C#").rc == 0


def test_a_sweep_over_paths_keeps_its_jobs_apart(command, tmp_path):
    for name in ("a b", "a-b"):
        pictures(tmp_path / "dd" / name)
    argv = ["data=image_folder", "data.num_val=4", "model=linear", *SHORT, "name=two"]
    finished = command("-m", "data.root=dd/a b,dd/a-b", *argv)
    assert finished.rc == 0, finished.err
    runs = {
        read_results(path.parent)["data"]["name"] for path in (tmp_path / "outputs/sweeps/two").glob("*/results.json")
    }
    assert runs == {"a b", "a-b"}


def test_the_documented_statistics_of_foreign_networks_need_no_plus(command, tmp_path):
    state = build_member("linear", num_classes=10, image_shape=(1, 8, 8)).state_dict()
    torch.save(
        {key: value for key, value in state.items() if not key.endswith(("mean", "std"))}, tmp_path / "modèle.pt"
    )
    argv = ["task=evaluate", "data=digits", "model=linear", "eps=0.1", "data.num_test=20", "protocol.diagnosed=0"]
    finished = command(*argv, "members=[modèle.pt]", "model.mean=[0.3]", "model.std=[0.4]", "name=own")
    assert finished.rc == 0, finished.err
    (member,) = read_results(tmp_path / "outputs/evaluate/own")["members"]
    assert "normalised with the given mean and std" in member["note"]
    training = command("data=digits", "model=linear", "model.mean=[0.3]", "eps=0.1").refusal()
    assert training.startswith("model.mean: it follows from the data")


def test_solve_counts_its_members(command, tmp_path):
    torch.save(build_member("linear", num_classes=10, image_shape=(1, 8, 8)).state_dict(), tmp_path / "a.pt")
    refusal = command("task=solve", "members=[a.pt,a.pt]", "data=digits", "model=linear", "L=4", "eps=0.1").refusal()
    assert refusal == "L=4: task=solve counts the members that are named; leave it out"


def test_paths_are_relative_to_where_the_command_is_typed(command, tmp_path):
    pictures(tmp_path / "pictures")
    argv = ["data=image_folder", "data.root=pictures", "data.num_val=4", "model=linear", *SHORT, "name=there"]
    assert command(*argv, "hydra.job.chdir=true").rc == 0
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, 2))\n"
    )
    members = ["members=[outputs/train/there,nets:build]", "hydra.job.chdir=true", "protocol.diagnosed=0", "name=both"]
    finished = command("task=evaluate", *members)
    assert finished.rc == 0, finished.err
    assert (tmp_path / "outputs/evaluate/both/DONE").exists()


@pytest.mark.skipif(os.name != "posix", reason="arguments are bytes on POSIX only")
def test_bytes_that_are_no_text_are_refused(command):
    refusal = command("name=\udce9t\udce9").refusal()
    assert "PYTHONUTF8=1" in refusal


@pytest.mark.parametrize("page", ["README.md", "docs", "conf", "studies", "benchmarks"])
def test_printed_commands_are_quoted_for_zsh(page):
    """zsh takes brackets for a pattern of file names, and `no matches found` ends the command."""
    root = Path(__file__).resolve().parents[1] / page
    files = (
        [root] if root.is_file() else [path for end in ("md", "yaml", "py", "j2") for path in root.rglob(f"*.{end}")]
    )
    for path in files:
        for line in path.read_text(encoding="utf-8").splitlines():
            if found := re.search(r"(python run\.py|python -m mixadv|(^|[` ])mixadv) +(?P<words>.*)", line):
                words = re.sub(r"'[^']*'|\"[^\"]*\"", "", found["words"].split("`")[0].split("    ")[0])
                assert not re.search(r"=\S*\[", words), (path.name, line)


@pytest.mark.parametrize("key", ["mixture", "members", "hydra.run.dir", "eps", "+note"])
@pytest.mark.parametrize("value", ["/data/a.pt", "a b", "8/255", "é#&.pt", "[a,b]", "don't", "a,b", "", "null", "'x'"])
def test_a_recorded_word_means_what_was_typed(key: str, value: str) -> None:
    passed_on = for_hydra(f"{key}={value}")
    assert for_hydra(as_typed(passed_on)) == passed_on
    assert len(as_typed(passed_on)) <= len(passed_on)


def test_quotes_that_only_hydra_needs_are_not_recorded() -> None:
    assert as_typed(for_hydra("mixture=/data/é.pt")) == "mixture=/data/é.pt"
