"""The test loop: every attack against the mixture and its parts, every point replayed on everybody."""

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
from mixadv.evaluation.record import EvaluationRecord
from mixadv.evaluation.state import EvaluationState
from mixadv.mixture import Mixture
from mixadv.ranks import Ranks
from mixadv.signals import Signals
from mixadv.threat_model import ThreatModel


def evaluate(
    mixture: Mixture,
    batches: Iterable[tuple[Tensor, Tensor]],
    attacks: Mapping[str, Attack],
    threat_model: ThreatModel,
    *,
    seed: int = 0,
    other_weights: Sequence[Sequence[float]] = (),
    keep_images: int = 0,
    state: EvaluationState | None = None,
    on_progress: Callable[[str, int], None] | None = None,
    processes: Mapping[str, Any] | None = None,
) -> EvaluationRecord:
    """Attack the mixture, its members alone and its averaged twin on all batches; replay every point on everybody.

    Every point is checked against norm, box and NaN by code that the attacks do not share. Correctness comes
    from a plain forward pass in the parameters' own precision, members in evaluation mode. Each pass and batch
    draws from a generator of its own (`derive_seed`), so attacks do not disturb one another.

    Args:
        mixture: on the device of the batches.
        batches: (x, y) pairs, x in [0, 1].
        attacks: name -> attack; names begin with their algorithm. Those that do not ``transfer`` meet the mixture only.
        threat_model: the ball.
        seed: of the attacks' random starts.
        other_weights: further distributions over the members, attacked like the mixture's own.
        keep_images: how many of the first examples keep their attacked images in the record.
        state: finished passes in it are not repeated, further ones are added; None keeps nothing beyond the call.
        on_progress: called with (pass, examples done) after each batch; a pass is "NAME" or "NAME on WHOM".
        processes: Lightning's accelerator, devices, num_nodes and strategy, where several processes measure: each
            takes every so many-th batch, the first keeps `state`, all return the same record. None: this one alone.

    Raises:
        ValueError: no batches. RuntimeError: an attack left the threat model (a defect, never corrected silently).
    """
    batches = list(batches)
    if not batches:
        raise ValueError("nothing to evaluate: there are no batches")
    state = state or EvaluationState()
    passes = {one.key: one for one in (unattacked(mixture), *passes_of(attacks, mixture, other_weights))}
    todo = {key: one for key, one in passes.items() if state.load(key) is None}
    if todo:
        loop = MixtureEvaluation(mixture, todo, threat_model, seed, len(batches), keep_images, state, on_progress)
        _test(loop, batches, processes)
    found = {key: state.load(key) or {} for key in passes}
    weights = mixture.weights.to("cpu", torch.float64, copy=True).numpy()
    attacked = {key: arrays for key, arrays in found.items() if key != CLEAN}
    return EvaluationRecord(
        weights=weights,
        labels=torch.cat([y for _, y in batches]).cpu().numpy(),
        clean=found[CLEAN]["correct"],
        ensemble_clean=found[CLEAN]["ensemble"],
        found={key: arrays["correct"] for key, arrays in attacked.items()},
        ensemble={key: arrays["ensemble"] for key, arrays in attacked.items()},
        seconds={key: float(arrays["seconds"]) for key, arrays in attacked.items()},
        images={key: arrays["images"] for key, arrays in found.items()} if keep_images else {},
    )


class MixtureEvaluation(pl.LightningModule):
    """One dataloader for each pass; what a pass found goes to `state` when its last batch is done.

    Args: see `evaluate`; `passes` by key, `num_batches` in each.
    """

    def __init__(
        self,
        mixture: Mixture,
        passes: Mapping[str, Pass],
        threat_model: ThreatModel,
        seed: int,
        num_batches: int,
        keep_images: int,
        state: EvaluationState,
        on_progress: Callable[[str, int], None] | None,
    ) -> None:
        super().__init__()
        self.mixture = mixture
        # Registered, so that what a target owns moves with the members.
        self.targets = nn.ModuleList([one.target for one in passes.values()])
        self.passes = list(passes.items())
        self.threat_model, self.seed, self.num_batches = threat_model, seed, num_batches
        self.keep_images, self.state, self.on_progress = keep_images, state, on_progress
        self._parts: dict[int, dict[str, np.ndarray]] = {}
        self._seconds, self._seen = 0.0, 0

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """One batch of one pass."""
        key, one = self.passes[dataloader_idx]
        x, y = batch
        ranks = Ranks.here()
        if ranks.serves(batch_idx):
            started = time.perf_counter()
            with torch.enable_grad():
                x_adv, logits = one.replayed(self.mixture, x, y, self.threat_model, self.seed, batch_idx)
            answers = {"correct": logits.argmax(-1), "ensemble": self.mixture.log_average(logits).argmax(-1)}
            part = {key: (answer == y).to(torch.uint8).cpu().numpy() for key, answer in answers.items()}
            self._seconds += time.perf_counter() - started
            part["images"] = x_adv[: max(0, self.keep_images - self._seen)].cpu().numpy()
            self._parts[batch_idx] = part
        self._seen += len(y)
        if self.on_progress is not None:
            self.on_progress(key, len(y))
        if batch_idx == self.num_batches - 1:
            self._finish(key, ranks)
        if ranks.size > 1:
            ranks.stop_together(self.device)

    def _finish(self, key: str, ranks: Ranks) -> None:
        everybody = ranks.gather_objects((self._parts, self._seconds))
        parts = {number: part for theirs, _ in everybody for number, part in theirs.items()}
        in_order = [parts[number] for number in range(self.num_batches)]
        arrays = {
            "correct": np.concatenate([part["correct"] for part in in_order], axis=-1),
            "ensemble": np.concatenate([part["ensemble"] for part in in_order], axis=-1),
            "images": np.concatenate([part["images"] for part in in_order]),
            "seconds": np.asarray(max(seconds for _, seconds in everybody)),
        }
        self.state.save(key, arrays, write=ranks.rank == 0)
        self._parts, self._seconds, self._seen = {}, 0.0, 0


class _Loader:
    """The batches as one loader: Lightning takes a list apart into loaders."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)


def _test(loop: MixtureEvaluation, batches: list[tuple[Tensor, Tensor]], processes: Mapping[str, Any] | None) -> None:
    alone = {"accelerator": "cpu" if batches[0][0].device.type == "cpu" else "gpu", "devices": 1}
    with warnings.catch_warnings(), quiet_lightning():
        # Lightning 2.6 under newer torch, and advice on loaders that do not apply to lists of tensors.
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
        # One process alone must not leave what all do in step.
        signals = Signals.active if processes is not None and "strategy" in processes else None
        try:
            with nullcontext() if signals is None else signals.shielded():
                trainer.test(loop, dataloaders=[_Loader(batches) for _ in loop.passes], verbose=False)
        except SystemExit:
            # Lightning turns signals into an exit without a word.
            if Signals.active is not None:
                Signals.active.check()
            if trainer.interrupted:
                raise KeyboardInterrupt from None
            raise
