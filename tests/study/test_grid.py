"""Which cells are left, which rate is chosen, what the tables say of made-up results."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
from small import figures, record, write_study

from kindiff.errors import BadFileError, UsageError
from kindiff.study.config import Cell, read_study
from kindiff.study.grid import left, progress, spent
from kindiff.study.records import read_records, write_record
from kindiff.study.repeating import compared, repetition
from kindiff.study.runner import run_workers
from kindiff.study.tables import best_rows, markdown, sweep, sweep_markdown

RATES = (0.001, 0.003, 0.01, 0.03)


@pytest.fixture
def study(tmp_path):
    return read_study(write_study(tmp_path))


def test_rates_are_tried_first_then_the_best_is_scored_with_every_seed(study):
    works = left(study, [])
    assert [w.test for w in works] == [False] * 8
    assert {w.cell.lr for w in works} == set(RATES)
    swept = [record("kind", lr, validation=v) for lr, v in zip(RATES, (4.0, 2.0, 3.0, 9.0), strict=True)]
    works = left(study, swept)
    assert [w.cell.method for w in works] == ["lora"] * 4 + ["kind"] * 2  # a comparison before more seeds
    assert [(w.cell.lr, w.cell.seed, w.test) for w in works[-2:]] == [(0.003, 0, True), (0.003, 1, True)]
    assert progress(study, swept) == (4, 12)
    scored = [replace(r, test=figures(3.0)) if r.lr == 0.003 else r for r in swept]
    scored.append(record("kind", 0.003, seed=1, test=2.0))
    assert [w.cell.method for w in left(study, scored)] == ["lora"] * 4
    assert progress(study, scored) == (6, 12)
    assert progress(study, scored, ["lora"]) == (0, 6)
    timed = [replace(r, train_seconds=360.0) for r in scored]
    timed[0] = replace(timed[0], train_seconds=3600.0)  # beside other work: a repetition need not be
    assert spent(study, timed).endswith("; the rest takes about 0.5")  # as much again
    assert spent(study, timed).startswith("6 of 12 trainings and scores are done, 0.5 hours of training")
    assert spent(study, timed, ["lora"]) == (
        "0 of 6 trainings and scores are done, 0.0 hours of training in one process "
        "(0.0 of what the tables show, which `repeat` does)"
    )
    assert "(0.2 of what the tables show" in spent(study, timed)  # two of five


def test_a_repetition_has_the_chosen_rates_alone_and_is_compared_with_what_the_table_shows(study, tmp_path):
    def of(method, *distances, lr=0.003):
        return [record(method, lr, seed=seed, test=d) for seed, d in enumerate(distances)]

    before = [*of("kind", 3.0, 5.0), record("kind", 0.01, validation=9.0), *of("lora", 6.0, 6.2, lr=0.01)]
    again = repetition(study, before, tmp_path)
    assert [(w.cell.method, w.cell.lr, w.cell.seed) for w in left(again, [])] == [
        ("kind", 0.003, 0), ("lora", 0.01, 0),
    ]  # fmt: skip
    assert again.results != study.results
    after = [*of("kind", 5.0, 5.0), *of("lora", 7.0, lr=0.01)]
    assert [(w.cell.method, w.cell.seed) for w in left(again, after)] == [("lora", 1)]
    assert not left(again, [*after, *of("lora", 7.0, 7.0, lr=0.01)])
    assert compared(before, after).splitlines()[2:] == [
        "| new | KIND | 4.0 ± 1.4 | 5.0 ± 0.0 | 0.500 ± 0.000 | 0.500 ± 0.000 | yes |",
        "| new | LORA | 6.1 ± 0.1 | 7.0 (1 seed) | 0.500 ± 0.000 | 0.500 (1 seed) | no, 0.9 apart |",
        "",
        "1 of 2 distances came again within their spreads.",
    ]
    earlier = [replace(r, validation=None) for r in of("kind", 9.0, lr=0.01)]  # chosen then
    assert compared(before, [*earlier, *after]) == compared(before, after)
    once = of("kind", 3.0)
    assert "1 of 1 distances came again" in compared(once, once)
    with pytest.raises(FileNotFoundError, match="has no scored cell to repeat"):
        repetition(study, [record("kind", 0.01, validation=9.0)], tmp_path)


def test_a_method_whose_best_rate_is_the_last_it_tried_tries_the_next(study):
    config = replace(study.config, lrs_beyond=(0.0003, 0.1, 0.3))
    study = replace(study, config=config)

    def next_rates(*distances, rates=RATES):
        swept = [record("kind", lr, validation=v) for lr, v in zip(rates, distances, strict=True)]
        return [(w.cell.lr, w.test) for w in left(study, swept) if w.cell.method == "kind"]

    assert next_rates(4.0, 2.0, 3.0, 9.0) == [(0.003, True), (0.003, True)]
    assert next_rates(4.0, 3.0, 2.0, 1.0) == [(0.1, False)]
    assert next_rates(1.0, 3.0, 2.0, 4.0) == [(0.0003, False)]
    assert next_rates(4.0, 3.0, 2.0, 1.0, 0.5, rates=(*RATES, 0.1)) == [(0.3, False)]
    assert next_rates(4.0, 3.0, 2.0, 1.0, 5.0, rates=(*RATES, 0.1)) == [(0.03, True), (0.03, True)]
    further = [
        record("kind", lr, validation=v) for lr, v in zip((*RATES, 0.1), (4, 3, 2, 1, 0.5), strict=True)
    ]
    further.append(record("kind", 0.03, seed=1, test=3.0))  # scored before the next rate was tried
    assert progress(study, further, ["kind"]) == (5, 8)


def test_a_rate_that_fails_is_passed_over_and_a_method_that_always_fails_ends(study):
    failed = [replace(record("kind", lr), validation=None, failed="not finite") for lr in RATES]
    assert [w.cell.method for w in left(study, failed)] == ["lora"] * 4
    one_works = [record("kind", RATES[0]), *failed[1:]]
    assert Cell(task="new", method="kind", lr=RATES[0], seed=0) in [
        w.cell for w in left(study, one_works) if w.test
    ]
    assert "failed" in sweep_markdown(one_works)


def test_a_worker_that_fails_is_told_of(study, tmp_path, capfd):
    command = [sys.executable, "-c", "import sys; print('why'); sys.exit(3)"]
    assert run_workers(study, tmp_path, workers=2, command=command) == 2
    said = capfd.readouterr().err
    for i in range(2):
        log = tmp_path / "small" / f"worker-{i}.log"
        assert f"a worker failed, {log} says why" in said
        assert log.read_text() == "why\n"


def test_a_row_is_the_mean_at_the_best_validation_rate_not_the_best_test():
    records = [
        record("kind", 0.001, validation=4.0, test=0.5),  # scored before, best on the test images: not chosen
        record("kind", 0.003, validation=2.0, test=3.0),
        record("kind", 0.003, seed=1, validation=8.0, test=5.0),
        record("kind", 0.01, validation=3.0),
        record("lora", 0.001, validation=1.0, test=2.0),
        record("lora", 0.003, validation=3.0),
    ]
    lora, kind = best_rows(records)
    assert (lora.method, kind.method) == ("lora", "kind")
    assert (kind.lr, kind.seeds, kind.distance_mean, kind.bracketed) == (0.003, 2, 4.0, True)
    assert kind.distance_spread == pytest.approx(2**0.5)
    assert not lora.bracketed
    assert sweep(records)["new", "kind"] == {0.001: 4.0, 0.003: 2.0, 0.01: 3.0}
    text = markdown(records)
    assert text.index("LORA") < text.index("KIND")
    assert "4.0 ± 1.4" in text
    assert "(edge)" in text


def test_a_table_says_when_each_method_is_where_the_best_rival_ends():
    def course(method, *distances, seconds):
        return [
            replace(
                record(method, 0.003, task=f"new-{steps}s", test=distance),
                steps=steps, train_seconds=steps * seconds,
            )
            for steps, distance in zip((10, 20, 40), distances, strict=True)
        ]  # fmt: skip

    records = [*course("kind", 9.0, 4.0, 3.0, seconds=0.2), *course("lora", 11.0, 6.0, 5.0, seconds=0.1)]
    slow = replace(records[1], seed=1, train_seconds=60.0)  # beside other work: the other one's time counts
    table = markdown([*records, slow]).partition("**new**")[2]
    assert "the best rival, LORA, ends at 5.0" in table
    assert table.splitlines()[-2:] == [
        "| KIND | 9.0 | 4.0 | 3.0 | 20 steps | 4 s |",
        "| LORA | 11.0 | 6.0 | 5.0 | 40 steps | 4 s |",
    ]
    assert "**new**" not in markdown([r for r in records if r.method == "kind"])


def test_records_come_back_as_they_were_and_a_damaged_one_is_named(tmp_path):
    one = record("kind", 0.003, test=2.0)
    write_record(tmp_path, one)
    assert read_records(tmp_path) == [one]
    path = tmp_path / f"{one.cell.name}.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 7'))
    with pytest.raises(BadFileError, match=r"lr0\.003.*format 1"):
        read_records(tmp_path)


def test_a_study_that_cannot_be_is_refused_in_one_sentence(study):
    def broken(path, old, new):
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises((UsageError, FileNotFoundError)) as caught:
            read_study(study.folder)
        path.write_text(text)
        return str(caught.value)

    methods, tasks = study.folder / "methods", study.folder / "tasks"
    assert "did you mean 'kind'" in broken(methods / "kind.toml", 'base = "kind"', 'base = "kinds"')
    assert "one of the tables" in broken(methods / "kind.toml", "[transfer]\nrank = 1\n", "")
    assert "come from the task" in broken(methods / "kind.toml", "rank = 1", 'rank = 1\ndata.source = "x"')
    assert "overlap" in broken(tasks / "new.toml", "first = 12", "first = 11")
    assert "4 learning rates" in broken(study.folder / "study.toml", "0.001, ", "")
    assert "each once" in broken(study.folder / "study.toml", "[0, 1]", "[0, 0]")
    read_study(study.folder)
