"""Make a transformer that is not ours decomposable: a plain ViT, written below, that knows nothing of classes.

    python examples/any_transformer.py

Seconds on two cores. It cleans noisy stripes; which way the stripes run is the class, and only the gate tells it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kindiff import KindConfig
from kindiff.classes import ClassSet
from kindiff.components import decompose_modules, factorize_modules, merge_modules
from kindiff.train.optimiser import RowAdam

NAMES = ("rows", "columns", "diagonal")
WIDTH, HEADS, SIDE, PATCH = 48, 4, 16, 4


class Block(nn.Module):
    """A ViT block with the layer names of timm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """Pictures (B, 1, 16, 16) to pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH**2, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn((SIDE // PATCH) ** 2, WIDTH))
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, PATCH**2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(F.pixel_unshuffle(x, PATCH).flatten(2).transpose(1, 2)) + self.positions
        patches = self.head(self.blocks(tokens)).transpose(1, 2)
        return F.pixel_shuffle(patches.unflatten(2, (SIDE // PATCH, -1)), PATCH)


def pictures(ids: Tensor) -> Tensor:
    """Stripes of a random place: (B, 1, 16, 16) in [-1, 1]."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    place = torch.stack([y, x, y + x])[ids] + torch.randint(0, 8, (len(ids), 1, 1))
    return torch.where(place % 8 < 4, 1.0, -1.0).unsqueeze(1)


def main(steps: int = 300) -> dict[str, float]:
    torch.manual_seed(0)
    vit = ViT()
    model = factorize_modules(
        vit,
        targets=["blocks.*.qkv", "blocks.*.proj", "blocks.*.fc?"],
        kind=KindConfig(learngene_rank=24, tailor_rank=4),
        classes=ClassSet(NAMES),
    )
    tailors = model.tailors()
    own = {id(p) for p in tailors}
    shared = torch.optim.AdamW([p for p in model.parameters() if id(p) not in own], lr=2e-3)
    rows = RowAdam(tailors)  # a class that is absent from a batch keeps still
    for step in range(steps):
        ids = torch.randint(0, len(NAMES), (32,))
        clean = pictures(ids)
        gate_ids = torch.where(
            torch.rand(32) < 0.2, len(NAMES), ids
        )  # gate dropout: the learngenes learn the task
        loss = (model(gate_ids, clean + 2 * torch.randn_like(clean)) - clean).square().mean()
        model.zero_grad()
        loss.backward()
        shared.step()
        rows.step(model.slots_on(gate_ids), lr=2e-3)
        if step % 100 == 99:
            print(f"step {step + 1}: loss {loss.item():.3f}")

    # one class as a plain ViT again, and a smaller model of two
    ids = torch.arange(300) % len(NAMES)
    clean = pictures(ids)
    noisy = clean + 2 * torch.randn_like(clean)
    columns = merge_modules(model, "columns")
    small = decompose_modules(model).recombine(["columns", "diagonal"], learngene_rank=16)
    of_column = ids == 1
    with torch.no_grad():
        errors = {
            "its own tailors": (model(ids, noisy) - clean).square().mean(),
            "the learngenes alone": (model(torch.full_like(ids, len(NAMES)), noisy) - clean).square().mean(),
            "another class's tailors": (model((ids + 1) % 3, noisy) - clean).square().mean(),
            "columns, merged": (columns(noisy[of_column]) - clean[of_column]).square().mean(),
            "columns, rank 16": (small(torch.zeros(100, dtype=int), noisy[of_column]) - clean[of_column])
            .square()
            .mean(),
        }
    for name, error in errors.items():
        print(f"squared error with {name}: {error.item():.3f}")
    return {name: error.item() for name, error in errors.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)  # matrices this small gain nothing from more
    main()
