"""What KIND is compared with: other ways to teach a dense model new classes, each through the same two functions."""

from kindiff.rivals.adapter import load_adapter, save_adapter
from kindiff.rivals.base import Rival
from kindiff.rivals.registry import RIVALS, merged, start

__all__ = ["RIVALS", "Rival", "load_adapter", "merged", "save_adapter", "start"]
