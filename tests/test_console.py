"""What is said on the console and what is kept in the log of a run."""

import io
import logging
import re

import pytest
import rich.console

from conftest import TINY, run_command
from mixadv.console import LIGHTNING, TRANSCRIPT, Console, RunLog, quiet_lightning, say
from mixadv.tasks import evaluate, game

GAME = ("task=game", "game=motivating", "name=g")


def record(text, level=logging.INFO):
    return logging.LogRecord("somebody", level, __file__, 1, text, (), None)


@pytest.fixture
def said(monkeypatch):
    """The records of what is on the console already."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    monkeypatch.setattr(TRANSCRIPT, "handlers", [handler])
    monkeypatch.setattr(TRANSCRIPT, "propagate", False)
    monkeypatch.setattr(TRANSCRIPT, "level", logging.INFO)
    TRANSCRIPT.manager._clear_cache()
    return records


# --- the file ----------------------------------------------------------------------------------------------


def test_records_wait_for_the_directory_and_what_was_there_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = RunLog()
    log.handle(record("early"))
    assert list(tmp_path.iterdir()) == []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    (tmp_path / "first" / "mixadv.log").write_text("before\n")
    log.begin(tmp_path / "first")
    log.handle(record("late"))
    # A baseline inside the run, say.
    log.begin(tmp_path / "second")
    log.handle(record("later"))
    log.end()
    log.begin(tmp_path / "second")
    log.handle(record("after the end"))
    assert (tmp_path / "first" / "mixadv.log").read_text().split() == ["before", "early", "late", "later"]
    assert [path.name for path in tmp_path.rglob("*.log")] == ["mixadv.log"]


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path, capsys, monkeypatch):
    log = RunLog()
    (tmp_path / "gone").write_text("no directory")
    log.begin(tmp_path / "gone")
    log.handle(record("lost"))
    (tmp_path / "gone").unlink()
    (tmp_path / "gone").mkdir()
    log.handle(record("kept"))

    def full():
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(log, "flush", full)
        log.handle(record("too much"))
    log.end()
    assert (tmp_path / "gone" / "mixadv.log").read_text().startswith("kept\n")
    assert capsys.readouterr().err == ""
    # A defect of who logs is shown, as everywhere.
    log = RunLog()
    log.begin(tmp_path / "gone")
    log.handle(logging.LogRecord("somebody", logging.INFO, __file__, 1, "%d", ("text",), None))
    log.end()
    assert "TypeError" in capsys.readouterr().err


def test_the_log_gives_no_orders_to_a_terminal(tmp_path):
    log = RunLog()
    log.begin(tmp_path)
    log.handle(record("a\x1b[2Jb\nc"))
    log.end()
    assert (tmp_path / "mixadv.log").read_text() == "a [2Jb\nc\n"


# --- the console -------------------------------------------------------------------------------------------


def test_what_is_printed_is_logged_as_plain_text(said, capsys):
    page = io.StringIO()
    console = Console(file=page, force_terminal=True, color_system="truecolor", width=25)
    console.print("[bold]loud[/bold]")
    console.print("[bold]as it is[/bold]", markup=False)
    console.print("one\ntwo   ")
    console.print(rich.console.Group("word " * 8))
    console.print(rich.control.Control.home())
    assert "\x1b[1m" in page.getvalue()
    loud, plain, lines, wrapped = (entry.getMessage() for entry in said)
    assert (loud, plain, lines) == ("loud", "[bold]as it is[/bold]", "\none\ntwo")
    assert wrapped == "\nword word word word word\nword word word"
    say("in one line")
    assert capsys.readouterr().out == "in one line\n"
    assert said[-1].getMessage() == "in one line"


def test_a_quiet_console_logs_nothing(said):
    Console(quiet=True).print("nothing")
    Console(file=io.StringIO(), markup=False).print("[x]")
    assert [entry.getMessage() for entry in said] == ["[x]"]


def test_lightnings_own_handler_is_held_back_for_a_while(monkeypatch):
    page, own = io.StringIO(), logging.getLogger(LIGHTNING)
    handler = logging.StreamHandler(page)
    monkeypatch.setattr(own, "handlers", [handler])
    monkeypatch.setattr(own, "propagate", False)
    monkeypatch.setattr(own, "level", logging.INFO)
    own.manager._clear_cache()
    with quiet_lightning():
        own.warning("advice")
        own.error("defect")
    own.warning("after")
    assert page.getvalue() == "defect\nafter\n"


# --- commands ----------------------------------------------------------------------------------------------


def test_the_console_is_as_it_was_and_the_log_holds_what_it_showed(trained):
    log = (trained.path / "mixadv.log").read_text()
    out = trained.finished.out
    assert trained.finished.err == ""
    for line in ("constant answer", "Files: "):
        assert sum(line in shown for shown in out.splitlines()) == sum(line in kept for kept in log.splitlines()) > 0
    assert re.search(r"^\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}\]\[mixadv\.console\]\[INFO\] Writing to", log, re.M)
    assert not (trained.path / "baseline").exists()


def test_a_run_that_goes_on_appends_and_a_defect_keeps_its_traceback(command, tmp_path, monkeypatch):
    def broken(path):
        raise ZeroDivisionError("inside")

    with monkeypatch.context() as injected:
        injected.setattr(game, "draw_game", broken)
        with pytest.raises(ZeroDivisionError):
            command(*GAME)
    path = tmp_path / "outputs" / "game" / "g" / "mixadv.log"
    first = path.read_text()
    assert "Writing to outputs/game/g" in first
    assert "[ERROR] a defect of mixadv\nTraceback (most recent call last)" in first
    assert first.count("ZeroDivisionError: inside") == 1

    second = command(*GAME)
    assert (second.rc, second.err) == (0, "")
    assert path.read_text().startswith(first)
    assert "Starting again in outputs/game/g" in path.read_text()[len(first) :]

    # Shown again: nothing is written.
    before = path.read_text()
    assert command(*GAME).rc == 0
    assert path.read_text() == before
    anew = command(*GAME, "resume=never")
    assert anew.rc == 0
    assert path.read_text() == before
    assert "Writing to outputs/game/g.2" in (path.parent.with_name("g.2") / "mixadv.log").read_text()


def test_a_defect_before_anything_is_written_is_kept(command, tmp_path, monkeypatch):
    def broken(cfg, key):
        raise ZeroDivisionError("at once")

    monkeypatch.setattr(game, "instantiate", broken)
    with pytest.raises(ZeroDivisionError):
        command(*GAME)
    (path,) = (tmp_path / "outputs" / "game" / "g").iterdir()
    assert path.name == "mixadv.log"
    assert "ZeroDivisionError: at once" in path.read_text()


def test_the_log_can_be_had_otherwise(command, tmp_path, monkeypatch):
    # As in a process of its own.
    monkeypatch.setattr(TRANSCRIPT, "propagate", True)
    monkeypatch.setattr(TRANSCRIPT, "handlers", [])
    for choice in ("none", "default", "mixadv"):
        finished = command(*GAME[:2], f"name={choice}", f"hydra/job_logging={choice}")
        assert (finished.rc, finished.err) == (0, "")
        assert f"Writing to outputs/game/{choice}" in finished.out
    logs = {path.parent.name: path for path in (tmp_path / "outputs").rglob("*.log")}
    assert set(logs) == {"default", "mixadv"}
    assert "Writing to" in logs["default"].read_text()


def test_verbose_writes_everything_to_the_log(command, tmp_path, monkeypatch):
    real = game.draw_game

    def draw(path):
        logging.getLogger("somebody").debug("a detail")
        logging.getLogger("somebody").warning("a warning")
        real(path)

    monkeypatch.setattr(game, "draw_game", draw)
    for name, more in (("plain", ()), ("verbose", ("hydra.verbose=true",))):
        finished = command(*GAME[:2], f"name={name}", *more)
        assert (finished.rc, finished.err) == (0, "a warning\n")
        log = (tmp_path / "outputs" / "game" / name / "mixadv.log").read_text()
        assert "[somebody][WARNING] a warning" in log
        assert ("[somebody][DEBUG] a detail" in log) == (name == "verbose")
        assert "a detail" not in finished.out


def test_lightnings_hints_go_to_the_log_alone(trained, command, tmp_path, monkeypatch):
    for name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.INFO)
    logging.Logger.manager._clear_cache()
    argv = ["task=evaluate", f"mixture={trained.path}", "name=e", "data.num_test=10", "protocol.diagnosed=0"]
    real = evaluate.measure

    def measure(*args):
        logging.getLogger("pytorch_lightning").warning("advice")
        return real(*args)

    monkeypatch.setattr(evaluate, "measure", measure)
    finished = command(*argv, "~protocol.attacks.arc", "~protocol.attacks.subsets")
    assert (finished.rc, finished.err) == (0, "")
    log = (tmp_path / "outputs" / "evaluate" / "e" / "mixadv.log").read_text()
    assert "[WARNING] advice" in log
    assert "[INFO] GPU available: " in log
    assert "advice" not in finished.out
    assert "GPU available" not in finished.out


def test_a_job_of_a_sweep_that_fails_says_why_in_its_own_log(tmp_path):
    finished = run_command(tmp_path, "-m", "optimizer.lr=1e30,0.1", "L=0,2", *TINY, "trainer.max_epochs=1", "name=s")
    assert finished.rc == 1
    logs = {path.parent.name[:20]: path.read_text() for path in (tmp_path / "outputs").rglob("mixadv.log")}
    # Of those that were refused nothing began.
    failed, done = (logs[name] for name in sorted(logs, reverse=True))
    assert len(logs) == 2
    assert re.search(r"\[ERROR\] .*not finite", failed)
    assert "ERROR" not in done
