"""Algorithm 2 as a LightningModule with manual optimization."""

from mixadv.training.learning_rate import LearningRate
from mixadv.training.module import MemberOptimizer, MixtureTraining
from mixadv.training.schedule import Schedule

__all__ = ["LearningRate", "MemberOptimizer", "MixtureTraining", "Schedule"]
