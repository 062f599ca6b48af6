"""AdamW for what every sample trains, and Adam by rows for what belongs to classes.

A class that is absent from a step must not move: not by the momentum of its earlier steps, not by decay. So
tailors and class embeddings keep their moments and step counts by row, and a step touches only the rows of the
classes that it saw (METHOD: traps).

S rows of a bank (slots or classes), n rows that a step touches, P numbers of a row over all banks.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from kindiff import native
from kindiff.components.gates import TableGate
from kindiff.components.operators import TRITON
from kindiff.config import TrainConfig
from kindiff.models.dit import DiT
from kindiff.train.apart import Apart
from kindiff.train.sharding import as_rows_of, first_row, held_as, local

BETAS = (0.9, 0.99)
EPS = 1e-8
PREFIX = "shared"


class RowAdam:
    """Adam (Kingma & Ba 2015) on banks that share their first dimension; rows not named do not change a bit."""

    def __init__(self, banks: list[nn.Parameter]) -> None:
        self.banks = banks
        self.rows = len(banks[0]) if banks else 0
        self.first = first_row(banks[0]) if banks else 0
        width = sum(bank.shape[1:].numel() for bank in banks)
        like = local(banks[0]) if banks else torch.empty(0)
        self.mean_SP = torch.zeros(len(like), width, device=like.device, dtype=like.dtype)
        self.square_SP = torch.zeros(len(like), width, device=like.device, dtype=like.dtype)
        self.steps_S = torch.zeros(len(like), device=like.device, dtype=like.dtype)
        self._places: tuple[list[int], Tensor] | None = None
        """On a GPU: the banks' addresses, and what `kindiff.train.kernels` takes for them."""

    @torch.no_grad()
    def step(self, rows: Tensor, lr: float | Tensor, apart: list[nn.Parameter] | None = None) -> None:
        """One step of the named rows along the banks' gradients, or of rows that stand apart along theirs.

        rows: each once, or again and again, so that shapes stay the same; it takes one step. apart: the banks' rows as
        tensors of their own, the named ones first, of which only the gradients are sure to be looked at.
        """
        if not self.banks:
            return
        rows = rows.to(self.steps_S.device)
        if len(self.steps_S) < self.rows:  # this rank's
            rows = rows[(rows >= self.first) & (rows < self.first + len(self.steps_S))] - self.first
        if not len(rows):
            return
        count = len(rows)
        first = (rows.unsqueeze(1) == rows).int().argmax(dim=1)
        held = [local(bank) for bank in self.banks]
        given = [bank.grad for bank in self.banks] if apart is None else [own.grad for own in apart]
        tensors = [self.steps_S, *held, *(gradient for gradient in given if gradient is not None)]
        whole = all(tensor.dtype == torch.float32 for tensor in tensors) and all(
            t.is_contiguous() for t in held
        )
        if whole and native.usable(*tensors):
            once = first == torch.arange(count, device=rows.device)
            self.steps_S[rows[once]] += 1
            places = rows if apart is None else first
            native.adam_rows_(
                held, given, rows[once], places[once], self.mean_SP, self.square_SP, self.steps_S, float(lr), BETAS, EPS
            )  # fmt: skip
            return
        found = (
            [_gradient(bank)[rows] for bank in self.banks]
            if apart is None
            else [_gradient(own)[:count] for own in apart]
        )
        gradient = torch.cat([g.flatten(1) for g in found], dim=1)
        if gradient.is_cuda and TRITON and gradient.dtype == torch.float32:
            self._step_in_place(gradient, rows, first, lr, held)
            return
        change = self._change(gradient, rows, first, lr)
        values = [bank[rows] for bank in held] if apart is None else [own[:count] for own in apart]
        pieces = change.split([bank.shape[1:].numel() for bank in held], dim=1)
        torch._foreach_sub_(values, [p.view_as(v) for p, v in zip(pieces, values, strict=True)])
        for bank, value in zip(held, values, strict=True):
            bank.index_copy_(0, rows, value)

    def _step_in_place(
        self, gradient_nP: Tensor, rows_n: Tensor, first_n: Tensor, lr: float | Tensor, held: list[Tensor]
    ) -> None:
        """The step on a GPU, in one pass over memory. first_n: where each row is named first; that gradient counts."""
        from kindiff.train.kernels import adam_rows_, places_of

        addresses = [bank.data_ptr() for bank in held]
        if self._places is None or self._places[0] != addresses:
            self._places = addresses, places_of(held).to(gradient_nP.device)
        self.steps_S[rows_n] += 1
        rate = lr if isinstance(lr, Tensor) else torch.full((), lr, device=rows_n.device)
        adam_rows_(
            gradient_nP, self.mean_SP, self.square_SP, self.steps_S, rows_n, first_n, self._places[1], rate, BETAS, EPS
        )  # fmt: skip

    def _change(self, gradient_nP: Tensor, rows_n: Tensor, first_n: Tensor, lr: float | Tensor) -> Tensor:
        """What is to be taken from the named rows, (n, P); their moments and counts move on."""
        change_nP = torch.zeros_like(gradient_nP)
        place_of = dict(zip(rows_n.tolist(), first_n.tolist(), strict=True))
        adam(  # each row as a parameter of its own, since each has its own count
            params=[change_nP[place] for place in place_of.values()],
            grads=[gradient_nP[place] for place in place_of.values()],
            exp_avgs=[self.mean_SP[row] for row in place_of],
            exp_avg_sqs=[self.square_SP[row] for row in place_of],
            max_exp_avg_sqs=[],
            state_steps=[self.steps_S[row] for row in place_of],
            fused=True, amsgrad=False, maximize=False, weight_decay=0.0,
            beta1=BETAS[0], beta2=BETAS[1], eps=EPS, lr=lr,
        )  # fmt: skip
        change_nP.neg_()
        return change_nP if len(place_of) == len(rows_n) else change_nP[first_n]

    def tensors(self) -> dict[str, Tensor]:
        state = {"mean": self.mean_SP, "square": self.square_SP, "steps": self.steps_S}
        return {key: as_rows_of(t, self.banks[0]) for key, t in state.items()} if self.banks else state


