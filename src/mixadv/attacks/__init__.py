"""Attacks on mixtures: frozen dataclasses, called as `attack(mixture, x, y, threat_model, generator)`."""

from mixadv.attacks.apgd import APGD
from mixadv.attacks.arc import ARC
from mixadv.attacks.climber import LatticeClimber
from mixadv.attacks.noise import UniformNoise
from mixadv.attacks.objectives import AveragedLoss, ExpectedLoss, InnerLoss, Objective, TargetedLoss
from mixadv.attacks.pgd import PGD
from mixadv.attacks.search import Attack
from mixadv.attacks.square import Square
from mixadv.attacks.subsets import SubsetAttack
from mixadv.attacks.suite import AttackSuite, SuiteRecord

__all__ = [
    "APGD",
    "ARC",
    "PGD",
    "Attack",
    "AttackSuite",
    "AveragedLoss",
    "ExpectedLoss",
    "InnerLoss",
    "LatticeClimber",
    "Objective",
    "Square",
    "SubsetAttack",
    "SuiteRecord",
    "TargetedLoss",
    "UniformNoise",
]
