"""The names of the arrays in records.npz, examples.npz and regions.npz; docs/files.md gives their shapes.

A *pass* is one attack against one classifier: "NAME" against the mixture; "NAME on TARGET" against a member, the
averaged twin or the mixture with other weights. "clean" stands for the clean images.
"""

RECORDS = "records.npz"
LABELS, INDICES, WEIGHTS, FOUND_BY = "labels", "indices", "weights", "found_by"
CLEAN, ROBUST = "clean", "robust"
MEMBERS_ROBUST, TWIN_ROBUST, VOTE_ROBUST = "members_robust", "averaged_twin_robust", "vote_robust"
# Only in task=solve: ROBUST for the mixture with equal weights.
UNIFORM_ROBUST = "robust uniform"
# Prefixes of the name of an attack on the mixture, and of the name of a pass.
ATTACK, MEMBER_CORRECT = "attack/", "member_correct/"
# Between attack and target in the name of a pass.
ON = " on "

# Of task=ceiling.
CEILING = "ceiling.npz"

EXAMPLES = "examples.npz"
# Beside FOUND_BY and LABELS, which is text there.
X, X_ADV, CORRECT = "x", "x_adv", "correct"

# The answers of the members in the plane, for images of two numbers; CLASS_NAMES beside LABELS, which are numbers.
REGIONS = "regions.npz"
ANSWERS, POINTS, SHOWN, WORST, CLASS_NAMES = "answers", "points", "shown", "worst", "class_names"
