"""TLEG, FINE, WAVE: a model pre-trained under a constraint, so that few tensors make the blocks of any depth.

The constrained tensors are the weights and biases of seven matrices of every block: the six, and the modulation. A
`Bank` holds those of one matrix for all blocks. A constrained model is trained like any other; `densified` writes it
out as a plain DiT, and its tensors are saved as a learngene from which `expand` makes models of other depths.

L blocks, layer a block from 0, O/I features out/in, R rank, N templates, S side of a scaler.
"""

from __future__ import annotations

import abc
import copy
import dataclasses
from collections import Counter
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kindiff.classes import ClassSet
from kindiff.components import svd
from kindiff.config import MATRICES, DiTConfig
from kindiff.errors import UsageError
from kindiff.models.dit import DiT
from kindiff.models.layers import Gating, position_table

MODULATION = "modulation"
SIDE = 4  # WAVE: a weight is 4 x 4 pieces, each a mixture of 16 templates of that size


class Bank(nn.Module, abc.ABC):
    """One matrix of every block, made of shared tensors. `zero`: it starts as zeros (adaLN-zero)."""

    @abc.abstractmethod
    def weight(self, layer: int) -> Tensor:
        """(O, I) of a block."""

    @abc.abstractmethod
    def bias(self, layer: int) -> Tensor:
        """(O,) of a block."""

    @abc.abstractmethod
    def stretch_(self, depth: int) -> None:
        """Become a bank of that many blocks; in place."""


class TlegBank(Bank):
    """theta_l = theta_base + l / L theta_layer (TLEG, Xia et al. 2024), for weights and biases."""

    def __init__(self, features_out: int, features_in: int, depth: int, *, zero: bool) -> None:
        super().__init__()
        self.depth = depth
        start = torch.zeros(features_out, features_in) if zero else _xavier(features_out, features_in)
        self.base = nn.Parameter(start)
        self.layer = nn.Parameter(torch.zeros(features_out, features_in))
        self.bias_base = nn.Parameter(torch.zeros(features_out))
        self.bias_layer = nn.Parameter(torch.zeros(features_out))

    def weight(self, layer: int) -> Tensor:
        return self.base + layer / self.depth * self.layer

    def bias(self, layer: int) -> Tensor:
        return self.bias_base + layer / self.depth * self.bias_layer

    def stretch_(self, depth: int) -> None:
        self.depth = depth


class FineBank(Bank):
    """W_l = U diag(sigma_l) V^T, U and V shared (FINE), at full rank; a bias of its own for each block."""

    def __init__(self, features_out: int, features_in: int, depth: int, *, zero: bool) -> None:
        super().__init__()
        factors = svd(_xavier(features_out, features_in))
        self.u_OR = nn.Parameter(factors.u.T.contiguous())
        self.v_RI = nn.Parameter(factors.v)
        sigma_R = torch.zeros_like(factors.sigma) if zero else factors.sigma
        self.sigma_LR = nn.Parameter(sigma_R.repeat(depth, 1))
        self.bias_LO = nn.Parameter(torch.zeros(depth, features_out))

    def weight(self, layer: int) -> Tensor:
        return (self.u_OR * self.sigma_LR[layer]) @ self.v_RI

    def bias(self, layer: int) -> Tensor:
        return self.bias_LO[layer]

    def stretch_(self, depth: int) -> None:
        self.sigma_LR, self.bias_LO = _stretched(self.sigma_LR, depth), _stretched(self.bias_LO, depth)


