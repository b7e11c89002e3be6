"""Convex hull of pixel positions, and the smallest triangle that encloses it."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Points = NDArray[np.float64]


def _cross(a: Points, b: Points) -> NDArray[np.float64]:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _half_hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    chain: list[tuple[float, float]] = []
    for x, y in points:
        while len(chain) > 1:
            (ax, ay), (bx, by) = chain[-2:]
            if (bx - ax) * (y - ay) > (by - ay) * (x - ax):
                break
            chain.pop()
        chain.append((x, y))
    return chain[:-1]


def convex_hull(points: ArrayLike) -> Points:
    """Return the corners of the convex hull by Andrew's monotone chain.

    Args:
        points: [n, 2], n >= 1.

    Returns:
        float64 [h, 2], counter-clockwise (y up) without collinear corners; h is below 3 if the
        points lie on a line.
    """
    ordered = [(float(x), float(y)) for x, y in np.unique(np.asarray(points, float), axis=0)]
    if len(ordered) < 3:
        return np.array(ordered)
    return np.array(_half_hull(ordered) + _half_hull(ordered[::-1]))


def smallest_triangle(hull: ArrayLike) -> Points:
    """Return the triangle of least area that encloses a convex polygon.

    Some smallest triangle has one side flush with an edge (Klee and Laskowski 1985); sliding the
    opposite corner parallel to that side keeps the area until a second side is flush. The third
    side is then flush too, or touches one corner of the polygon at its own midpoint. All O(h^3)
    triangles of both kinds are compared. For integer corners up to a few hundred the areas are
    ratios of exactly represented integers.

    Args:
        hull: [h, 2], h >= 3, counter-clockwise and strictly convex, from `convex_hull`.

    Returns:
        float64 [3, 2], counter-clockwise; the first one found of several triangles with the same
        area.

    Raises:
        ValueError: the hull has another shape.
    """
    corners = np.asarray(hull, float)
    if corners.ndim != 2 or corners.shape[0] < 3 or corners.shape[1] != 2:
        raise ValueError(f"hull must have the shape [h, 2] with h >= 3; got {corners.shape}")
    h = len(corners)
    edges = np.roll(corners, -1, 0) - corners
    # Edge i is the half-plane normals[i] . p <= offsets[i].
    normals = np.stack([edges[:, 1], -edges[:, 0]], 1)
    offsets = (normals * corners).sum(1)
    slack = offsets[:, None] - normals @ corners.T
    turn = _cross(normals[:, None], normals[None])
    i, j, k = (np.arange(h).reshape(s) for s in ((h, 1, 1), (1, h, 1), (1, 1, h)))

    # Three flush sides: bounded if and only if each normal turns left into the next.
    t_ij, t_jk, t_ki = turn[i, j], turn[j, k], turn[k, i]
    bounded = (i < j) & (j < k) & (t_ij > 0) & (t_jk > 0) & (t_ki > 0)
    det = offsets[i] * t_jk + offsets[j] * t_ki + offsets[k] * t_ij
    flush = np.full((h, h, h), np.inf)
    np.divide(det * det, 2 * t_ij * t_jk * t_ki, out=flush, where=bounded)

    # Sides i and j flush, the third bisected by corner k: it supports the polygon if both
    # neighbours of k lie on its inner side.
    s_i, s_j = slack[i, k], slack[j, k]
    supports = (i < j) & (t_ij != 0) & (s_i > 0) & (s_j > 0)
    for step in (-1, 1):
        n_i, n_j = slack[i, (k + step) % h], slack[j, (k + step) % h]
        supports = supports & (n_j * s_i + n_i * s_j <= 2 * s_i * s_j)
    bisected = np.full((h, h, h), np.inf)
    np.divide(2 * s_i * s_j, np.abs(t_ij), out=bisected, where=supports)

    def meet(a: int, b: int) -> Points:
        x = offsets[a] * normals[b, 1] - offsets[b] * normals[a, 1]
        y = normals[a, 0] * offsets[b] - normals[b, 0] * offsets[a]
        return np.array([x, y]) / turn[a, b]

    if flush.min() <= bisected.min():
        a, b, c = map(int, np.unravel_index(flush.argmin(), flush.shape))
        return np.array([meet(a, b), meet(b, c), meet(c, a)])
    a, b, c = map(int, np.unravel_index(bisected.argmin(), bisected.shape))
    apex = meet(a, b)
    # Along each flush side to twice the depth of corner c below the other one.
    on_a = apex + 2 * slack[b, c] / -(normals[b] @ edges[a]) * edges[a]
    on_b = apex + 2 * slack[a, c] / -(normals[a] @ edges[b]) * edges[b]
    triangle = np.array([apex, on_a, on_b])
    return triangle if _cross(on_a - apex, on_b - apex) > 0 else triangle[::-1]
