"""Flags: symptoms that a sound model under a working attack does not show, as reasons to distrust its robustness.

The symptoms are those of Carlini et al., "On Evaluating Adversarial Robustness" (2019), and Athalye, Carlini & Wagner
(ICML 2018). Each has a number and a threshold here, so that a flag does not depend on the judgement of a reader.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from torch import Tensor

from mixadv.attacks.climber import LatticeClimber
from mixadv.attacks.pgd import PGD
from mixadv.attacks.search import Attack, check_batch
from mixadv.attacks.subsets import SubsetAttack
from mixadv.attacks.suite import CLEAN, TWIN, Pass, passes_of
from mixadv.evaluation.probes import SATURATED_RATIO, OwnAttacks, answers, gradients, named, saturated
from mixadv.evaluation.record import ON, EvaluationRecord
from mixadv.intervals import paired_interval
from mixadv.mixture import Mixture
from mixadv.results import CeilingRow, Flag
from mixadv.seeding import seeded
from mixadv.threat_model import ThreatModel

# Gradient attacks fail on images without a gradient. Up to this share of such images they overstate the accuracy by no
# more than MAX_DISAGREEMENT, the tolerated difference between two losses.
MAX_SHARE_WITHOUT_GRADIENT = 0.05
# On the sound models of tests/test_distrust.py, random search and noise find nothing that gradient attacks miss. A
# single image is not counted, because one may be an outlier.
MAX_SHARE_BEATEN, MIN_BEATEN = 0.01, 2
# The 95 % interval of the difference between two losses may not lie beyond this. The differences are at most 7 points
# on the sound models of the tests, and 40 points on saturated ones.
MAX_DISAGREEMENT = 0.05
# The same for any two white-box attacks on one classifier, of which the weaker may have a weak loss or few starts: the
# differences are at most 10 points on the sound models of the tests.
MAX_WHITE_BOX_DISAGREEMENT = 0.1
# On the sound models of the tests no image counts as saturated, under a mild tanh three quarters do.
MAX_SHARE_SATURATED = 0.25
WHITE_BOX, BLACK_BOX, NOISE_ATTACKS = ("pgd", "apgd", "arc", "subset"), ("square",), ("noise",)
# Begins at the points of all others, so what it finds says nothing about how they compare.
WARM = ("climber",)
CE_BASED, WITHOUT_CE = ("pgd", "apgd"), {"dlr", "margin", "cw"}


# Name -> remedy. docs/evaluation.md explains each flag under a heading with its name.
FLAGS: dict[str, str] = {
    "non-finite-logits": "Look for a logarithm, division or root in the model that fails on some images.",
    "zero-gradients": "Attack a differentiable version of the model (for a rounding step its identity), climb the "
    "margin or DLR in place of the cross-entropy, or trust attacks without gradients only.",
    "saturated-logits": "Remove the function that squashes the logits (tanh, sigmoid, clipping): the order of the "
    "classes stays the same without it.",
    "probabilities": "Return the logits, without softmax.",
    "random-outputs": "Make the noise a mixture's members with fixed weights, or attack the mean over many draws.",
    "batch-dependent": "Let every layer use stored statistics in eval mode, so that an image's answer is its own.",
    "black-box-beats-white-box": "Find out why gradients mislead on these images (their numbers are in records.npz), "
    "and give the white-box attacks more steps, restarts or another loss.",
    "noise-beats-pgd": "Check step size, loss and the model's gradient: PGD begins at a random point itself and must "
    "not do worse than noise.",
    "more-steps-do-not-hurt": "Climb another loss, check the step size, and look for a layer that stops or falsifies "
    "the gradient.",
    "larger-eps-does-not-hurt": "Give the attack steps that grow with eps, and look for a layer that stops or "
    "falsifies the gradient.",
    "ce-and-dlr-disagree": "Count the attack that finds more, with more restarts, and check the scale of the logits.",
    "white-box-attacks-disagree": "Count the attack that finds more, give it more restarts, and look for what weakens "
    "the others: the scale of the logits, or a gradient that is right at some points only.",
    "robust-above-clean": "Check that clean and attacked images meet the same model, with the same preprocessing, in "
    "eval mode.",
    "survives-grey": "Look for what the model knows besides the image, such as the test set or the label, and for what "
    "hides its gradient.",
    "above-the-ceiling": "The attacks missed points that exist: use protocol=strict, or give them more steps, restarts "
    "and targets. Do not report this number.",
    "search-not-exhaustive": "This is a note, not a symptom: the accuracy is an upper bound. Search longer, for "
    "example with protocol.attacks.climber.num_steps=1000, and see whether it falls.",
}

# The check of `flags_above`.
ABOVE = "above-the-ceiling"
# The checks of `flags_of_record`.
CHECKS_OF_RECORD = ("non-finite-logits",)


def distrust(
    mixture: Mixture,
    x: Tensor,
    y: Tensor,
    threat_model: ThreatModel,
    record: EvaluationRecord | None = None,
    attacks: Mapping[str, Attack] | None = None,
    *,
    seed: int = 0,
    batch_size: int = 128,
) -> list[Flag]:
    """The flags of a mixture, in the order of `FLAGS`; an empty list if no symptom is found.

    The members, and the mixture if it has several, are evaluated and attacked on the images x [N, ...] with labels
    y [N], a few hundred of the test set. The attacks made here climb the margin, because it has a gradient for logits
    of any size. They cost at most 20 + 20 + 2 * 20 forward and backward passes of N images per target; comparing the
    gradients of classes costs 9 backward passes of N images per member. All randomness comes from `seed`, including
    that of members that draw numbers from torch; the caller's random state is restored.

    Args:
        mixture: on the device of x; attacked in eval mode and left unchanged.
        record: of the evaluation, on these or more images; the names of its attacks tell their kind.
        attacks: of the evaluation, by name, to see how many sets of members they tried.
        batch_size: of all passes except those that compare batches.

    Raises:
        ValueError: no images, or a batch that cannot be attacked, see `check_batch`.
    """
    y = check_batch(x, y, threat_model)
    if not len(x):
        raise ValueError("there are no images to check")
    x = x.detach()
    with seeded(seed, "distrust", device=x.device), mixture.attack_mode(plain=True):
        found = answers(mixture, x)
        shares, blind = gradients(mixture, x, y, threat_model, seed, batch_size)
        found |= _no_gradients(shares, record) | _saturated(saturated(mixture, x, y, threat_model, seed, batch_size))
        runs = OwnAttacks(x, y, threat_model, seed, batch_size)
        for one in passes_of({"distrust": PGD()}, mixture):
            # An attack on the mixture works if any member has a gradient. No number is claimed for the twin.
            own = set(range(mixture.num_members)) if one.target is mixture else {_member(one)}
            if one.against != TWIN and not own <= blind:
                for name, sentence in runs.symptoms(one).items():
                    found[name] = f"{found[name]}; {sentence}" if name in found else sentence
    if record is not None:
        found |= _contradictions(record) | _unanswered(record)
    found |= _sets_left_out(attacks or {}, mixture.support().num_members)
    return _flags(found)


def checks_made(mixture: Mixture, record: EvaluationRecord, attacks: Mapping[str, Attack]) -> tuple[str, ...]:
    """The checks that `distrust` makes with these arguments, in the order of `FLAGS`.

    It leaves out those that compare attacks of which the evaluation ran too few, and the note on sets of members where
    no attack searches over them.
    """
    # Of `flags_above`, which needs the ceiling.
    left_out = {ABOVE}
    left_out |= {flag for flag, (weak, strong) in _sides(record).items() if not (weak and strong)}
    if not any(_compared_white_box(record)):
        left_out.add("white-box-attacks-disagree")
    if not record.attacks:
        left_out.add("robust-above-clean")
    searching = any(isinstance(attack, SubsetAttack | LatticeClimber) for attack in attacks.values())
    if not searching or mixture.support().num_members == 1:
        left_out.add("search-not-exhaustive")
    return tuple(flag for flag in FLAGS if flag not in left_out)


def flags_of_record(record: EvaluationRecord) -> list[Flag]:
    """The flags that need no further pass through the members: answers that are not there."""
    return _flags(_unanswered(record))


def flags_above(record: EvaluationRecord, ceiling: CeilingRow) -> list[Flag]:
    """The flag of classifiers that seem to be right on more of the measured images than any classifier can be.

    Args:
        record: of the evaluation.
        ceiling: of the same images at the same radius, with its upper bounds.
    """
    deterministic = {f"member {k}": right for k, right in enumerate(record.members_worst_case())}
    if len(deterministic) > 1:
        deterministic |= {"the averaged twin": record.averaged_twin_worst_case()}
        deterministic |= {"the vote": record.vote_worst_case()} if record.vote else {}
    found = [
        f"{who} is right at all points found on {value:.1%} of the images, but no {what} can be on more than {most:.1%}"
        for what, most, classifiers in (
            ("classifier", ceiling.deterministic_upper, deterministic),
            ("mixture", ceiling.randomised_upper, {"the mixture": record.worst_case()}),
        )
        if most is not None
        for who, right in classifiers.items()
        # More than the rounding error of the linear program.
        if (value := float(np.mean(right))) > most + 1e-6
    ]
    return _flags({ABOVE: "; ".join(found)} if found else {})


def _flags(found: Mapping[str, str]) -> list[Flag]:
    return [Flag(name, f"{found[name]}.", remedy) for name, remedy in FLAGS.items() if name in found]


def _unanswered(record: EvaluationRecord) -> dict[str, str]:
    anywhere = np.any(list(record.unanswered.values()), axis=0) if record.unanswered else np.zeros((0, 0))
    sentences = [
        f"member {k}: logits that are not finite on {int(record.unanswered[CLEAN][k].sum())} clean images, and at some "
        f"measured point of {int(rows.sum())} of {len(rows)} images"
        for k, rows in enumerate(anywhere)
        if rows.any()
    ]
    return {"non-finite-logits": "; ".join(sentences)} if sentences else {}


def _no_gradients(shares: Mapping[str, list[float]], record: EvaluationRecord | None) -> dict[str, str]:
    """Members without gradient: of the margin, or of the cross-entropy if all gradient attacks used it alone."""
    without = {loss: [k for k, s in enumerate(each) if s > MAX_SHARE_WITHOUT_GRADIENT] for loss, each in shares.items()}
    loss, of, members = "margin", "the margin", without["margin"]
    if not members and record is not None and _only_cross_entropy(record):
        robust = record.members_worst_case().mean(1)
        # A member that hardly survives on any image is not overstated.
        members = [k for k in without["ce"] if robust[k] > MAX_SHARE_WITHOUT_GRADIENT]
        loss, of = "ce", "the cross-entropy, which all gradient attacks climbed,"
    if not members:
        return {}
    each = ", ".join(f"{shares[loss][k]:.1%}" for k in members)
    return {"zero-gradients": f"{named(members)}: the gradient of {of} is 0 or rounding noise on {each} of the images"}


def _saturated(shares: list[float]) -> dict[str, str]:
    members = [k for k, share in enumerate(shares) if share > MAX_SHARE_SATURATED]
    if not members:
        return {}
    each = ", ".join(f"{shares[k]:.1%}" for k in members)
    return {
        "saturated-logits": f"{named(members)}: on {each} of the images the logits of some classes have gradients more "
        f"than {SATURATED_RATIO:.0f} times those of others"
    }


def _contradictions(record: EvaluationRecord) -> dict[str, str]:
    """The symptoms for which the results of the evaluation's attacks are compared."""
    found: dict[str, str] = {}
    accuracy = {key: record.expected(correct) for key, correct in record.found.items()}

    def lowest(names: list[str], parts: bool) -> np.ndarray:
        keys = [key for key in accuracy if key in names or (parts and key.split(ON)[0] in names)]
        return np.min([accuracy[key] for key in keys], axis=0)

    sides = _sides(record)
    for flag in ("black-box-beats-white-box", "noise-beats-pgd"):
        weak, strong = sides[flag]
        if weak and strong:
            # 1e-9 is more than the rounding error of a sum of weights.
            count = int((lowest(weak, False) < lowest(strong, True) - 1e-9).sum())
            total = len(record.labels)
            if count >= MIN_BEATEN and count > MAX_SHARE_BEATEN * total:
                found[flag] = f"{', '.join(weak)} found what {', '.join(strong)} missed on {count} of {total} images"
    ce, dlr = sides["ce-and-dlr-disagree"]
    if ce and dlr:
        low, _, high = paired_interval(lowest(ce, False) - lowest(dlr, False))
        if low > MAX_DISAGREEMENT or high < -MAX_DISAGREEMENT:
            found["ce-and-dlr-disagree"] = (
                f"{', '.join(ce)} leave {lowest(ce, False).mean():.1%} accuracy, {', '.join(dlr)} "
                f"{lowest(dlr, False).mean():.1%}"
            )
    apart = list(_white_box_disagreements(record))
    if apart:
        found["white-box-attacks-disagree"] = "; ".join(apart)
    clean = record.expected(record.clean)
    above = [name for name in record.attacks if paired_interval(accuracy[name] - clean)[0] > 0]
    if above:
        found["robust-above-clean"] = f"clean accuracy is {clean.mean():.1%}, under attack it is " + ", ".join(
            f"{accuracy[name].mean():.1%} ({name})" for name in above
        )
    return found


