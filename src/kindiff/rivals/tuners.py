"""peft's tuners on the six matrices of every block: the library's own layers, put into a copy of the dense model."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from kindiff.config import MATRICES, RivalConfig
from kindiff.errors import UsageError
from kindiff.models.dit import DiT
from kindiff.rivals.base import CLASS_ROWS, Rival

TARGETS = rf"blocks\.\d+\.({'|'.join(MATRICES)})"
"""peft's target_modules, matched against whole names."""


def tuner(make: Callable[[Any, RivalConfig, int], Any], *, keeps: float, in_blocks: bool = False) -> Rival:
    """A rival from `make`: (the peft module, settings, seed) -> peft's own config.

    in_blocks: its rank is the side of blocks, which must divide the input of every matrix.
    """

    def wrap(model: DiT, config: RivalConfig, seed: int) -> DiT:
        peft = _library()
        if in_blocks and (model.config.width % config.rank or model.config.hidden % config.rank):
            raise UsageError(
                f"{config.method} cuts inputs into blocks of side {config.rank}, which does not divide the widths "
                f"{model.config.width} and {model.config.hidden}; choose a rank that does."
            )
        try:
            with _no_extension():
                model = peft.get_peft_model(model, make(peft, config, seed)).get_base_model()
        except ValueError as error:
            raise UsageError(f"peft refuses {config.method} with rank {config.rank}: {error}") from None
        for name, parameter in model.named_parameters():
            if name == CLASS_ROWS:
                parameter.requires_grad_(True)
        return model

    return Rival(wrap=wrap, weight=_weight, foreign=True, keeps=keeps)


def _weight(layer: nn.Module) -> Tensor:
    """What peft merges into the layer below; the trained layer stays as it is."""
    merged: Any = copy.deepcopy(layer)
    merged.merge()
    return merged.get_base_layer().weight


def _library() -> Any:
    try:
        import peft
    except ImportError:
        raise ImportError("peft is not installed; pip install 'kindiff[peft]'.") from None
    return peft


@contextlib.contextmanager
def _no_extension() -> Iterator[None]:
    """BOFT tries for every layer to compile a CUDA extension that one butterfly factor does not need, and says so."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        for message in ("Failed to load the CUDA extension", "Setting boft_n_butterfly_factor to 1"):
            warnings.filterwarnings("ignore", message=message)
        yield


def _lora(peft: Any, config: RivalConfig, *, dora: bool = False, init: bool | str = True) -> Any:
    return peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha or config.rank, use_dora=dora, init_lora_weights=init,
        target_modules=TARGETS,
    )  # fmt: skip


LORA = tuner(lambda peft, config, seed: _lora(peft, config), keeps=1e-5)
DORA = tuner(lambda peft, config, seed: _lora(peft, config, dora=True), keeps=1e-5)
PISSA = tuner(lambda peft, config, seed: _lora(peft, config, init="pissa"), keeps=1e-4)


def _lycoris(config: RivalConfig) -> dict[str, Any]:
    # An integer where it is one: that is what peft's configs say.
    return {"r": config.rank, "alpha": config.alpha or config.rank, "target_modules": TARGETS}


# The exact Cayley transform: with peft's default, a series of few terms, the blocks are orthogonal near the start only.
OFT = tuner(
    lambda peft, config, seed: peft.OFTConfig(
        r=0, oft_block_size=config.rank, use_cayley_neumann=False, target_modules=TARGETS
    ),
    keeps=1e-5,
    in_blocks=True,
)
# One butterfly factor: peft has more only where its CUDA extension can be compiled, and results would differ.
BOFT = tuner(
    lambda peft, config, seed: peft.BOFTConfig(
        boft_block_size=config.rank, boft_n_butterfly_factor=1, target_modules=TARGETS
    ),
    keeps=1e-5,
    in_blocks=True,
)
LOHA = tuner(lambda peft, config, seed: peft.LoHaConfig(**_lycoris(config)), keeps=1e-5)
LOKR = tuner(lambda peft, config, seed: peft.LoKrConfig(**_lycoris(config)), keeps=1e-5)
VERA = tuner(
    lambda peft, config, seed: peft.VeraConfig(
        r=config.rank, projection_prng_key=seed, target_modules=TARGETS
    ),
    keeps=1e-5,
)
HRA = tuner(lambda peft, config, seed: peft.HRAConfig(r=config.rank, target_modules=TARGETS), keeps=1e-5)
