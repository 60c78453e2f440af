"""The test loop: every attack on the mixture and its parts, every point replayed on all members."""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from mixadv.attacks.search import Attack
from mixadv.attacks.suite import CLEAN, Pass, passes_of, unattacked
from mixadv.console import quiet_lightning
from mixadv.correctness import answered, as_labels, correct
from mixadv.evaluation.record import EvaluationRecord, expectation
from mixadv.evaluation.state import EvaluationState, Worst
from mixadv.evaluation.vote_attack import VoteAttack
from mixadv.mixture import Mixture
from mixadv.ranks import OneProcess, Ranks
from mixadv.signals import Signals
from mixadv.threat_model import ThreatModel
from mixadv.vote import Vote


def evaluate(
    mixture: Mixture,
    batches: Iterable[tuple[Tensor, Tensor]],
    attacks: Mapping[str, Attack],
    threat_model: ThreatModel,
    *,
    seed: int = 0,
    other_weights: Sequence[Sequence[float]] = (),
    vote: Vote | None = None,
    starts: Tensor | None = None,
    state: EvaluationState | None = None,
    on_progress: Callable[[str, int], None] | None = None,
    processes: Mapping[str, Any] | None = None,
) -> EvaluationRecord:
    """Attack the mixture, its members alone and its averaged twin on all batches; replay every point on all members.

    Every point is checked for norm, box and NaN by `check_points`, which shares no code with the attacks. Correctness
    comes from a plain forward pass in the precision of the parameters, members in eval mode. Each pass and batch draws
    from a generator of its own (`derive_seed`), so the results of an attack do not depend on the other attacks, unless
    it begins at their worst points (``warm_starts``, see `Pass`).

    Args:
        mixture: on the device of the batches.
        batches: (x, y) pairs, x in [0, 1].
        attacks: name -> attack; names begin with their algorithm. With ``transfers = False`` they run on the mixture
            only, see `AttackSuite`.
        threat_model: the ball.
        seed: of the attacks' random starts.
        other_weights: further distributions over the members, attacked as the mixture is.
        vote: of the members, is asked at every point, and attacked in a pass of its own.
        starts: [N, ...], where attacks with ``warm_starts`` begin, in place of the worst points so far.
        state: its finished passes are not repeated, new ones are added; None keeps nothing after the call.
        on_progress: called with (pass, examples done) after each batch; a pass is "NAME" or "NAME on WHOM".
        processes: Lightning's accelerator, devices, num_nodes and strategy for several ranks: the batches are divided
            among them, rank 0 writes `state`, all return the same record. None: this process alone.

    Raises:
        ValueError: no batches. RuntimeError: an attack left the threat model (a defect, never corrected silently).
    """
    batches = [(x, as_labels(y, len(x))) for x, y in batches]
    if not batches:
        raise ValueError("nothing to evaluate: there are no batches")
    state = state or EvaluationState()
    passes = {one.key: one for one in (unattacked(mixture), *passes_of(attacks, mixture, other_weights))}
    if vote is not None:
        # The last one, because it begins at the worst points of the others.
        aimed = Pass("coalition", VoteAttack(vote.threshold), "vote", mixture)
        passes[aimed.key] = aimed
    done = state.finished(list(passes))
    if done < len(passes):
        todo = dict(list(passes.items())[done:])
        worst = state.worst(done) or Worst.before(batches)
        loop = MixtureEvaluation(
            mixture, todo, threat_model, seed, len(batches), done, worst, starts, vote, state, on_progress
        )
        _test(loop, batches, processes)
    found = {key: state.load(key) or {} for key in passes}
    reached = state.worst(len(passes))
    assert reached is not None
    weights = mixture.weights.to("cpu", torch.float64, copy=True).numpy()
    attacked = {key: arrays for key, arrays in found.items() if key != CLEAN}
    return EvaluationRecord(
        weights=weights,
        labels=torch.cat([y for _, y in batches]).cpu().numpy(),
        clean=found[CLEAN]["correct"],
        ensemble_clean=found[CLEAN]["ensemble"],
        found={key: arrays["correct"] for key, arrays in attacked.items()},
        ensemble={key: arrays["ensemble"] for key, arrays in attacked.items()},
        unanswered={key: arrays["unanswered"] for key, arrays in found.items()},
        vote={key: arrays["vote"] for key, arrays in found.items()} if vote else {},
        seconds={key: float(arrays["seconds"]) for key, arrays in attacked.items()},
        worst_points=reached.points,
    )