def _sides(record: EvaluationRecord) -> dict[str, tuple[list[str], list[str]]]:
    """Check -> the two groups of the evaluation's attacks that it compares; without one of them it is not made."""
    ce = [name for name in record.attacks if "ce" in _words(name)]
    dlr = [name for name in record.attacks if "dlr" in _words(name)]
    # Untargeted DLR, if there is one: several targets are several attacks, not only another loss.
    dlr = [name for name in dlr if "targeted" not in _words(name)] or dlr
    return {
        "black-box-beats-white-box": (_beginning(record, BLACK_BOX), _beginning(record, WHITE_BOX)),
        "noise-beats-pgd": (_beginning(record, NOISE_ATTACKS), _beginning(record, ("pgd",))),
        "ce-and-dlr-disagree": (ce, dlr),
    }


def _white_box_disagreements(record: EvaluationRecord) -> Iterator[str]:
    """For each member the white-box attack that finds least, if another one on the same member finds far more.

    Attacks on a mixture are not compared: climbing the averaged loss stalls there also if all members are sound.
    """
    for k, correct in _compared_white_box(record):
        weak, strong = (choose(correct, key=lambda name: correct[name].mean()) for choose in (max, min))
        if paired_interval(correct[weak] - correct[strong])[0] > MAX_WHITE_BOX_DISAGREEMENT:
            yield (
                f"member {k}: {weak} leaves {correct[weak].mean():.1%} accuracy, {strong} {correct[strong].mean():.1%}"
            )


