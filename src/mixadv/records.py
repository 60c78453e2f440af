"""The names of the arrays in records.npz and examples.npz: who writes and who reads them takes the names from here.

docs/files.md gives their shapes. A *pass* is one attack against one classifier: "NAME" against the mixture, "NAME on
WHOM" against a member, the averaged twin or the mixture with other weights, "clean" for the images themselves.
"""

RECORDS = "records.npz"
LABELS, WEIGHTS, FOUND_BY = "labels", "weights", "found_by"
CLEAN, ROBUST = "clean", "robust"
MEMBERS_ROBUST, TWIN_ROBUST = "members_robust", "averaged_twin_robust"
# Only of task=solve: at all points, the mixture with equal weights.
UNIFORM_ROBUST = "robust uniform"
# Before the name of an attack on the mixture, and before the name of a pass.
ATTACK, MEMBER_CORRECT = "attack/", "member_correct/"
# Between the attack and whom it is aimed at, in the name of a pass.
ON = " on "

EXAMPLES = "examples.npz"
# Also FOUND_BY and LABELS, there as text.
X, X_ADV, CORRECT = "x", "x_adv", "correct"
