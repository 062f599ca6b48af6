"""Verdicts in words, against records whose outcome is known."""

from __future__ import annotations

import math

import pytest

from kindiff.study.report_words import budgets, convergence, headline, sentence, verdict
from kindiff.study.tables import Row, best_rows
from report.made_up import SEEDS, record, records_of


def rows_of(distances: dict[str, tuple[float, ...]], task: str = "a", steps: int = 100) -> list[Row]:
    """Methods with the given distances, a seed each."""
    return best_rows(
        [
            record(task, method, seed=seed, distance=value, steps=steps)
            for method, values in distances.items()
            for seed, value in zip(SEEDS, values, strict=False)
        ]
    )


def test_the_first_stands_against_the_best_of_the_other_side() -> None:
    found = verdict(
        rows_of({"kind-1": (5.0, 5.2), "kind-2": (4.0, 4.4), "full": (7.0, 7.1), "oft": (9.0, 9.0)}),
        sides=True,
    )
    assert (found.first.method, found.second.method) == ("kind-2", "full")
    assert found.gap == pytest.approx(7.05 - 4.2)
    assert found.spread == pytest.approx(math.sqrt(2 * 0.2**2))
    assert found.spreads == pytest.approx(2.85 / 0.2828427)
    assert found.clear
    beaten = verdict(rows_of({"kind-1": (5.0, 5.2), "full": (3.0, 3.1), "oft": (4.0, 4.0)}), sides=True)
    assert (beaten.first.method, beaten.second.method) == ("full", "kind-1")


def test_without_another_side_it_stands_against_the_next() -> None:
    assert (
        verdict(rows_of({"oft": (4.0,), "full": (3.0,), "lora-6": (5.0,)}), sides=True).second.method == "oft"
    )
    assert verdict(rows_of({"oft": (4.0,)}), sides=True) is None


def test_a_win_is_said_with_its_size() -> None:
    said = sentence(verdict(rows_of({"kind-2": (4.0, 4.4), "full": (7.0, 7.1)}), sides=True))
    assert "KIND, rank 2 a class is first with FD (Lite0) 4.20 ± 0.28" in said
    assert "the best rival, full fine-tuning, has 7.05 ± 0.07" in said
    assert "10.1 times the larger spread" in said
    assert "Two sets of real images differ by 2.9: it is 1.3 above that, the other 4.15." in said
    assert "139k against 961k" in said


def test_a_defeat_is_said_too() -> None:
    rows = rows_of({"kind-2": (8.0, 8.4), "full": (7.0, 7.1)})
    assert "full fine-tuning is first" in sentence(verdict(rows, sides=True))
    assert "KIND's best setting, KIND, rank 2 a class, has 8.20" in sentence(verdict(rows, sides=True))
    assert headline({"a": rows}, sides=True) == (
        "full fine-tuning is first, beyond the spread: FD (Lite0) 7.05 ± 0.07 against 8.20 ± 0.28 of KIND, rank 2 a "
        "class."
    )


def test_what_is_within_the_spread_has_no_clear_winner() -> None:
    rows = rows_of({"kind-2": (6.0, 8.0), "full": (7.1, 7.2)})
    assert "no clear winner" in sentence(verdict(rows, sides=True))
    assert headline({"a": rows}, sides=True).startswith(
        "KIND is first; the difference is within the spread: FD"
    )
    twice = {"a": rows, "b": rows_of({"kind-2": (6.0, 8.0), "full": (7.1, 7.2)}, "b")}
    assert headline(twice, sides=True) == "KIND is first on all 2 tasks, on 0 of them beyond the spread."


def test_one_seed_has_no_spread() -> None:
    found = verdict(rows_of({"kind-2": (4.0,), "full": (7.0,)}), sides=True)
    assert not found.clear
    assert "no spread to measure" in sentence(found)
    assert "±" not in sentence(found)


def test_the_headline_counts_tasks_and_budgets() -> None:
    won, lost = {"kind-1": (5.0, 5.1), "lora-6": (6.0, 6.1)}, {"kind-1": (7.0, 7.1), "lora-6": (6.0, 6.1)}
    tasks = {name: rows_of(d, name) for name, d in (("a", won), ("b", lost), ("c", won))}
    said = headline(tasks, sides=True)
    assert said.startswith("KIND is first on 2 of 3 tasks, each time beyond the spread")
    assert "where it is not, LoRA, rank 6 is" in said
    assert "first in 2 of 3 groups" in said
    one = headline({"b": tasks["b"]}, sides=True)
    assert one.endswith("Among methods that train about as many parameters KIND is not first.")
    assert "all 2 tasks" in headline({k: v for k, v in tasks.items() if k != "b"}, sides=True)


def test_variants_of_one_method_stand_against_each_other() -> None:
    rows = rows_of({"kind-1": (5.0, 5.2), "kind-2": (4.0, 4.4), "full": (7.0, 7.1)})
    found = verdict(rows, sides=False)
    assert (found.first.method, found.second.method) == ("kind-2", "kind-1")
    assert "the next one, KIND, rank 1 a class, has 5.10" in sentence(found)
    assert headline({"a": rows}, sides=False) == "KIND, rank 2 a class is first, beyond the spread."
    close = rows_of({"kind-1": (4.5, 4.1), "kind-2": (4.0, 4.4), "full": (7.0, 7.1)}, "b")
    assert headline({"b": close}, sides=False).endswith("is first; the difference is within the spread.")


def test_budgets_are_groups_in_which_kind_meets_a_rival() -> None:
    rows = best_rows(records_of("a"))
    assert {name: {r.method for r in own} for name, own in budgets(rows).items()} == {
        "70k": {"kind-1", "lora-6"}
    }
    assert budgets([row for row in rows if row.family != "kind"]) == {}


def test_convergence_names_the_step() -> None:
    def line(method: str, *distances: float) -> list[Row]:
        return [
            rows_of({method: (d,)}, f"t-{s}s", s)[0] for s, d in zip((50, 100, 200), distances, strict=True)
        ]

    rivals = [line("full", 20, 12, 9), line("oft", 30, 20, 15)]
    said = convergence([line("kind-1", 11, 8.5, 7), *rivals])
    assert "The best rival, full fine-tuning, has FD (Lite0) 9.00 after 200 steps" in said
    assert "8.50 after 100 steps, 0.50 of them" in said
    assert "does not reach that in 200 steps" in convergence([line("kind-1", 30, 20, 10), *rivals])
    assert convergence(rivals) == ""
