"""Lightning callbacks of a training: checkpoints and the progress display."""

from mixadv.callbacks.checkpoints import Checkpoints, WholeFiles
from mixadv.callbacks.progress import ProgressBar

__all__ = ["Checkpoints", "ProgressBar", "WholeFiles"]
