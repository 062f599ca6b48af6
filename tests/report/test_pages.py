"""The pages' structure, without a browser."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from kindiff.classes import ClassSet
from kindiff.cli.main import main
from kindiff.config import DataConfig
from kindiff.data import open_images
from kindiff.errors import BadFileError, UsageError
from kindiff.report.page import Cell, page, sortable
from kindiff.study.records import read_records
from kindiff.study.report import write_report
from kindiff.study.report_figures import paretos, task_table
from kindiff.study.report_pictures import nearest
from kindiff.study.report_run import metrics
from kindiff.study.tables import best_rows
from report.made_up import METHODS, record, records_of, write_records
from toys import NEW_SHAPES, SHAPES, SIZE, files_of, toy

VOID = {"meta", "img"}


class Reader(HTMLParser):
    """Checks that elements close in order; gathers text by element, and every src and href."""

    def __init__(self, content: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.addresses: list[str] = []
        self.images: list[str] = []
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.addresses += [str(given[name]) for name in ("src", "href", "data", "action") if name in given]
        if tag == "img":
            self.images.append(str(given["alt"]))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [str(value) for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data


def read(file: Path) -> Reader:
    return Reader(file.read_text())


def test_a_study_opens_with_who_won(study_page: Path) -> None:
    content = read(study_page)
    assert content.texts["h1"] == ["New shapes"]
    first, second, third = content.texts["p"][:3]
    assert first == "Which method learns <new> shapes best?"
    assert second.startswith("KIND is first on all 3 tasks, each time beyond the spread.")
    assert "7 methods were compared on 3 tasks" in third
    winners = study_page.read_text().split("</table>")[0]
    assert winners.count("KIND, rank 2 a class") == 3
    assert winners.count(">70k<") == 3


def test_a_study_has_its_tables_figures_and_pictures(study_page: Path) -> None:
    content = read(study_page)
    heads = content.texts["h2"]
    assert heads[:3] == ["Shapes, 50 steps", "Shapes, 100 steps", "Shapes, 200 steps"], (
        "ordered by their numbers"
    )
    assert "Convergence: shapes" in heads
    assert [h for h in heads if "pictures" in h] == ["Shapes, 200 steps: pictures"], "the longest of a family"
    assert heads[-1] == "Appendix: learning rates"
    figures = content.texts["figcaption"]
    assert sum("against trained parameters" in f for f in figures) == 3
    assert sum("against GMACs" in f for f in figures) == 3
    assert sum("against steps" in f for f in figures) == 1
    assert sum("Cosine between" in f for f in figures) == 2, "the best KIND model and its base"
    for label, *_ in METHODS.values():
        assert sum(t.startswith(label) for t in content.texts["title"]) >= 3 * (2 + 4)


def test_samples_stand_side_by_side_and_absent_models_are_named(study_page: Path) -> None:
    content = read(study_page)
    for row in ("real", "KIND, rank 2 a class", "full fine-tuning", "sample", "nearest training image"):
        assert {f"{row}: {shape}" for shape in NEW_SHAPES} <= set(content.images)
    (absent,) = [p for p in content.texts["p"] if "not on this machine" in p]
    for label in ("LoRA, rank 6", "OFT", "KIND, rank 1 a class", "FINE", "from scratch"):
        assert label in absent
    for row in ("real", "learngenes alone", "its own tailor", "most alike tailor", "least alike tailor"):
        assert f"{row}: ring / cross / cross" in content.images
    assert any("times as far from its nearest training image" in p for p in content.texts["p"])


def test_a_run_has_its_course_settings_samples_and_components(run_page: Path) -> None:
    content = read(run_page)
    assert content.texts["h1"] == ["Run kind"]
    assert "Pre-training: 12 of 12 steps of 8 images" in content.texts["p"][0]
    captions = content.texts["figcaption"]
    assert captions[:3] == ["loss", "gradient norm", "learning rate"]
    assert captions[3].startswith("Tailors' share")
    assert "kind.tailor_rank" in content.texts["td"]
    for shape in SHAPES:
        assert {f"{shape}: {c}" for c in ("real", "samples", "learngenes alone")} <= set(content.images)


def test_runs_of_transfers_and_rivals(work: Path, tmp_path: Path) -> None:
    for name, said, extra in (
        ("kind-2", "Transfer to new classes", {"learngenes alone"}),
        ("full", "A rival's training", set()),
    ):
        content = read(write_report(work / "made-up" / name, out=tmp_path / f"{name}.html"))
        assert content.texts["p"][0].startswith(f"{said}")
        assert "4 of 4 steps" in content.texts["p"][0]
        shown = {alt.split(": ")[1] for alt in content.images if alt.startswith("ring: ")}
        assert shown == {"real", "samples"} | extra
        assert any("share of each matrix" in caption for caption in content.texts["figcaption"]) == bool(
            extra
        )


def test_no_page_asks_for_anything(study_page: Path, run_page: Path) -> None:
    for file in (study_page, run_page):
        content = read(file)
        assert content.addresses
        assert all(a.startswith("data:image/png;base64,") for a in content.addresses)
        text = re.sub(r'src="data:[^"]*"', "", file.read_text())
        assert not re.search(
            r"(src|href|action)\s*=\s*.?https?://|@import|url\(|fetch\(|XMLHttp|WebSocket", text
        )
        assert "default-src 'none'" in text


def test_the_same_study_gives_the_same_page(
    study: Path, study_page: Path, work: Path, tmp_path: Path
) -> None:
    again = write_report(study, work=work, out=tmp_path / "deep" / "page.html")
    assert again.read_bytes() == study_page.read_bytes()


def test_without_models_the_words_and_figures_remain(study: Path, study_page: Path, tmp_path: Path) -> None:
    bare = write_report(study, work=tmp_path / "nothing", out=tmp_path / "page.html")
    content = read(bare)
    assert content.images == []
    assert "KIND, rank 2 a class" in next(p for p in content.texts["p"] if "not on this machine" in p)
    head = study_page.read_text().split("<h2>Shapes, 200 steps: pictures")[0]
    assert bare.read_text().startswith(head)


def test_an_unfinished_study_says_so(study: Path, work: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(work / "study", tmp_path / "study"))
    shutil.copytree(work / "bases", tmp_path / "bases")
    for file in folder.glob("results/shapes-200s--oft--*seed2.json"):
        file.unlink()
    for one in read_records(folder / "results", "shapes-50s--scratch--*"):
        write_records(
            folder, [replace(one, test=None, validation=None, failed="the loss (nan) is not finite")]
        )
    content = read(write_report(folder, work=tmp_path))
    assert any("not finished: 1 pieces of work are left" in p for p in content.texts["p"])
    assert "4 trainings that failed" in content.texts["summary"]
    table = next(t for t in content.texts["tbody"] if "from scratch" not in t and "OFT" in t)
    assert "KIND" in table


def test_markup_in_names_is_text(tmp_path: Path) -> None:
    shown = page("<b>", [sortable(["<i>", "x"], [["<u>&", Cell(text="<s>", order=1.0, key=2)]])])
    assert not re.search("<(b|i|u|s)>", shown)
    assert "&lt;u&gt;&amp;" in shown


def test_cells_without_a_number_stay_among_numbers() -> None:
    shown = sortable(
        ["name", "n"], [["a", Cell(text="", order=None)], ["b", Cell(text="1.5k", order=1500)]], marked=[1]
    )
    assert '<td data-order=""></td>' in shown
    assert '<tr class="mark"><td class="words">b</td><td data-order="1500">1.5k</td></tr>' in shown
    assert '<th scope="col" class="words">name</th><th scope="col">n</th>' in shown


def test_models_that_were_not_trained_have_no_rate_and_no_cost_of_training() -> None:
    records = [replace(r, trainable=0, parameters=1000 * i) for i, r in enumerate(records_of("a"), start=1)]
    rows = best_rows(records)
    assert task_table(rows).count(">not trained</td>") == len(METHODS)
    drawn = paretos(rows, records)
    costs = [re.search("against (.*?)<", figure).group(1) for figure in drawn]
    assert costs == ["GMACs of one forward pass", "parameters in total"]


def test_nearest_finds_copies_and_mirror_images(work: Path) -> None:
    images = open_images(DataConfig(source=str(work / "new-shapes"), size=SIZE)).images
    queries = np.stack(
        [images[3], images[7][:, ::-1], np.clip(images[5].astype(int) + 20, 0, 255).astype(np.uint8)]
    )
    found = nearest(queries, images)
    assert found.index.tolist() == [3, 7, 5]
    assert found.mirrored.tolist() == [False, True, False]
    assert found.distance[:2].tolist() == [0, 0]
    assert 0.02 < found.distance[2] <= 20 / 255


def test_metrics_cut_short_by_a_kill_are_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    assert metrics(tmp_path / "none.jsonl") == []


# The command


def test_the_command_writes_and_names_the_page(work: Path, tmp_path: Path, capfd) -> None:
    run = Path(shutil.copytree(work / "bases" / "dense", tmp_path / "run"))
    shutil.rmtree(run / "model")
    before = files_of(run)
    assert main(["report", str(run)]) == 0
    assert capfd.readouterr().out == f"{(run / 'report.html').resolve()}\n"
    assert files_of(run).keys() - before.keys() == {"report.html"}
    content = read(run / "report.html")
    assert any("not finished" in p for p in content.texts["p"])
    assert content.images == []


def test_what_is_no_run_and_no_study_is_refused(tmp_path: Path, study: Path, capfd) -> None:
    assert main(["report", str(tmp_path)]) == 1
    assert "neither a run nor a study" in capfd.readouterr().err
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(BadFileError, match=r"run\.json does not describe"):
        write_report(tmp_path)
    empty = Path(shutil.copytree(study.parent / "bases", tmp_path / "bases")).parent / "study"
    shutil.copytree(study, empty, ignore=shutil.ignore_patterns("results", "*.html"))
    assert main(["report", str(empty)]) == 2
    assert "no scored cell yet" in capfd.readouterr().err
    write_records(empty, [record("shapes-50s", "oft", scored=False)])
    with pytest.raises(UsageError, match="no scored cell"):
        write_report(empty)


def test_missing_images_are_said(work: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(work / "bases" / "kind", tmp_path / "run"))
    described = (run / "run.json").read_text()
    source = toy(work / "shapes").data.source
    assert source in described
    (run / "run.json").write_text(described.replace(source, str(tmp_path / "gone")))
    content = read(write_report(run))
    assert any("real images are not here" in p for p in content.texts["p"])
    assert {f"{s}: samples" for s in ClassSet(SHAPES).names} <= set(content.images)
    assert not any(alt.endswith(": real") for alt in content.images)
