"""Class hierarchies, the merging rule, the dealing of groups, and sets whose classes are groups."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kindiff.cli.main import main
from kindiff.config import DataConfig
from kindiff.data import open_images, open_samples
from kindiff.data.avatars import BASE, NOVEL
from kindiff.data.groups import (
    Grouping,
    avatar_grouping,
    deal,
    imagenet_grouping,
    merge,
    read_grouping,
    superclass_of,
)
from kindiff.data.hierarchy import Hierarchy, imagenet, read_hierarchy
from kindiff.errors import BadFileError, UsageError

ZOO = """\
thing\t\tthing\t
animal\t\tanimal\tthing
dog\t\tdog\tanimal
hound\t\thound\tdog
beagle\t0\tbeagle\thound
basset\t1\tbasset\thound
pug\t2\tpug\tdog
cat\t3\tcat\tanimal,pet
pet\t\tpet\tthing
car\t4\tcar\tthing
"""


@pytest.fixture
def zoo(tmp_path: Path) -> Hierarchy:
    (tmp_path / "zoo.tsv").write_text(ZOO)
    return read_hierarchy(tmp_path / "zoo.tsv")


def test_classes_are_merged_from_the_most_alike_up(zoo: Hierarchy) -> None:
    members = lambda count: [g.classes for g in merge(zoo, count)]  # noqa: E731
    assert members(5) == [("beagle",), ("basset",), ("pug",), ("cat",), ("car",)]
    assert members(4) == [("beagle", "basset"), ("pug",), ("cat",), ("car",)]
    assert members(3) == [("beagle", "basset", "pug"), ("cat",), ("car",)]
    assert members(2) == [("beagle", "basset", "pug", "cat"), ("car",)]
    assert [g.name for g in merge(zoo, 3)] == ["dog", "cat", "car"]
    hound = merge(zoo, 4)[0]
    assert hound.similarity == pytest.approx(
        2 * 4 / (5 + 5)
    )  # Wu & Palmer: hound is at depth 4, its dogs at 5
    assert [g.classes for g in merge(zoo, 2, ("pug", "cat", "car"))] == [("pug", "cat"), ("car",)]


def test_counts_that_cannot_be_met(zoo: Hierarchy) -> None:
    for count in (0, 6):
        with pytest.raises(UsageError, match="use 1 to 5"):
            merge(zoo, count)
    with pytest.raises(UsageError, match=r"'pugg' is no node .*did you mean 'pug'"):
        merge(zoo, 1, ("pugg", "cat"))
    flat = "root\t\troot\t\n" + "".join(f"c{i}\t{i}\tc\troot\n" for i in range(4))
    path = Path(zoo.where).with_name("flat.tsv")
    path.write_text(flat)
    with pytest.raises(UsageError, match="into 4 groups, not into 2"):
        merge(read_hierarchy(path), 2)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (ZOO.replace("thing\t\tthing\t\n", "thing\t\tthing\tdog\n"), "cycle: .*(thing|animal|dog) -> "),
        (ZOO + "yeti\t\tyeti\tyeti\n", "cycle: yeti -> yeti"),
        (ZOO.replace("pet\t\tpet\tthing\n", ""), "'cat' names the unknown hypernym 'pet'"),
        (ZOO + "dog\t\tdog\tanimal\n", "node 'dog' stands twice"),
        (ZOO + "yak\t4\tyak\tanimal\n", "class index 4 stands twice, at 'car' and at 'yak'"),
        (ZOO + "yak\t-1\tyak\tanimal\n", "class index '-1' is no number"),
        (ZOO + "yak\tyak\n", "line 11: a line is node"),
        (ZOO + "y" * 300 + "\t\tyak\tanimal\n", "line 11: a line is node"),
        ("thing\t\tthing\t\n", "has no class"),
        ("", "has 0 nodes"),
        ("\n".join(f"n{i}\t{i}\tn\t" for i in range(50_001)), "50000|has 50001 nodes"),
    ],
)
def test_faults_of_a_hierarchy_are_named(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "bad.tsv").write_text(content)
    with pytest.raises(BadFileError, match=sentence):
        read_hierarchy(tmp_path / "bad.tsv")


def test_a_file_that_is_no_hierarchy(tmp_path: Path) -> None:
    (tmp_path / "bytes.tsv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadFileError, match="not text in UTF-8"):
        read_hierarchy(tmp_path / "bytes.tsv")
    with pytest.raises(FileNotFoundError, match=r"none\.tsv does not exist"):
        read_hierarchy(tmp_path / "none.tsv")


def test_imagenet_is_1000_classes_in_611_groups_150_of_them_base() -> None:
    assert len(imagenet().classes) == 1000
    assert imagenet().nodes[imagenet().classes[0]].lemma == "tench"
    grouping = imagenet_grouping()
    assert len(grouping.groups) == 611
    assert sorted(c for g in grouping.groups for c in g.classes) == sorted(imagenet().classes)
    base, novel = set(grouping.splits["base"]), set(grouping.splits["novel"])
    assert (len(base), len(novel), base & novel) == (150, 461, set())
    tasks = [set(grouping.splits[f"novel-{size}"]) for size in (5, 10, 20, 50, 100)]
    assert [len(task) for task in tasks] == [5, 10, 20, 50, 100]
    assert len(set.union(*tasks)) == 185
    assert set.union(*tasks) < novel
    assert "hound" in grouping.split("all")


def test_the_committed_list_is_what_the_rule_gives() -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "imagenet_groups.json"
    assert json.loads(recipe.read_text()) == imagenet_grouping().to_json()
    assert read_grouping(recipe) == Grouping.from_json(imagenet_grouping().to_json(), "")


def test_dealing_is_seeded_and_disjoint(zoo: Hierarchy) -> None:
    groups = merge(zoo, 5)
    lists = {seed: deal(groups, base=2, tasks=(1, 2), seed=seed).splits for seed in range(8)}
    assert lists[0] == deal(groups, base=2, tasks=(1, 2), seed=0).splits
    assert len({splits["base"] for splits in lists.values()}) > 1
    for splits in lists.values():
        assert sorted(splits["base"] + splits["novel"]) == sorted(g.name for g in groups)
        assert set(splits["novel-1"]) | set(splits["novel-2"]) == set(splits["novel"])
    for base, tasks in ((6, ()), (3, (3,)), (-1, ()), (0, (0,))):
        with pytest.raises(UsageError, match="do not fit 5 groups"):
            deal(groups, base=base, tasks=tasks)
    with pytest.raises(UsageError, match="name it once"):
        deal(groups, base=0, tasks=(1, 1))


def test_avatars_have_superclasses() -> None:
    of_class = superclass_of(BASE + NOVEL, avatar_grouping())
    assert of_class["rings"] == "abstract"
    assert set(of_class) == set(BASE + NOVEL)
    with pytest.raises(UsageError, match="no group holds the class ant"):
        superclass_of(("rings", "ant"), avatar_grouping())


@pytest.mark.parametrize(
    "content",
    ["{}", '{"kind": "groups", "format": 2}', '{"kind": "groups", "format": 1, "groups": [3], "splits": {}}'],
)
def test_files_that_hold_no_groups(tmp_path: Path, content: str) -> None:
    (tmp_path / "groups.json").write_text(content)
    with pytest.raises(BadFileError, match="no file of groups"):
        read_grouping(tmp_path / "groups.json")
    with pytest.raises(FileNotFoundError, match="use imagenet, avatars or a JSON file"):
        read_grouping(tmp_path / "none.json")


def image_folder(folder: Path, per_class: int) -> Path:
    for number, name in enumerate(("beagle", "basset", "pug", "cat", "car")):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = np.full((8, 8, 3), 40 * number + i, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def test_a_folder_with_its_classes_merged(tmp_path: Path, zoo: Hierarchy, monkeypatch) -> None:
    monkeypatch.setenv("KINDIFF_CACHE", str(tmp_path / "cache"))
    folder = image_folder(tmp_path / "zoo", 3)
    out = tmp_path / "groups.json"
    assert main(["classes", zoo.where, "--groups", "3", "--base", "2", "--out", str(out)]) == 0
    whole = open_samples(DataConfig(source=str(folder), size=8, groups=str(out)))
    assert whole.classes.names == ("dog", "cat", "car")
    assert np.bincount(whole.labels).tolist() == [9, 3, 3]
    few = open_images(DataConfig(source=str(folder), size=8, groups=str(out), classes=("dog",), per_class=4))
    assert few.images[:, 0, 0, 0].tolist() == [0, 40, 80, 1]  # by turns of beagle, basset and pug
    assert few.sha256 != whole.sha256
    assert len(few.class_sha256) == 1
    base = open_samples(DataConfig(source=str(folder), size=8, groups=str(out), split="base"))
    assert base.classes.names == read_grouping(out).splits["base"]
    for config, sentence in (
        ({"split": "bass"}, "did you mean 'base'"),
        ({"classes": ("dogs",)}, "did you mean 'dog'"),
    ):
        with pytest.raises(UsageError, match=sentence):
            open_samples(DataConfig(source=str(folder), size=8, groups=str(out), **config))
    (folder / "pug").rename(folder / "pugs")
    with pytest.raises(UsageError, match="'pug' is unknown"):
        open_samples(DataConfig(source=str(folder), size=8, groups=str(out)))
    with pytest.raises(UsageError, match="say which with groups"):
        DataConfig(split="base")


def test_the_command_draws_trees_and_lists_groups(zoo: Hierarchy, capsys) -> None:
    assert main(["classes", zoo.where, "--tree", "root"]) == 0
    drawn = capsys.readouterr().out
    assert drawn.startswith(
        "thing (thing): 5 classes\n├─ animal (animal): 4 classes\n│  ├─ dog (dog): 3 classes\n"
    )
    assert "└─ car [4] (car)" in drawn
    assert main(["classes", zoo.where, "--tree", "animal", "--depth", "1"]) == 0
    assert capsys.readouterr().out == "animal (animal): 4 classes ...\n"
    assert main(["classes", zoo.where, "--groups", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["groups"][0]["classes"] == ["beagle", "basset", "pug"]
    assert main(["classes", zoo.where, "--groups", "3", "--base", "1", "--tasks", "2"]) == 0
    printed = capsys.readouterr().out
    assert "dog (3 classes, alike 0.60): beagle, basset, pug" in printed
    assert "5 classes in 3 groups: 1 of several classes, 2 of one" in printed
    assert main(["classes", "avatars"]) == 0
    assert "voxel (2 classes): voxel-art, voxel-bot" in capsys.readouterr().out
    assert main(["classes", "avatars", "--tree", "yak"]) == 2
    assert main(["classes", "none.tsv"]) == 1
