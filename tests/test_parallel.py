"""Ranks without a second process; train/test_ranks.py has two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kindiff.errors import UsageError
from kindiff.parallel import ALONE, Ranks
from toys import toy


def test_what_does_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not divide into 3 parts"):
        toy(tmp_path, batch=8, accumulate=3)


def test_one_process_exchanges_nothing() -> None:
    numbers = torch.tensor([3.0])
    assert Ranks(0, 1) == ALONE
    assert ALONE.mean(numbers) is numbers
    assert ALONE.rows(numbers) is numbers
    assert ALONE.most(7) == 7
    assert ALONE.word("bad") == "bad"
    assert ALONE.in_turn(lambda: 5) == 5
