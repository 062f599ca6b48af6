"""The method: factored matrices, gates, taking models apart and putting them together."""

from kindiff.components.algebra import Factors, canonical, svd
from kindiff.components.anymodel import factorize_modules
from kindiff.components.anyparts import decompose_modules, merge_modules
from kindiff.components.build import factorize
from kindiff.components.files import load_autoencoder, load_components, load_tailor, save_components
from kindiff.components.gates import SoftGate, TableGate
from kindiff.components.linear import ComponentLinear
from kindiff.components.mixture import mixture
from kindiff.components.parts import Components
from kindiff.components.split import decompose
from kindiff.components.strategy import set_strategy_
from kindiff.components.swap import Tailor, swap_tailor_

__all__ = [
    "ComponentLinear",
    "Components",
    "Factors",
    "SoftGate",
    "TableGate",
    "Tailor",
    "canonical",
    "decompose",
    "decompose_modules",
    "factorize",
    "factorize_modules",
    "load_autoencoder",
    "load_components",
    "load_tailor",
    "merge_modules",
    "mixture",
    "save_components",
    "set_strategy_",
    "svd",
    "swap_tailor_",
]
