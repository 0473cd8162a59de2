"""Calibration: whether 80% of the predictions with probability 0.8 are right.

Probabilities are sorted into 15 bins of equal width; bin m of 1 to 15 is ((m - 1) / 15, m / 15]. The expected calibration error
is the mean over the predictions of the difference between their bin's mean probability and its share of right predictions
(Guo et al. 2017, "On Calibration of Modern Neural Networks", https://arxiv.org/abs/1706.04599, equation 3).
"""

from typing import Any

import numpy as np

N_BINS = 15
EDGES = np.linspace(0, 1, N_BINS + 1)


def calibrate(probabilities: np.ndarray, is_right: np.ndarray) -> dict[str, Any]:
    """The content of a reliability diagram.

    Probabilities that are not finite are left out.

    Args:
        probabilities: [m], of predictions.
        is_right: [m], whether each prediction is right.

    Returns:
        `ece`, the expected calibration error; `count`, `confidence` (mean probability) and `accuracy` (share of right
        predictions) of all predictions; and `bins`, the same three values for each bin that is not empty, with its limits
        `low` and `high`. All are 0 without predictions.
    """
    usable = np.isfinite(probabilities)
    probabilities, is_right = probabilities[usable].astype(np.float64), is_right[usable].astype(np.float64)
    index = np.searchsorted(EDGES[1:-1], probabilities, side="left")  # a limit belongs to the bin below it
    counts, sums, right = (np.bincount(index, weights, N_BINS) for weights in (None, probabilities, is_right))
    n = max(1, len(probabilities))
    bins = [
        {
            "low": float(EDGES[m]),
            "high": float(EDGES[m + 1]),
            "count": int(counts[m]),
            "confidence": float(sums[m] / counts[m]),
            "accuracy": float(right[m] / counts[m]),
        }
        for m in np.flatnonzero(counts)
    ]
    return {
        "ece": float(np.abs(sums - right).sum() / n),
        "count": len(probabilities),
        "confidence": float(sums.sum() / n),
        "accuracy": float(right.sum() / n),
        "bins": bins,
    }