def _compared_white_box(record: EvaluationRecord) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """The members that several white-box attacks attacked: index, attack -> correctness [N]."""
    white = _beginning(record, WHITE_BOX)
    for k in range(len(record.weights)):
        on = "" if len(record.weights) == 1 else f"{ON}member {k}"
        correct = {name: record.found[name + on][k].astype(float) for name in white if name + on in record.found}
        if len(correct) > 1:
            yield k, correct


def _sets_left_out(attacks: Mapping[str, Attack], members: int) -> dict[str, str]:
    """Attacks that search over sets of the members, of which none tried all sets."""
    total, tried = 2**members - 1, []
    for name, attack in attacks.items():
        if isinstance(attack, SubsetAttack):
            if attack.sets_of(members) == total:
                return {}
            tried.append(f"{name} tried {attack.sets_of(members)}")
        elif isinstance(attack, LatticeClimber):
            tried.append(f"{name} at least {attack.searches}, chosen for each image that can get worse")
    if not tried or members == 1:
        return {}
    sets = f"{total:,}" if members <= 20 else f"2^{members} - 1"
    return {"search-not-exhaustive": f"of the {sets} sets of {members} members {', '.join(tried)}"}


def _beginning(record: EvaluationRecord, algorithms: tuple[str, ...]) -> list[str]:
    return [name for name in record.attacks if name.startswith(algorithms)]


def _words(name: str) -> set[str]:
    return set(name.replace("_", "-").split("-"))


def _only_cross_entropy(record: EvaluationRecord) -> bool:
    white = _beginning(record, WHITE_BOX + WARM)
    return bool(white) and all(name.startswith(CE_BASED) and not _words(name) & WITHOUT_CE for name in white)


def _member(one: Pass) -> int | None:
    return int(one.against.split()[-1]) if one.against.startswith("member ") else None
