"""Attacks on mixtures: each is a frozen dataclass, called as `attack(mixture, x, y, threat_model,
generator)`.
"""

from mixadv.attacks.objectives import AveragedCE, ExpectedLoss, InnerLoss, Objective
from mixadv.attacks.pgd import PGD
from mixadv.attacks.search import Attack

__all__ = ["PGD", "AveragedCE", "Attack", "ExpectedLoss", "InnerLoss", "Objective"]
