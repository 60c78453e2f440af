"""Shares of a batch, and how they come together again: among three processes, so that nothing is symmetric."""

import itertools
import signal
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mixadv.ranks import Ranks
from mixadv.runs.processes import is_helper, process_place, process_rank, started_from_outside
from mixadv.signals import Signals, Stopped


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 64])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shares_are_consecutive_and_as_even_as_can_be(count, size):
    shares = [list(range(count))[Ranks(rank, size).rows(count)] for rank in range(size)]
    assert [*itertools.chain(*shares)] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    served = [[number for number in range(count) if Ranks(rank, size).serves(number)] for rank in range(size)]
    assert sorted(itertools.chain(*served)) == list(range(count))


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, 0),
        ({"LOCAL_RANK": "2"}, 2),
        ({"RANK": "5", "LOCAL_RANK": "1"}, 5),
        ({"SLURM_PROCID": "3"}, 3),
        ({"SLURM_PROCID": "3", "LOCAL_RANK": "0"}, 0),
    ],
)
def test_launchers_say_who_a_process_is(environment, rank):
    assert process_rank(environment) == rank


def test_launchers_say_which_gpu_is_whose():
    assert process_place({}) == 0
    assert process_place({"RANK": "5", "LOCAL_RANK": "1"}) == 1
    assert process_place({"SLURM_PROCID": "6", "SLURM_LOCALID": "2"}) == 2


def test_who_started_a_process():
    assert started_from_outside({"TORCHELASTIC_RUN_ID": "none"})
    assert started_from_outside({"SLURM_PROCID": "0"})
    # Lightning's own children run the command that started them.
    assert not started_from_outside({"LOCAL_RANK": "1", "WORLD_SIZE": "2"})
    assert is_helper({"LOCAL_RANK": "1", "MIXADV_RUN_DIR": "here"})
    assert not is_helper({"LOCAL_RANK": "0", "MIXADV_RUN_DIR": "here"})
    assert not is_helper({"RANK": "1"})


def test_alone_nothing_changes_and_nothing_is_sent():
    one, values = Ranks.here(), torch.arange(6.0).view(3, 2)
    assert one == Ranks(0, 1)
    assert one.gather(values, 3) is values
    assert one.largest(-4) == -4
    assert one.gather_objects("x") == ["x"]
    one.average_([values])
    one.take_from_first_(values)
    assert torch.equal(values, torch.arange(6.0).view(3, 2))


def _work(rank, size, port, results):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    ranks = Ranks.here()
    whole = torch.arange(7 * 2).view(7, 2)
    vector, number = torch.tensor([1.0, 10.0]) * (rank + 1), torch.tensor(float(rank * rank))
    ranks.average_([vector, number])
    first = torch.tensor([rank + 4.0])
    ranks.take_from_first_(first)
    told = Signals()
    told.received = signal.SIGTERM if rank == 1 else None
    Signals.active = told
    try:
        ranks.stop_together()
        stopped = None
    except Stopped as stop:
        stopped = stop.signum
    results[rank] = {
        "stopped": stopped,
        "ranks": (ranks.rank, ranks.size),
        "gathered": ranks.gather(whole[ranks.rows(7)], 7).tolist(),
        "none": ranks.gather(whole[:1][ranks.rows(1)], 1).tolist(),
        "averages": (vector.tolist(), number.item()),
        "largest": ranks.largest([3, -1, 8][rank]),
        "first": first.item(),
        "objects": ranks.gather_objects({"from": rank}),
    }
    dist.destroy_process_group()


def test_three_processes_have_the_same_in_the_end():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.start_processes(_work, (3, port, results), nprocs=3, start_method="spawn")
        found = dict(results)
    for rank in range(3):
        assert found[rank] == {
            "ranks": (rank, 3),
            "gathered": [[2 * i, 2 * i + 1] for i in range(7)],
            "none": [[0, 1]],
            "averages": ([2.0, 20.0], pytest.approx(5 / 3)),
            "largest": 8,
            "first": 4.0,
            # One was told to stop: all do.
            "stopped": signal.SIGTERM,
            "objects": [{"from": 0}, {"from": 1}, {"from": 2}],
        }
