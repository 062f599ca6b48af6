"""Training: the loop, the optimiser, runs that can be killed and resumed."""

from kindiff.train.loop import Interrupted, NotFinite, fit
from kindiff.train.pretrain import pretrain
from kindiff.train.transfer import transfer

__all__ = ["Interrupted", "NotFinite", "fit", "pretrain", "transfer"]
