"""The writer of safetensors files against the library's own."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save

from kindiff import checkpoint


def test_the_same_bytes_as_the_library(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 4),
        "a.é": torch.randn(2, 3).T,
        "long": torch.arange(5),
        "half": torch.randn(7).bfloat16(),
        "float16": torch.randn(7).half(),
        "int": torch.arange(3, dtype=torch.int32),
        "short": torch.arange(3, dtype=torch.int16),
        "byte": torch.arange(3, dtype=torch.uint8),
        "signed": torch.arange(3, dtype=torch.int8),
        "flag": torch.tensor(True),
        "empty": torch.zeros(0, 3),
        "double": torch.randn(2, dtype=torch.float64, requires_grad=True),
    }
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    for metadata in (None, {"class": "owl"}):
        checkpoint.write_tensors(tmp_path / "t.safetensors", tensors, metadata)
        assert (tmp_path / "t.safetensors").read_bytes() == save(whole, metadata)
    read = load_file(tmp_path / "t.safetensors")
    assert all(torch.equal(tensor, read[name]) for name, tensor in whole.items())
    checkpoint.write_tensors(tmp_path / "none.safetensors", {})
    assert checkpoint.read_tensors(tmp_path / "none.safetensors") == {}
