"""Exact measurement of a mixture under attacks, per example, as a Lightning test loop that can be resumed."""

from mixadv.evaluation.counterparts import Choice, choose, counterparts_of
from mixadv.evaluation.curves import curves
from mixadv.evaluation.distrust import (
    ABOVE,
    CHECKS_OF_RECORD,
    FLAGS,
    Flag,
    checks_made,
    distrust,
    flags_above,
    flags_of_record,
)
from mixadv.evaluation.pool import equilibrium_of, pool_of
from mixadv.evaluation.record import EvaluationRecord
from mixadv.evaluation.run import evaluate
from mixadv.evaluation.state import EvaluationState, fingerprint

__all__ = [
    "ABOVE",
    "CHECKS_OF_RECORD",
    "FLAGS",
    "Choice",
    "EvaluationRecord",
    "EvaluationState",
    "Flag",
    "checks_made",
    "choose",
    "counterparts_of",
    "curves",
    "distrust",
    "equilibrium_of",
    "evaluate",
    "fingerprint",
    "flags_above",
    "flags_of_record",
    "pool_of",
]
