"""The parts of a model, learngenes and tailors, and putting models together from them.

Everything here is functional: parts in, a new model out, bit-equal each time.

C classes, D width, N components of a tailor, R learngene components.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kindiff.checkpoint import hash_tensors
from kindiff.classes import ClassSet
from kindiff.components import algebra
from kindiff.components.algebra import Factors
from kindiff.components.assembly import factors_of, fill_slot_, freeze_learngenes, merge_, named_factors
from kindiff.components.build import Structure, empty, sizes_of, slots_by_share
from kindiff.components.gates import TableGate
from kindiff.components.linear import ComponentLinear
from kindiff.components.strategy import factored_is_cheaper
from kindiff.config import MATRICES, DiTConfig, Share
from kindiff.errors import UsageError
from kindiff.models.dit import DiT

Layers = Literal["auto", "factored", "dense", "merged"]
"""How recombined matrices are held. factored: as components. dense: learngenes as one weight, tailors as
components. auto: the cheaper of the two. merged: one class, everything in one weight, no gate."""

EMBEDDING = "class_embed"
NULL_EMBEDDING = "null_embed"
GATE = "gate."
TASK = ""
"""The tailor that all classes of a task share, among tailors by class; no class has this name."""


@dataclass(frozen=True)
class Components:
    """The parts of a decomposable model: learngenes and one tailor for each class.

    learngenes: tensors by name, everything that is not a class's (factors, dense layers, the null embedding).
    tailors: for each class its tensors: for each matrix u (N, O), sigma (N,), v (N, I), and the embedding (D,).
    """

    config: DiTConfig
    targets: tuple[str, ...]
    learngenes: dict[str, Tensor]
    tailors: dict[str, dict[str, Tensor]]

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.tailors)

    @property
    def learngene_rank(self) -> int:
        """N_G, the learngene components of every matrix."""
        return len(self.learngenes["blocks.0.q.sigma"])

    @property
    def tailor_rank(self) -> int:
        """N_T, the components of the largest tailor (0 without classes or targets)."""
        return largest_rank(self.tailors.values())

    @property
    def learngene_hash(self) -> str:
        """SHA-256 of the learngenes: a tailor only fits the learngenes that it was trained with."""
        return hash_tensors(self.learngenes)

    def recombine(
        self,
        classes: Iterable[str] | None = None,
        *,
        learngene_rank: int | None = None,
        tailor_rank: int | None = None,
        layers: Layers = "auto",
        take_over: bool = False,
    ) -> DiT:
        """A new model of the wanted classes (None: all), smaller by the tailors left out.

        learngene_rank: keep that many components of the learngenes' canonical form; None: the learngenes as
        they are, and the model equals the one taken apart to the bit where its layers stay factored. tailor_rank: the
        same of every tailor, or all that it has; each matrix of it is then the best of that rank. take_over: the model
        uses the parts' own memory where it can, instead of a copy; the parts must then be given up. UsageError for an
        unknown class, a class asked twice, a rank that the parts do not hold, or layers="merged" with more than one
        class.
        """
        known = ClassSet(self.classes)
        wanted = ClassSet(tuple(self.classes if classes is None else classes))
        known.ids(wanted.names)
        if learngene_rank is not None and not 1 <= learngene_rank <= self.learngene_rank:
            raise UsageError(
                f"learngene rank {learngene_rank} is not in the parts; they hold {self.learngene_rank} components, "
                f"so use 1 to {self.learngene_rank}."
            )
        if tailor_rank is not None and tailor_rank < 1:
            raise UsageError(f"tailor rank {tailor_rank} is not possible; use 1 or more.")
        if layers == "merged" and len(wanted) > 1:
            raise UsageError(
                f"merged layers hold one class and {len(wanted)} are asked for; recombine each class by itself or "
                "use factored or dense layers."
            )
        rank = learngene_rank or self.learngene_rank
        if layers == "auto":
            layers = "factored" if factored_is_cheaper(self.config, rank) else "dense"
        parts = self if tailor_rank is None else self._cut(wanted, tailor_rank)
        model = parts._assemble(wanted, learngene_rank, dense=layers != "factored", copy=not take_over)
        return merge_(model) if layers == "merged" else model

    def with_new_tailors(
        self,
        classes: Iterable[str],
        *,
        rank: int,
        share: Share = "class",
        targets: tuple[str, ...] = MATRICES,
        nearest: Mapping[str, str] | None = None,
        train_also: tuple[Literal["bias", "final"], ...] = (),
        seed: int = 0,
    ) -> DiT:
        """A model of new classes on these learngenes, frozen; only fresh tailors and class embeddings train.

        rank: N_T of the new tailors. share: a tailor for each class, one for the whole task, or both at once.
        nearest: for a new class the existing class whose tailor and embedding it starts from (the largest `rank`
        components); the others start at zero with the null embedding. train_also: learngene parts that train too. The
        parameters that train are those with requires_grad. UsageError for a class asked twice or a rank that is too
        large.
        """
        wanted = ClassSet(tuple(classes))
        known = ClassSet(self.classes) if self.classes else None
        nearest = dict(nearest or {})
        full = min(min(self.config.matrix_shape(matrix)) for matrix in MATRICES)
        if not 1 <= rank <= full:
            raise UsageError(f"tailor rank {rank} is not possible; the matrices allow 1 to {full}.")
        if known is None and nearest:
            raise UsageError("no tailor to start from: these parts hold learngenes only; use a fresh start.")
        if share == "task" and nearest:
            raise UsageError("one tailor for the whole task cannot start from several classes' tailors.")
        generator = torch.Generator().manual_seed(seed)
        shapes = {m: self.config.matrix_shape(m) for m in targets}
        names = [f"blocks.{i}.{m}" for i in range(self.config.depth) for m in targets]
        tailors: dict[str, dict[str, Tensor]] = {}
        for name in (*wanted.names, *([TASK] if share == "both" else [])):
            parent = self.tailors[known.names[known.id(nearest[name])]] if known and name in nearest else None
            tensors = {EMBEDDING: self.learngenes[NULL_EMBEDDING] if parent is None else parent[EMBEDDING]}
            for matrix in names:
                blank = algebra.fresh(rank, *shapes[matrix.rsplit(".", 1)[1]], generator=generator)
                if parent is not None and f"{matrix}.sigma" in parent:
                    old = factors_of(parent, matrix)
                    old = algebra.canonical(old).first(rank) if rank < len(old.sigma) else old
                    blank = Factors(*(torch.cat([a, b[len(a) :]]) for a, b in zip(old, blank, strict=True)))
                tensors |= named_factors(matrix, blank)
            tailors[name] = tensors
        parts = dataclasses.replace(
            self,
            config=dataclasses.replace(self.config, num_classes=len(wanted)),
            targets=targets,
            tailors=tailors,
        )
        model = parts._assemble(wanted, None, dense=False, share=share)
        return freeze_learngenes(model, train_also)

    def extended(self, other: Components) -> Components:
        """These parts and the tailors of others that stand on the same learngenes.

        UsageError when the learngenes differ, or a class stands in both.
        """
        if self.learngene_hash != other.learngene_hash:
            raise UsageError("the two parts have different learngenes; a tailor only fits its own.")
        merged = ClassSet(self.classes + other.classes)
        return dataclasses.replace(
            self,
            config=dataclasses.replace(self.config, num_classes=len(merged)),
            targets=tuple(m for m in MATRICES if m in {*self.targets, *other.targets}),
            tailors={**self.tailors, **other.tailors},
        )

    @torch.no_grad()
    def _cut(self, wanted: ClassSet, rank: int) -> Components:
        """The parts of the wanted classes, tailors cut to their `rank` largest singular components in each matrix."""
        tailors = {}
        for name in wanted.names:
            tensors = self.tailors[name]
            tailors[name] = {EMBEDDING: tensors[EMBEDDING]}
            for matrix in (key.removesuffix(".sigma") for key in tensors if key.endswith(".sigma")):
                tailors[name] |= named_factors(
                    matrix, algebra.canonical(factors_of(tensors, matrix)).first(rank)
                )
        return dataclasses.replace(self, tailors=tailors)

    @torch.no_grad()
    def _assemble(
        self,
        wanted: ClassSet,
        learngene_rank: int | None,
        *,
        dense: bool,
        share: Share = "class",
        copy: bool = True,
    ) -> DiT:
        rank = learngene_rank or self.learngene_rank
        table = slots_by_share(len(wanted), share)
        slots, width = sizes_of(table)
        own_slots = [*wanted.names, TASK][:slots]
        structure = Structure(
            rank=None if dense else rank,
            tailor_rank=largest_rank(self.tailors[name] for name in own_slots),
            slots=slots,
            gate_width=width,
            targets=self.targets,
        )
        dtype = self.learngenes[NULL_EMBEDDING].dtype
        with torch.device("meta"):
            model = empty(dataclasses.replace(self.config, num_classes=len(wanted)), wanted, structure)

        def own(tensor: Tensor) -> Tensor:
            return tensor.detach().to("cpu", dtype, copy=copy)

        rows = [self.tailors[name][EMBEDDING] for name in wanted.names] + [self.learngenes[NULL_EMBEDDING]]
        state = {"class_embed.weight": own(torch.stack(rows))}
        matrices = {name for name, _ in model.named_matrices()}
        for name, tensor in self.learngenes.items():
            owner, _, leaf = name.rpartition(".")
            if name != NULL_EMBEDDING and not (owner in matrices and leaf in Factors._fields):
                state[name] = own(tensor)
        for name, layer in model.named_matrices():
            assert isinstance(layer, ComponentLinear)
            learngenes = factors_of(self.learngenes, name)
            if learngene_rank is not None and learngene_rank < len(learngenes.sigma):
                learngenes = Factors(*(t.clone() for t in algebra.canonical(learngenes).first(rank)))
            if dense:
                state[f"{name}.weight"] = own(learngenes.dense())
            else:
                state |= {f"{name}.{leaf}": own(tensor) for leaf, tensor in learngenes._asdict().items()}
            if layer.has_tailors:
                bank = Factors(*(torch.empty(tensor.shape, dtype=dtype) for tensor in layer.tailors))
                for slot, owner in enumerate(own_slots):
                    fill_slot_(bank, slot, self.tailors[owner], name)
                state |= {f"{name}.tailor_{leaf}": tensor for leaf, tensor in bank._asdict().items()}
        gate = TableGate(len(wanted), width).fill_(table)
        state |= {GATE + name: tensor for name, tensor in gate.state_dict().items()}
        model.load_state_dict(state, assign=True)
        model.set_positions_()
        return model.to(dtype)


def largest_rank(tailors: Iterable[Mapping[str, Tensor]]) -> int:
    """Components of the largest of these tailors in any matrix."""
    return max((len(t) for own in tailors for key, t in own.items() if key.endswith(".sigma")), default=0)
