"""Class accuracy by a linear probe: do samples look like the class they were asked to be?

Shapes: N images, D feature dimensions, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kindiff.errors import UsageError


@dataclass(frozen=True)
class Probe:
    """A linear classifier on standardised features."""

    shift: np.ndarray
    """(D,) mean of the training features."""
    scale: np.ndarray
    """(D,) inverse of their deviation; 1 where a feature is constant."""
    weight: np.ndarray
    """(D, C)."""
    bias: np.ndarray
    """(C,)."""

    def predict(self, x_ND: np.ndarray) -> np.ndarray:
        """(N,) class ids of features (N, D)."""
        z_ND = (np.asarray(x_ND, dtype=np.float64) - self.shift) * self.scale
        return (z_ND @ self.weight + self.bias).argmax(axis=1)

    def accuracy(self, x_ND: np.ndarray, labels_N: np.ndarray) -> float:
        """Share of the images (N, D) that the probe takes for their label (N,)."""
        return float((self.predict(x_ND) == labels_N).mean())


def fit_probe(
    x_ND: np.ndarray, labels_N: np.ndarray, *, classes: int, decay: float = 1e-2, steps: int = 200
) -> Probe:
    """Multinomial logistic regression of labels (N,) in 0 .. classes-1 on features (N, D), by L-BFGS.

    decay: weight of |W|^2 / 2 beside the mean cross entropy. Deterministic: starts from zero, sees all images
    at once. Raises UsageError when a class has no image.
    """
    from scipy.optimize import minimize

    empty = np.flatnonzero(np.bincount(labels_N, minlength=classes) == 0)
    if len(empty):
        raise UsageError(f"the linear probe needs reference images of each class; class {empty[0]} has none.")
    x_ND = np.asarray(x_ND, dtype=np.float64)
    deviation_D = x_ND.std(axis=0)
    scale_D = 1.0 / np.where(deviation_D > 0, deviation_D, 1.0)
    shift_D = x_ND.mean(axis=0)
    z_ND = (x_ND - shift_D) * scale_D
    n, d = z_ND.shape
    rows_N = np.arange(n)

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weight_DC, bias_C = flat[:-classes].reshape(d, classes), flat[-classes:]
        log_p_NC = z_ND @ weight_DC + bias_C
        log_p_NC -= log_p_NC.max(axis=1, keepdims=True)
        log_p_NC -= np.log(np.exp(log_p_NC).sum(axis=1, keepdims=True))
        value = -log_p_NC[rows_N, labels_N].mean() + decay * (weight_DC**2).sum() / 2
        error_NC = np.exp(log_p_NC)
        error_NC[rows_N, labels_N] -= 1.0
        slope_DC = z_ND.T @ error_NC / n + decay * weight_DC
        return value, np.concatenate([slope_DC.ravel(), error_NC.mean(axis=0)])

    found = minimize(
        loss, np.zeros((d + 1) * classes), jac=True, method="L-BFGS-B", options={"maxiter": steps}
    )
    return Probe(shift_D, scale_D, found.x[:-classes].reshape(d, classes), found.x[-classes:])
