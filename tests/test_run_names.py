"""Names of run directories: functions of the command, different for different settings, usable as one folder."""

import itertools

import pytest

from builders.runs import read_results
from conftest import TINY
from mixadv.run_names import MAX_NAME, name_in, path_safe, run_name


def test_names_keep_what_the_overrides_say():
    assert run_name(["eps=8/255", "L=3"]) == "eps=8-255,L=3"
    assert run_name(["members=[a,b]", "baseline=True"]) == "members=a,b,baseline=true"
    assert run_name(["eps=2/255,4/255"]) == "eps=2-255,4-255"
    assert run_name([]) == "default"
    assert run_name(["eps=0.1"], 0) == "0"


@pytest.mark.parametrize("name", ["mine", "läuf 1", "日本", "R&D", "C#", "a~b", "eps=0.1,L=3"])
def test_a_name_that_can_be_a_directory_is_kept(name):
    assert run_name(["eps=0.1"], name) == path_safe(name) == name


def test_names_leave_out_what_says_where_and_not_how():
    said = ["task=train", "name=x", "resume=never", "runs=outputs", "+experiment=quickstart", "L=2"]
    assert run_name(said) == "experiment=quickstart,L=2"


@pytest.mark.parametrize(
    "text", ["../../etc", "a/../b", "..", ".", "/abs", "x y\n\tz", "a:b*c?d", "~/home", "ä/ö", "a\\b"]
)
def test_names_never_leave_their_directory(text, tmp_path):
    name = run_name([], text)
    assert name not in ("", ".", "..")
    assert not set(name) & set("/\\\0\n\t*?:")
    assert not name.startswith((".", "~", "-", " "))
    (tmp_path / name).mkdir()
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_long_names_are_cut_and_stay_distinct(tmp_path):
    for letter in "1é日":
        start = letter * 400
        names = [path_safe(start + end) for end in ("", "2", "3")]
        assert len(set(names)) == 3
        for name in names:
            assert len(name.encode()) <= MAX_NAME + 9
            assert start.startswith(name[:-9])
            (tmp_path / name).mkdir()
    assert path_safe("y" * MAX_NAME) == "y" * MAX_NAME


def test_different_settings_have_different_names():
    values = ["'dd/a b'", "dd/a-b", "dd-a-b", "dd/a/b", "'dd-a/b'", "dd_a_b", "'a,b'", "[a,b]", "[[a],b]", "[a,[b]]"]
    values += ["[a]", "a", "{a:b}", "a:b", "'8 255'", "8/255", "8/2/55", "A", "é", "'e\u0301'", "a\\ b", "'2024/05'"]
    commands = [["x=" + value] for value in values] + [["x=a", "y=b"], ["x='a,y=b'"], ["~x"], ["xx=a"]]
    commands += [["x=a,b", "y=c"], ["x=a", "y=b,c"], ["x=" + "a/" * 200], ["x=" + "a/" * 200 + "b"]]
    names = [run_name(command) for command in commands]
    for (one, name), (other, name_of_other) in itertools.combinations(zip(commands, names, strict=True), 2):
        # `x=[a,b]` of a run and `x=a,b` of a sweep lie in different folders.
        assert name != name_of_other, (one, other)


def test_the_same_settings_have_one_name():
    for same in (
        [["a=1", "b=2"], ["a=3", "b=2", "a=1"], ["+a=1", "++b=2"], ["a='1'", 'b="2"']],
        [["baseline=false"], ["baseline=False"]],
        [["members=[a, b]"], ["members=[a,b]"], ["members=['a',b]"]],
    ):
        assert len({run_name(command) for command in same}) == 1, same


def test_settings_in_another_order_find_their_directory(tmp_path):
    long = [f"x{number}={'y' * 30}" for number in range(6)]
    for settings in (["a=1", "b=[2,3]", "c=[3,2]"], ["p='dd/a b'", "q=1"], long):
        for there, here in itertools.permutations(itertools.permutations(settings[:3]), 2):
            folder = tmp_path / str(len(list(tmp_path.iterdir())))
            (folder / run_name(there)).mkdir(parents=True)
            assert name_in(folder, run_name(here)) == run_name(there)
    (tmp_path / "other" / "x=a,b,y=c,d").mkdir(parents=True)
    assert name_in(tmp_path / "other", "x=a,d,y=c,b") == "x=a,d,y=c,b"
    assert name_in(tmp_path / "other", "x=a,b") == "x=a,b"
    assert name_in(tmp_path / "nowhere", "x=a") == "x=a"
    # The directory of the very command comes first.
    for name in ("b=1,a=2", "a=2,b=1"):
        (tmp_path / "both" / name).mkdir(parents=True)
    assert name_in(tmp_path / "both", "b=1,a=2") == "b=1,a=2"


def test_the_order_and_the_spelling_of_settings_make_no_second_run(command, tmp_path):
    argv = [text for text in TINY if not text.startswith(("eps=", "trainer.max_epochs"))] + ["trainer.max_epochs=1"]
    assert command(*argv, "eps=1/20", "L=2").rc == 0
    (run,) = (tmp_path / "outputs" / "train").iterdir()
    before = (run / "results.json").stat().st_mtime_ns
    assert "is done" in command("L=2", *argv, "eps=1/20").out
    # The same directory by a name, and the same number in another form.
    assert "is done" in command("L=2", *argv, "eps='0.05'", f"hydra.run.dir={run}").out
    assert (run / "results.json").stat().st_mtime_ns == before
    assert read_results(run)["threat_model"]["eps"] == 0.05
    assert len(list(run.parent.iterdir())) == 1
    refusal = command("L=2", *argv, "eps=0.051", f"hydra.run.dir={run}").refusal()
    assert "holds a run with other settings (eps: 1/20 there, 0.051 here)" in refusal


def test_the_order_of_settings_makes_no_second_sweep(command, tmp_path):
    argv = [text for text in TINY if not text.startswith(("eps=", "trainer.max_epochs"))] + ["trainer.max_epochs=1"]
    assert command("-m", "eps=0.1,0.2", "L=2", *argv).rc == 0
    again = command("-m", *argv, "L=2", "eps=0.1,0.2")
    assert again.rc == 0
    assert "2 jobs, 2 done (2 before)" in again.out
    assert len(list((tmp_path / "outputs" / "sweeps").iterdir())) == 1
