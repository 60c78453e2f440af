"""Algorithm 2 as a LightningModule with manual optimization."""

from mixadv.training.class_weights import ClassWeights
from mixadv.training.growth import Growth
from mixadv.training.members_phase import MembersPhase
from mixadv.training.module import MixtureTraining
from mixadv.training.phase import WeightsPhase
from mixadv.training.replicas import Replicas
from mixadv.training.schedule import Schedule

__all__ = ["ClassWeights", "Growth", "MembersPhase", "MixtureTraining", "Replicas", "Schedule", "WeightsPhase"]
