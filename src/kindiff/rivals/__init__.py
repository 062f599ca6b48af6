"""What KIND is compared with: other ways to teach a dense model new classes, each through the same two functions."""

from kindiff.rivals.adapter import load_adapter, save_adapter
from kindiff.rivals.base import Rival, densified
from kindiff.rivals.learngene_files import LEARNGENE, expand, load_learngene, save_learngene
from kindiff.rivals.registry import RIVALS, merged, start

__all__ = [
    "LEARNGENE",
    "RIVALS",
    "Rival",
    "densified",
    "expand",
    "load_adapter",
    "load_learngene",
    "merged",
    "save_adapter",
    "save_learngene",
    "start",
]
