"""Where a decoder's bias may begin: centres of the activations."""

import numpy as np


def geometric_median(x: np.ndarray, iterations: int = 100, tolerance: float = 1e-6) -> np.ndarray:
    """The point [D] float64 with the least sum of distances to the rows of x[N, D].

    Weiszfeld's algorithm, from the mean: the mean of the rows weighted by 1 / distance, until it moves by less than
    `tolerance` times its mean distance to them. Unlike the mean, it is not drawn by a few large rows.
    """
    rows = x.astype(np.float64)
    centre = rows.mean(0)
    for _ in range(iterations):
        distances = np.linalg.norm(rows - centre, axis=1)
        weights = 1 / np.maximum(distances, 1e-12 * max(distances.max(), 1e-300))
        new = weights @ rows / weights.sum()
        moved = np.linalg.norm(new - centre)
        centre = new
        if moved <= tolerance * distances.mean():
            break
    return centre