class MixtureEvaluation(pl.LightningModule):
    """One dataloader for each pass; after its last batch the results of a pass go to `state`.

    Args: see `evaluate`; `passes` by key, `num_batches` in each, after `done` others, which left the points `worst`.
    """

    def __init__(
        self,
        mixture: Mixture,
        passes: Mapping[str, Pass],
        threat_model: ThreatModel,
        seed: int,
        num_batches: int,
        done: int,
        worst: Worst,
        starts: Tensor | None,
        vote: Vote | None,
        state: EvaluationState,
        on_progress: Callable[[str, int], None] | None,
    ) -> None:
        super().__init__()
        self.mixture = mixture
        # Registered, so that the targets' weights move to the device with the members.
        self.targets = nn.ModuleList([one.target for one in passes.values()])
        self.passes = list(passes.items())
        self.threat_model, self.seed, self.num_batches = threat_model, seed, num_batches
        self.done, self.worst, self.vote, self.state, self.on_progress = done, worst, vote, state, on_progress
        self.starts = worst.points if starts is None else starts
        self.lam = mixture.weights.to("cpu", torch.float64).numpy()
        self._begin_pass()

    def _begin_pass(self) -> None:
        self._parts: dict[int, dict[str, np.ndarray]] = {}
        # For each batch: rows of the examples whose worst point is new, the points, the expected accuracy there.
        self._worse: list[tuple[Tensor, Tensor, Tensor]] = []
        self._seconds, self._seen = 0.0, 0

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """One batch of one pass."""
        key, one = self.passes[dataloader_idx]
        x, y = batch
        ranks = Ranks.here()
        if ranks.serves(batch_idx):
            rows = torch.arange(self._seen, self._seen + len(y))
            ball = self.threat_model.rows(slice(self._seen, self._seen + len(y)))
            started = time.perf_counter()
            with torch.enable_grad():
                starts = self.starts[rows].to(x.device) if one.is_warm else None
                x_adv, logits = one.replayed(self.mixture, x, y, ball, self.seed, batch_idx, starts)
            found = {
                "correct": correct(logits, y),
                "ensemble": correct(self.mixture.log_average(logits), y),
                "unanswered": ~answered(logits),
            }
            if self.vote is not None:
                found["vote"] = self.vote(logits) == y
            part = {name: array.to(torch.uint8).cpu().numpy() for name, array in found.items()}
            self._seconds += time.perf_counter() - started
            accuracy = torch.from_numpy(expectation(self.lam, part["correct"]))
            worse = accuracy < self.worst.accuracy[rows]
            self._worse.append((rows[worse], x_adv.cpu()[worse], accuracy[worse]))
            self._parts[batch_idx] = part
        self._seen += len(y)
        if self.on_progress is not None:
            self.on_progress(key, len(y))
        if batch_idx == self.num_batches - 1:
            self._finish(self.done + dataloader_idx, key, ranks)
        if ranks.size > 1:
            ranks.stop_together(self.device)

    def _finish(self, number: int, key: str, ranks: Ranks) -> None:
        gathered = ranks.gather_objects((self._parts, self._worse, self._seconds))
        parts = {index: part for theirs, _, _ in gathered for index, part in theirs.items()}
        for rows, points, accuracy in (change for _, changes, _ in gathered for change in changes):
            self.worst.points[rows] = points
            self.worst.accuracy[rows] = accuracy
        in_order = [parts[index] for index in range(self.num_batches)]
        arrays = {
            name: np.concatenate([part[name] for part in in_order], axis=-1)
            for name in ("correct", "ensemble", "unanswered")
        }
        arrays["seconds"] = np.asarray(max(seconds for _, _, seconds in gathered))
        if self.vote is not None:
            arrays["vote"] = np.concatenate([part["vote"] for part in in_order])
        self.state.save(number, key, arrays, self.worst, write=ranks.rank == 0)
        self._begin_pass()


class _Loader:
    """The batches as one loader, because Lightning takes a list for a list of loaders."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)


def _test(loop: MixtureEvaluation, batches: list[tuple[Tensor, Tensor]], processes: Mapping[str, Any] | None) -> None:
    accelerator = "cpu" if batches[0][0].device.type == "cpu" else "gpu"
    alone = {"accelerator": accelerator, "devices": 1, "plugins": [OneProcess()]}
    with warnings.catch_warnings(), quiet_lightning():
        # Lightning 2.6 causes this warning under newer versions of torch.
        warnings.filterwarnings("ignore", message="`isinstance.treespec, LeafSpec.` is deprecated")
        trainer = pl.Trainer(
            **(processes or alone),
            precision="32-true",
            inference_mode=False,
            use_distributed_sampler=False,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        # With several ranks a signal must not interrupt one of them inside a collective.
        signals = Signals.active if processes is not None and "strategy" in processes else None
        try:
            with nullcontext() if signals is None else signals.shielded():
                trainer.test(loop, dataloaders=[_Loader(batches) for _ in loop.passes], verbose=False)
        except SystemExit:
            # Lightning turns a signal into SystemExit without a message.
            if Signals.active is not None:
                Signals.active.check()
            if trainer.interrupted:
                raise KeyboardInterrupt from None
            raise
