"""Where a decoder's bias may begin: centres of the activations."""

import numpy as np


def geometric_median(x: np.ndarray, iterations: int = 100, tolerance: float = 1e-6) -> np.ndarray:
    """The point [D] float64 with the least sum of distances to the rows of x[N, D].

    Weiszfeld's algorithm, from the median of each coordinate: the mean of the rows weighted by 1 / distance, until it
    moves by less than `tolerance` times its mean distance to them. Unlike the mean, few large rows hardly draw it.
    """
    rows = x.astype(np.float64)
    centre = np.median(rows, axis=0)
    for _ in range(iterations):
        distances = np.linalg.norm(rows - centre, axis=1)
        if not distances.any():
            break
        weights = 1 / np.maximum(distances, 1e-12 * distances.mean())
        new = weights @ rows / weights.sum()
        moved, centre = np.linalg.norm(new - centre), new
        if moved <= tolerance * distances.mean():
            break
    return centre
