"""Algorithm 2 as a LightningModule with manual optimization."""

from mixadv.training.module import MixtureTraining
from mixadv.training.optimizer import LearningRate, MemberOptimizer
from mixadv.training.replicas import Replicas
from mixadv.training.schedule import Schedule

__all__ = ["LearningRate", "MemberOptimizer", "MixtureTraining", "Replicas", "Schedule"]