class WaveBank(Bank):
    """W_l = sum_n S_ln (x) T_n, templates T shared, scalers S of each block (WAVE, Feng et al. 2025)."""

    def __init__(self, features_out: int, features_in: int, depth: int, *, zero: bool) -> None:
        super().__init__()
        if features_out % SIDE or features_in % SIDE:
            raise UsageError(
                f"wave cuts matrices into {SIDE} x {SIDE} pieces and one is {features_out} x {features_in}; choose a "
                f"width and MLP that are multiples of {SIDE}."
            )
        pieces = _xavier(features_out, features_in).unflatten(0, (SIDE, -1)).unflatten(2, (SIDE, -1))
        self.templates_NOI = nn.Parameter(pieces.transpose(1, 2).flatten(0, 1).contiguous())
        own_place_NSS = torch.eye(SIDE**2).reshape(-1, SIDE, SIDE)
        scalers_NSS = torch.zeros_like(own_place_NSS) if zero else own_place_NSS
        self.scalers_LNSS = nn.Parameter(scalers_NSS.repeat(depth, 1, 1, 1))
        self.bias_LO = nn.Parameter(torch.zeros(depth, features_out))

    def weight(self, layer: int) -> Tensor:
        pieces = torch.einsum("nij,nab->iajb", self.scalers_LNSS[layer], self.templates_NOI)
        return pieces.flatten(0, 1).flatten(1, 2)

    def bias(self, layer: int) -> Tensor:
        return self.bias_LO[layer]

    def stretch_(self, depth: int) -> None:
        self.scalers_LNSS = _stretched(self.scalers_LNSS, depth)
        self.bias_LO = _stretched(self.bias_LO, depth)


BANKS: dict[str, type[TlegBank] | type[FineBank] | type[WaveBank]] = {
    "tleg": TlegBank,
    "fine": FineBank,
    "wave": WaveBank,
}


class BankLinear(nn.Module):
    """A dense layer whose weight and bias come from a bank; the bank is the model's, not the layer's."""

    def __init__(self, bank: Bank, layer: int) -> None:
        super().__init__()
        self._bank = (bank,)  # in a tuple: no submodule, so that each bank is in the state once
        self.layer = layer

    @property
    def weight(self) -> Tensor:
        return self._bank[0].weight(self.layer)

    @property
    def bias(self) -> Tensor:
        return self._bank[0].bias(self.layer)

    def forward(self, x: Tensor, gating: Gating | None = None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # the weight in fp32, rounded once
            weight = self.weight
        return F.linear(x, weight, self.bias)


def constrained(config: DiTConfig, classes: ClassSet, method: str) -> DiT:
    """A new model whose blocks are made by banks of a method (a key of BANKS); random, from torch's generator."""
    width = config.width
    shapes = {matrix: config.matrix_shape(matrix) for matrix in MATRICES} | {MODULATION: (6 * width, width)}
    banks = nn.ModuleDict(
        {name: BANKS[method](*shape, config.depth, zero=name == MODULATION) for name, shape in shapes.items()}
    )
    made: Counter[str] = Counter()

    def linear(matrix: str, features_in: int, features_out: int) -> nn.Module:
        made[matrix] += 1
        return BankLinear(banks[matrix], made[matrix] - 1)  # type: ignore[arg-type]

    model = DiT(config, classes=classes, linear=linear)
    for layer, block in enumerate(model.blocks):
        block.modulation = BankLinear(banks[MODULATION], layer)  # type: ignore[arg-type]
    model.add_module("learngene", banks)
    return model


def with_tensors(config: DiTConfig, classes: ClassSet, method: str, tensors: Mapping[str, Tensor]) -> DiT:
    """A constrained model that holds these very tensors; all of it trains."""
    with torch.device("meta"):
        model = constrained(config, classes, method)
    model.load_state_dict(tensors, assign=True)
    model.positions_TD = position_table(config.width, config.input_size // config.patch)
    return model.requires_grad_(True)


def stretched(model: DiT, method: str, depth: int) -> DiT:
    """A new constrained model of another depth: what blocks have of their own is interpolated, the rest shared.

    UsageError for a depth that no model has.
    """
    config = dataclasses.replace(model.config, depth=depth)
    twin = copy.deepcopy(model)
    for bank in twin.get_submodule("learngene").children():
        assert isinstance(bank, Bank)
        bank.stretch_(depth)
    return with_tensors(config, model.classes, method, twin.state_dict())


def _xavier(features_out: int, features_in: int) -> Tensor:
    return nn.init.xavier_uniform_(torch.empty(features_out, features_in))


def _stretched(tensor_L: Tensor, depth: int) -> nn.Parameter:
    """Something of each block, interpolated along the depth; the first and the last stay."""
    place = torch.linspace(0, len(tensor_L) - 1, depth)
    low = place.floor().long()
    high = (low + 1).clamp(max=len(tensor_L) - 1)
    share = (place - low).view(-1, *[1] * (tensor_L.ndim - 1))
    return nn.Parameter(tensor_L[low] * (1 - share) + tensor_L[high] * share)
