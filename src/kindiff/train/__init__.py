"""Training: the loop, the optimiser, runs that can be killed and resumed."""

from kindiff.train.adapting import adapt
from kindiff.train.loop import Interrupted, fit
from kindiff.train.pretraining import pretrain
from kindiff.train.rollback import NotFinite
from kindiff.train.transferring import transfer

__all__ = ["Interrupted", "NotFinite", "adapt", "fit", "pretrain", "transfer"]