class Optimiser:
    """All parameters of a model that require gradients, each in its group.

    Dense matrices decay (config.weight_decay); components, biases and embeddings do not. Tailors have their own
    learning rate (config.tailor_lr, 0 for the same). alone: the model is whole in this process, so that the tailors of
    a step can be set apart from their banks.
    """

    def __init__(self, model: DiT, config: TrainConfig, *, alone: bool = True) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        tailors = {name: p for name, p in trained.items() if ".tailor_" in name}
        classes = {n: p for n, p in trained.items() if n.startswith("class_embed.") and n not in tailors}
        self.shared = {n: p for n, p in trained.items() if n not in tailors and n not in classes}
        self.parameters = list(trained.values())
        self.config = config
        self.alone = alone
        # On the host, so that no step waits for the device to say which classes it has.
        self.gate = copy.deepcopy(model.gate).cpu() if isinstance(model.gate, TableGate) else model.gate
        self.apart = Apart(model) if alone and tailors and type(model.gate) is TableGate else None
        self.rows: list[nn.Parameter] = []
        """The step's tailors, while they stand apart from their banks."""
        self.tailors, self.classes = RowAdam(list(tailors.values())), RowAdam(list(classes.values()))
        components = {f"{name}.{leaf}" for name, _ in model.named_matrices() for leaf in ("u", "sigma", "v")}
        exempt = {n for n, p in self.shared.items() if p.ndim <= 1 or n in components or _is_bias(n)}
        decays = [p for n, p in self.shared.items() if n not in exempt]
        others = [p for n, p in self.shared.items() if n in exempt]
        groups = [
            {"params": decays, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        recordable = any(p.is_cuda for p in self.parameters)
        self.adamw = (
            torch.optim.AdamW(groups, betas=BETAS, eps=EPS, fused=True, capturable=recordable)
            if groups
            else None
        )

    def slots_on(self, gate_ids_B: Tensor) -> Tensor:
        """The tailor slots that a batch (its ids on the host) trains, each once; none where no tailor trains."""
        if self.gate is None or not self.tailors.banks:
            return torch.empty(0, dtype=torch.int64)
        return self.gate.slots_on(gate_ids_B)  # type: ignore[operator]

    @contextlib.contextmanager
    def of_slots(self, slots: Tensor, images: int = 0) -> Iterator[None]:
        """Around the forward and backward passes of a step: the tailors of these slots, and no others, get gradients.

        images: of a step, where shapes must stay the same.
        """
        with self.at_places(*self.places(slots, images)):
            yield

    def places(self, slots: Tensor, images: int = 0) -> list[Tensor]:
        """What `at_places` takes, on the host: nothing where tailors stay in their banks (see `Apart.places`)."""
        return [] if self.apart is None else list(self.apart.places(slots, images))

    @contextlib.contextmanager
    def at_places(self, *places: Tensor) -> Iterator[None]:
        """`of_slots`, of what `places` found."""
        self.zero_grad()
        if self.apart is None:
            yield
            return
        device = self.apart.gate.slots_CK.device
        with self.apart.at(*(tensor.to(device) for tensor in places)) as self.rows:
            yield

    def clip(self, largest: float) -> Tensor:
        """Scale all gradients so that their norm is at most this; returns the norm they had."""
        return torch.nn.utils.clip_grad_norm_([*self.parameters, *self.rows], largest)

    def step(self, *, factor: float | Tensor, slots: Tensor, ids: Tensor) -> None:
        """One step at `factor` times the peak learning rates; of the classes only these slots and ids move.

        Both may repeat.
        """
        if self.adamw is not None:
            for group in self.adamw.param_groups:
                group["lr"] = self.config.lr * factor
            self.adamw.step()
        tailor_lr = self.config.tailor_lr or self.config.lr
        self.tailors.step(slots, tailor_lr * factor, self.rows or None)
        self.classes.step(ids, tailor_lr * factor)

    def zero_grad(self) -> None:
        self.rows = []
        for parameter in self.parameters:
            parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """The whole state by name, for a checkpoint."""
        rows = {"tailors": self.tailors, "classes": self.classes}
        state = {f"{kind}.{key}": tensor for kind, r in rows.items() for key, tensor in r.tensors().items()}
        if self.adamw is not None:
            for name, parameter in self.shared.items():
                moments = self.adamw.state.get(parameter, {})
                state |= {f"{PREFIX}.{name}.{key}": tensor for key, tensor in moments.items()}
        return state

    def load_(self, state: Mapping[str, Tensor]) -> None:
        """Take over the state of a checkpoint, in place."""
        for kind, rows in (("tailors", self.tailors), ("classes", self.classes)):
            for key, tensor in rows.tensors().items():
                local(tensor).copy_(local(held_as(state[f"{kind}.{key}"], tensor)))
        if self.adamw is not None:
            keys = ("step", "exp_avg", "exp_avg_sq")
            for name, parameter in self.shared.items():
                if f"{PREFIX}.{name}.step" in state:  # a parameter without a step so far has no moments
                    moments = {key: state[f"{PREFIX}.{name}.{key}"] for key in keys}
                    self.adamw.state[parameter] = {
                        key: moment.to(parameter.device) if key == "step" else held_as(moment, parameter)
                        for key, moment in moments.items()
                    }
                else:
                    self.adamw.state.pop(parameter, None)


def factor_of(step: int, config: TrainConfig) -> float:
    """The share of the peak learning rate at a step: linear warm-up, constant, linear decay to zero."""
    warm = min(1.0, (step + 1) / max(config.warmup, 1))
    falling = config.steps * config.decay
    return warm * (min(1.0, (config.steps - step) / falling) if falling else 1.0)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return local(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)


def _is_bias(name: str) -> bool:
    """Whether a tensor is biases or singular values, those of all blocks in one (FINE, WAVE) too."""
    return name.rpartition(".")[2].startswith(("bias", "sigma"))
