"""One seed for everything: all generators come from `mixadv.seeding`, and neighbouring seeds share no draws."""

import ast
from dataclasses import dataclass, field
from pathlib import Path

import pytorch_lightning as pl
import torch

from mixadv.attacks import PGD
from mixadv.data.digits import Digits
from mixadv.members.recipe import build_mixture
from mixadv.seeding import derive_seed, generator_for, seeded
from mixadv.threat_model import ThreatModel
from mixadv.training import MixtureTraining

SOURCE = Path(__file__).resolve().parents[1] / "src" / "mixadv"
RECIPE = {"name": "linear", "num_classes": 10, "image_shape": [1, 8, 8]}


def test_only_one_module_seeds_generators():
    seeds = {
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr in ("manual_seed", "manual_seed_all", "default_rng", "seed_everything")
    }
    assert seeds == {"seeding.py"}


def test_a_seed_depends_on_every_part_and_on_nothing_else():
    parts = [(0,), (1,), ("0",), (0, "a"), (0, "b"), (0, "a", 0), (0, "a", 1), (1, "a", 0), (0, "a", "0"), (0, "a0")]
    seeds = [derive_seed(*each) for each in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
    # The first 8 bytes of SHA-256("int:0"), without the lowest bit.
    assert seeds[0] == 0x669B4C24C93570EB >> 1
    assert generator_for(3, "attacks").initial_seed() == derive_seed(3, "attacks")


def test_code_that_draws_without_a_generator_is_seeded_and_disturbs_nobody():
    torch.manual_seed(11)
    undisturbed = torch.rand(3)
    torch.manual_seed(11)
    with seeded(0, "member", 1):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), undisturbed)
    with seeded(0, "member", 1):
        assert torch.equal(torch.rand(3), first)
    with seeded(1, "member", 0):
        assert not torch.equal(torch.rand(3), first)


@dataclass(frozen=True)
class Recorded(PGD):
    """PGD that notes the generator of every call: the seed it was made with, and its state."""

    seen: list = field(default_factory=list)

    def __call__(self, mixture, x, y, threat_model, generator=None):
        self.seen.append(generator.initial_seed())
        return super().__call__(mixture, x, y, threat_model, generator)


def seeds_of(seed):
    """The seeds of all generators that attacks of a short training, its validations and its test were given."""
    training, validation, test = (Recorded(num_steps=1) for _ in range(3))
    data = Digits(num_train=60, num_val=30, num_test=30, batch_size=20, eval_batch_size=10, seed=seed)
    module = MixtureTraining(
        build_mixture({"L": 3, "model": RECIPE}, seed=seed),
        ThreatModel("linf", 0.1),
        attack=training,
        validation_attack=validation,
        protocol={"pgd-1": test},
        seed=seed,
    )
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    draws = {"members": [module.member_generator.initial_seed()]}
    return draws | {"training": training.seen, "validation": validation.seen, "test": test.seen}


def test_neighbouring_seeds_share_no_generator():
    """Seed + number would give validation batch 1 of seed 0 the random starts of batch 0 of seed 1."""
    taken = {}
    for seed in (0, 1, 2):
        for purpose, seeds in seeds_of(seed).items():
            assert seeds
            for number in set(seeds):
                assert taken.setdefault(number, (seed, purpose)) == (seed, purpose)
    assert {purpose for _, purpose in taken.values()} == {"members", "training", "validation", "test"}
    assert len({key for key, value in taken.items() if value[1] == "validation"}) == 3 * 3


def test_member_k_is_the_same_in_mixtures_of_any_size():
    two, three = (build_mixture({"L": size, "model": RECIPE}, seed=4).state_dict() for size in (2, 3))
    for name, value in two.items():
        if name != "weights":
            assert torch.equal(value, three[name])
    other = build_mixture({"L": 2, "model": RECIPE}, seed=5).state_dict()
    weights = [state[f"members.{k}.net.1.weight"] for state in (three, other) for k in range(2)]
    assert not any(torch.equal(weights[i], weights[j]) for i in range(4) for j in range(i))
