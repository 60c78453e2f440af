"""Counts in English, wherever one of a thing is possible."""

import pytest

from mixadv.runs.sweep import DONE, FAILED, Outcome, complaint, summary
from mixadv.wording import counted


@pytest.mark.parametrize(("count", "text"), [(0, "0 runs"), (1, "1 run"), (2, "2 runs"), (12345, "12,345 runs")])
def test_one_is_singular(count, text):
    assert counted(count, "run") == text


def test_sweeps_of_one_job(tmp_path):
    assert "1 job, 1 done" in summary(tmp_path, [Outcome("a", DONE)])
    assert complaint([Outcome("a", FAILED, "x")]).startswith("1 of 1 job failed")
