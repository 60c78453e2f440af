"""Algorithm 2: adversarial training of the members alternating with weights phases, as manual optimization."""

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from mixadv.attacks.objectives import InnerLoss
from mixadv.attacks.pgd import PGD
from mixadv.errors import UserError
from mixadv.lambda_solvers import LambdaSolver
from mixadv.losses import RobustLoss
from mixadv.mixture import Mixture
from mixadv.mixture_game import AttackedBatch
from mixadv.ranks import Ranks
from mixadv.threat_model import ThreatModel
from mixadv.training import generators
from mixadv.training.metrics import MeanAccuracy
from mixadv.training.optimizer import MemberOptimizer
from mixadv.training.schedule import Schedule
from mixadv.training.shared_attack import DividedGame, SharedAttack
from mixadv.training.update import add_gradient, running_statistics

STATE_SCHEMA = 3


class MixtureTraining(pl.LightningModule):
    """Adversarial training for mixtures (Meunier et al., 2021, Algorithm 2).

    For t = 1, 2, ..., with batch B_t: in a weights phase the solver plays the game of the mixture on B_t, warm
    started from the current weights lam_t, members fixed; otherwise B_t is attacked for the mixture
    (lam_t, theta_t) and one member (``sampled``) or every member (``shared``) takes an SGD step on its outer loss
    at the attacked batch. Training attacks return their last iterate; the weights phase keeps the best one.

    An epoch is one *per model*: it shows every member the training set once (in expectation when sampled).

    Args:
        mixture: the members and the weights.
        loss: inner and outer loss (AT or TRADES).
        threat_model: the ball.
        attack: PGD settings of training; objective, start and `keep` follow from the loss and the phase.
        validation_attack: PGD whose exact expected accuracy selects the best epoch.
        solver: weights of a phase; one with ``adapts = False`` keeps them fixed, without phases. Where its
            ``recent_batches`` says so, the last batches of the members' phases, with the points found for them then,
            join the game of a weights phase.
        kind, T_theta: the schedule, see `Schedule`.
        optimizer: settings of the members' optimizers.
        updates_per_member: length of the learning-rate schedule, in updates of one member.
        total_batches: batches t of the whole training, weights phases included.
        seed: seeds the generators of member draws, attacks and solver samples.
        check_every: batches between two checks that the loss is finite (each waits for the device).
        interruptible: entered around attacks, weights phases and validation batches, which change nothing that
            `abandon_batch` does not put back: an exception may come at any point inside.
        micro_batch_size: the most images of a process's share in one forward-backward pass of members phases and
            weights phases; None for no limit. Gradients of the parts add up to that of the batch, one step follows,
            and the result is that of one pass up to rounding. Batch norm is the exception: in train mode it
            normalises each part by the part's own statistics, and updates its running ones once for each part. Dropout
            draws for each part.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        loss: RobustLoss,
        threat_model: ThreatModel,
        attack: PGD,
        validation_attack: PGD,
        solver: LambdaSolver,
        kind: str = "sampled",
        T_theta: int = 50,
        optimizer: MemberOptimizer | None = None,
        updates_per_member: int,
        total_batches: int,
        seed: int = 0,
        check_every: int = 1,
        interruptible: Callable[[], AbstractContextManager[None]] = nullcontext,
        micro_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.mixture = mixture
        self.loss = loss
        self.threat_model = threat_model
        inner = InnerLoss(loss)
        self.training_attack = replace(attack, objective=inner, start=loss.start, keep="last", restarts=1)
        self.weights_attack = replace(self.training_attack, keep="objective")
        self.validation_attack = validation_attack
        self.solver = solver
        adapts = solver.adapts and mixture.num_members > 1
        self.schedule = Schedule(kind, mixture.num_members, T_theta, weights_phases=adapts)
        self.optimizer_settings = optimizer or MemberOptimizer()
        self.updates_per_member = updates_per_member
        self.total_batches = total_batches
        self.seed = seed
        self.check_every = check_every
        self.interruptible = interruptible
        self.micro_batch_size = micro_batch_size

        self.t = 0
        self.member_updates = [0] * mixture.num_members
        self.member_generator = torch.Generator().manual_seed(seed)
        self.attack_generator: torch.Generator | None = None
        self._attack_state: Tensor | None = None
        self.ranks = Ranks()
        self._recent: deque[AttackedBatch] = deque(maxlen=solver.recent_batches)
        self._bad_step: Tensor | None = None
        # Generators as they were before the batch under way, until that batch has changed something.
        self._before_batch: dict[str, Any] | None = None

        self.validation: dict[str, float] = {}
        self.clean_accuracy = MeanAccuracy()
        self.robust_accuracy = MeanAccuracy()
        self.ensemble_accuracy = MeanAccuracy()

    def configure_optimizers(self) -> Any:
        """One SGD and one schedule per member; the schedules are stepped by hand, with their member."""
        built = [self.optimizer_settings.build(member, self.updates_per_member) for member in self.mixture.members]
        return [optimizer for optimizer, _ in built], [schedule for _, schedule in built]

    def setup(self, stage: str) -> None:
        """Place the attack's generator on the device of the run; find out who runs along."""
        self.ranks = Ranks.here()
        device = self.trainer.strategy.root_device
        self.attack_generator = torch.Generator(device).manual_seed(self.seed + 1)
        if self._attack_state is not None:
            self.attack_generator.set_state(self._attack_state)
            self._attack_state = None

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Any]:
        """Serve batch t to the members or to the weights, as the schedule says; one of no examples to nobody."""
        x, y = batch
        if not len(y):
            return {"phase": "none"}
        self._before_batch = self._generators()
        self.t += 1
        if self.schedule.is_weights_phase(self.t):
            return self._weights_phase(x, y)
        return self._members_phase(x, y)

    def _weights_phase(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        self.refuse_broken()
        most, generator = self.micro_batch_size, self.attack_generator
        attacks = [SharedAttack(self.weights_attack, self.ranks, most)]
        # After a resume they come from a file.
        recent = [AttackedBatch(*(part.to(x.device) for part in batch)) for batch in self._recent]
        game = DividedGame(
            *(self.mixture, x, y, self.threat_model, attacks, self.loss, generator),
            recent=recent,
            micro_batch_size=most,
        )
        try:
            game.known()
        except ValueError as error:
            raise UserError(
                f"the members' losses are not finite at step {self.t}: stopped, the last good checkpoint is kept. "
                f"Lower optimizer.lr (now {self.optimizer_settings.lr:g})"
            ) from error
        lam0 = self.mixture.weights.double().cpu()
        with self._interruptible():
            solution = self.solver.solve(game, lam0=lam0, generator=self.attack_generator)
        self._before_batch = None
        self.mixture.set_weights(solution.weights)
        self.ranks.take_from_first_(self.mixture.weights)
        return {"phase": "weights", "value": solution.value, "lower_bound": solution.lower_bound}

    def _members_phase(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        updated = self.schedule.members_at(self.member_generator)
        attack = SharedAttack(self.training_attack, self.ranks, self.micro_batch_size)
        with self._interruptible():
            x_adv = attack.own_rows(self.mixture, x, y, self.threat_model, self.attack_generator)
        self._before_batch = None
        if self.solver.recent_batches:
            self._recent.append(AttackedBatch(x, self.ranks.gather(x_adv, len(x)), y))
        rows = self.ranks.rows(len(x))
        x, y = x[rows], y[rows]
        rates = [self._as_list(self.optimizers())[k].param_groups[0]["lr"] for k in updated]
        losses, hits = [], []
        for k in updated:
            loss, hit = self._update_member(k, x, x_adv, y)
            losses.append(loss)
            hits.append(hit)
        mean_loss = torch.stack(losses).mean()
        self._watch(mean_loss)
        return {
            "phase": "members",
            "members": updated,
            "loss": mean_loss,
            "adversarial_accuracy": torch.stack(hits).mean(),
            "lr": sum(rates) / len(rates),
        }

    def _update_member(self, k: int, x: Tensor, x_adv: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        member = self.mixture.members[k].train()
        optimizer = self._as_list(self.optimizers())[k]
        optimizer.zero_grad()
        seen = add_gradient(member, self.loss, x, x_adv, y, self.micro_batch_size, self.manual_backward)
        gradients = [p.grad for p in member.parameters() if p.grad is not None]
        # Statistics of batch norm too: members stay the same on all processes.
        self.ranks.average_([*gradients, *running_statistics(member), seen])
        optimizer.step()
        self._as_list(self.lr_schedulers())[k].step()
        self.member_updates[k] += 1
        return seen[0], seen[1]

    @staticmethod
    def _as_list(one_or_many: Any) -> list[Any]:
        return one_or_many if isinstance(one_or_many, list) else [one_or_many]

    def _watch(self, loss: Tensor) -> None:
        """Remember the first step whose loss was not finite; ask the device for it only every few steps."""
        if self._bad_step is None:
            self._bad_step = torch.full((), -1, device=loss.device)
        now_bad = ~torch.isfinite(loss) & (self._bad_step < 0)
        self._bad_step = torch.where(now_bad, self.t, self._bad_step)
        if self.t % self.check_every == 0:
            self.refuse_non_finite()

    def _interruptible(self) -> AbstractContextManager[None]:
        # One process alone must not leave what all do in step.
        return self.interruptible() if self.ranks.size == 1 else nullcontext()

    def abandon_batch(self) -> bool:
        """Undo the batch under way if it has changed nothing but generators; whether there was one."""
        if self._before_batch is None:
            return False
        self._set_generators(self._before_batch)
        self._before_batch = None
        self.t -= 1
        return True

    def _generators(self) -> dict[str, Any]:
        assert self.attack_generator is not None
        return {
            "member_generator": self.member_generator.get_state(),
            "attack_generator": self.attack_generator.get_state(),
            # Members may draw too (dropout).
            **generators.state(),
        }

    def _set_generators(self, state: dict[str, Any]) -> None:
        self.member_generator.set_state(state["member_generator"])
        generators.restore(state)
        self._attack_state = state["attack_generator"]
        if self.attack_generator is not None:
            self.attack_generator.set_state(self._attack_state)
            self._attack_state = None

    def refuse_non_finite(self) -> None:
        """Stop the training if a loss was not finite.

        Raises:
            UserError: names the first such step; checkpoints written before it are good.
        """
        if self._bad_step is not None and (step := int(self._bad_step)) >= 0:
            raise UserError(
                f"the training loss was not finite at step {step}: stopped, the last good checkpoint is kept. "
                f"Lower optimizer.lr (now {self.optimizer_settings.lr:g}) or use precision=fp32"
            )

    def refuse_broken(self) -> None:
        """Stop the training if a loss was, or a member is, not finite; a broken model never becomes a checkpoint.

        Raises:
            UserError: names the step or the member.
        """
        self.refuse_non_finite()
        for k, member in enumerate(self.mixture.members):
            tensors = [t for t in member.state_dict().values() if t.is_floating_point()]
            if not bool(torch.stack([t.isfinite().all() for t in tensors]).all()):
                raise UserError(
                    f"member {k} is not finite after step {self.t}: stopped, the last good checkpoint is kept. "
                    f"Lower optimizer.lr (now {self.optimizer_settings.lr:g})"
                )

    def on_validation_start(self) -> None:
        """Look before attacking what training left."""
        self.refuse_broken()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Exact expected accuracy, clean and under attack; every epoch meets the same random starts.

        Of several processes each takes whole batches: the numbers are those of one.
        """
        x, y = batch
        if not self.ranks.serves(batch_idx):
            x, y = x[:0], y[:0]
        generator = torch.Generator(x.device).manual_seed(self.seed + 2 + batch_idx)
        with self._interruptible(), torch.enable_grad():
            x_adv = self.validation_attack(self.mixture, x, y, self.threat_model, generator)
        # However training and attack compute, correctness is that of the plain float32 model.
        with self.mixture.attack_mode(plain=True):
            self.clean_accuracy.update(self.mixture.expected_accuracy(x, y))
            self.ensemble_accuracy.update(self.mixture.ensemble_accuracy(x, y))
            self.robust_accuracy.update(self.mixture.expected_accuracy(x_adv, y))

    def on_validation_epoch_end(self) -> None:
        """Metrics of the validation pass just made, reduced over processes, into `validation`."""
        metrics = {
            "val/clean_accuracy": self.clean_accuracy,
            "val/robust_accuracy": self.robust_accuracy,
            "val/ensemble_accuracy": self.ensemble_accuracy,
        }
        self.validation = {name: float(metric.compute()) for name, metric in metrics.items()}
        for metric in metrics.values():
            metric.reset()

    @property
    def epochs_done(self) -> float:
        """Epochs per model so far: the members' mean number of updates over the updates of one epoch."""
        per_epoch = self.updates_per_member / (self.trainer.max_epochs or 1)
        return sum(self.member_updates) / len(self.member_updates) / per_epoch

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning does not know of: counters and generators, as tensors and plain containers."""
        checkpoint["mixadv"] = {
            "schema": STATE_SCHEMA,
            "t": self.t,
            "member_updates": list(self.member_updates),
            **self._generators(),
            "recent": [list(batch) for batch in self._recent],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up counters and generators.

        Raises:
            UserError: the checkpoint is not one of ours, or of another schema or L.
        """
        state = checkpoint.get("mixadv")
        if state is None or state.get("schema") != STATE_SCHEMA:
            raise UserError("the checkpoint was not written by this version's training: use resume=never")
        if len(state["member_updates"]) != self.mixture.num_members:
            raise UserError(
                f"the checkpoint holds {len(state['member_updates'])} members, not L={self.mixture.num_members}: "
                "use another name=... or resume=never"
            )
        own, held = self.state_dict(), checkpoint.get("state_dict", self.state_dict())
        if {k: v.shape for k, v in own.items()} != {k: getattr(v, "shape", None) for k, v in held.items()}:
            raise UserError("the checkpoint is of other members than these: use another name=... or resume=never")
        self.t = state["t"]
        self.member_updates = list(state["member_updates"])
        self._set_generators(state)
        self._recent.extend(AttackedBatch(*batch) for batch in state["recent"])
