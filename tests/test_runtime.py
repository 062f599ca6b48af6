"""What `precision auto` means on a device, and that what is written down of a run says it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest
import torch

from kindiff.errors import UsageError
from kindiff.runtime import autocast, precision_on
from kindiff.train import pretrain
from toys import toy, write_shapes

CPU = torch.device("cpu")


@pytest.fixture
def processor(monkeypatch):
    """Makes torch see a processor with these features alone."""

    def become(*features: str) -> None:
        has = dict.fromkeys(features, True)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)

    return become


@pytest.mark.parametrize(
    ("feature", "expected"),
    [("avx2", "fp32"), ("avx512_f", "fp32"), ("avx512_bf16", "bf16"), ("amx_bf16", "bf16")],
)
def test_auto_is_bf16_where_the_processor_multiplies_it(processor, feature, expected):
    processor(feature)
    assert precision_on(CPU, "auto") == expected
    assert [precision_on(CPU, name) for name in ("bf16", "fp32")] == ["bf16", "fp32"]
    x = torch.ones(2, 2)
    with autocast(CPU, "auto"):
        assert (x @ x).dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[expected]


def test_a_run_says_what_auto_was_and_does_not_go_on_in_the_other(processor, tmp_path):
    shapes, out = write_shapes(tmp_path / "shapes"), tmp_path / "run"
    processor("amx_bf16")
    pretrain(toy(shapes, steps=1), out)
    assert json.loads((out / "run.json").read_text())["description"]["config"]["train"]["precision"] == "bf16"
    processor("avx2")
    with pytest.raises(UsageError, match=r"train\.precision was 'bf16', now 'fp32'"):
        pretrain(toy(shapes, steps=1), out)
    pretrain(toy(shapes, steps=1, precision="bf16"), out)  # the settings that it was begun with


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize("asked", ["", "MALLOC_TRIM_THRESHOLD_"])
def test_freed_memory_stays_with_the_process_unless_the_environment_says_otherwise(asked):
    code = """
import torch
from kindiff.allocator import keep_memory
kept = keep_memory()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
before = resident()
x = torch.ones(2**26)
del x
print(kept, resident() - before > 200)
"""
    environment = os.environ | ({asked: "131072"} if asked else {})
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert found.stdout.split() == (["False", "False"] if asked else ["True", "True"]), found.stderr
