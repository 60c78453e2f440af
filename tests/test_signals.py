"""Signals: at once where that is safe, else at the next check; put back, handed on, and requeued on Slurm."""

import os
import signal

import pytest

from mixadv.signals import Signals, Stopped, requeue


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 138)])
def test_a_signal_stops_at_once_and_the_exit_code_is_the_shells(name, code):
    number = signal.Signals[name]
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=name) as stop, Signals():  # noqa: PT012
        os.kill(os.getpid(), number)
        pytest.fail("it went on")
    assert stop.value.exit_code == code
    assert signal.getsignal(number) is before


def test_what_cleans_up_is_not_interrupted_by_the_same_signal_again():
    done = []
    with pytest.raises(Stopped), Signals() as signals:  # noqa: PT012
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("closed")
        pytest.fail("it went on")
    assert done == ["closed"]
    assert signals.received == signal.SIGTERM


def test_the_signals_entered_last_are_the_active_ones():
    assert Signals.active is None
    with Signals() as outer:
        assert Signals.active is outer
        with Signals() as inner:
            assert Signals.active is inner
        assert Signals.active is outer
    assert Signals.active is None


def test_a_shielded_block_is_finished_except_where_it_may_be_repeated():
    done = []
    with pytest.raises(Stopped), Signals() as signals:  # noqa: PT012
        with signals.shielded():
            with signals.interruptible():
                done.append("repeatable, before the signal")
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("shielded")
            with signals.interruptible():
                pytest.fail("entered after the signal")
        pytest.fail("went on after the block")
    assert done == ["repeatable, before the signal", "shielded"]


def test_a_signal_in_a_shielded_block_counts_at_its_end():
    with pytest.raises(Stopped), Signals() as signals:  # noqa: PT012
        with signals.shielded():
            os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("went on after the block")


def test_signals_go_back_to_whom_they_came_to():
    heard = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(number))
    try:
        with pytest.raises(Stopped), Signals() as signals, signals.shielded():  # noqa: PT012
            os.kill(os.getpid(), signal.SIGUSR2)
            assert signals.received == signal.SIGUSR2
            # Clusters send SIGTERM as well: the first counts, and nothing is hurried.
            os.kill(os.getpid(), signal.SIGTERM)
            assert heard == []
        # The launcher whose signal it was requeues the job now.
        assert heard == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_second_interrupt_does_not_wait():
    with pytest.raises(Stopped, match="SIGINT"), Signals() as signals, signals.shielded():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("it waited")


@pytest.mark.parametrize("answer", [0, 1, None])
def test_a_job_of_slurm_is_put_back_into_the_queue(tmp_path, monkeypatch, answer):
    asked, said = tmp_path / "asked", []
    if answer is not None:
        stub = tmp_path / "scontrol"
        stub.write_text(f'#!/bin/sh\necho "$@" > {asked}\necho not allowed >&2\nexit {answer}\n')
        stub.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) + (":/usr/bin:/bin" if answer is not None else ""))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    requeue(said.append)
    assert said == []
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    requeue(said.append)
    assert said == []
    monkeypatch.delenv("SUBMITIT_EXECUTOR")
    requeue(said.append)
    expected = {0: "Slurm job 41 is back in the queue", 1: "job 41: not allowed", None: "scontrol: No such file"}
    assert expected[answer] in said[0]
    assert not asked.exists() or asked.read_text() == "requeue 41\n"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "40")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    requeue(said.append)
    assert "40_3" in said[1]
