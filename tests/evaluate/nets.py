"""Feature networks with reproducible random weights, for tests that the published weights are not needed for."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn


def random_state(net: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights that keep activations in a sensible range, in the layout of the published file (no counters)."""
    draw = np.random.Generator(np.random.Philox(seed))
    state = {}
    for name, value in net.state_dict().items():
        shape = tuple(value.shape)
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith("running_var") or (".bn" in name and name.endswith("weight")):
            array = draw.uniform(0.7, 1.3, shape)
        elif len(shape) > 1:
            array = draw.standard_normal(shape, dtype=np.float32) * np.sqrt(2 / np.prod(shape[1:]))
        else:
            array = draw.standard_normal(shape) * 0.2
        state[name] = torch.from_numpy(np.asarray(array, dtype=np.float32))
    return state
