"""Pixel coordinates of two masks, paired, moved and drawn: what image-space interpolation is made of.

Points are float (n, 2), rows (y, x). A pairing interpolates place, size and direction apart from the remaining shape;
in the paper's reading order the first three stay what they are.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.spatial import cKDTree

GAP = 2.0
"""The paper's "small threshold" between consecutive points, in px; the value is the released code's."""
SAMPLE = 200
"""Pixels of each mask that optimal transport assigns: exact, at a cost that grows with the cube."""


class Pairs(NamedTuple):
    """Points of two masks in pairs.

    Attributes:
        first: (n, 2) about ``centres[0]``, in units of the square root of ``areas[0]``.
        second: (n, 2), the same, turned back by ``turn``.
        centres: (2, 2).
        areas: Pixels of the two masks, or ones where points are in px.
        turn: Radians from the first to the second; positive turns rows' axis towards columns'.
        stretch: (2, 2), the linear part of first -> second (row vectors), for the areas between.
    """

    first: NDArray
    second: NDArray
    centres: NDArray
    areas: tuple[float, float]
    turn: float
    stretch: NDArray


def raster(first: NDArray, second: NDArray) -> Pairs:
    """The paper's order: points as they are read, the shorter list resampled linearly to the longer one's length.

    Where consecutive points are farther apart than :data:`GAP`, points are inserted evenly on the line between.
    """
    n = max(len(first), len(second))
    lists = [
        np.stack([np.interp(np.linspace(0, len(p) - 1, n), np.arange(len(p)), p[:, axis]) for axis in (0, 1)], 1)
        for p in (first, second)
    ]
    steps = np.arange(n - 1)
    return _fill(Pairs(*lists, np.zeros((2, 2)), (1.0, 1.0), 0.0, np.eye(2)), steps, steps + 1, GAP)


def transport(first: NDArray, second: NDArray, pieces: NDArray | None = None, others: NDArray | None = None) -> Pairs:
    """Every pixel of a mask paired with a place in one that is no larger, by optimal transport.

    Both are centred, scaled to area one and turned to one direction. Of each, at most :data:`SAMPLE` pixels are
    assigned at the least sum of squared distances; the other pixels follow their four nearest in the sample. Points are
    inserted between adjacent pixels that come to lie more than one pixel apart, so a piece stays in one piece.

    Args:
        first: Pixels (n, 2).
        second: Pixels (m, 2), m <= n.
        pieces: Label of each pixel of ``first`` where a mask is taken whole though it has several pieces. A piece that
            divides is then torn, not drawn out.
        others: The same for ``second``.
    """
    centres = np.array([first.mean(0), second.mean(0)])
    a, b = ((p - centre) / np.sqrt(len(p)) for p, centre in zip((first, second), centres))
    orders = [_z_order(p) for p in (first, second)]
    coarse = [_every(order, min(100, len(a))) for order in orders]
    turn = _turn(a, b, *coarse)
    b = b @ _rotation(-turn)
    k = min(SAMPLE, max(16, len(b)))
    chosen, partner = (_every(order, k) for order in orders)
    partner = partner[linear_sum_assignment(squares(a[chosen], b[partner]))[1]]
    # The common stretch first, then what is left of it, averaged over the nearest of the sample.
    stretch = np.eye(2)
    if pieces is None:
        pixel = np.eye(2) / 12 / len(a)
        stretch = np.linalg.solve(a[chosen].T @ a[chosen] / k + pixel, a[chosen].T @ b[partner] / k + pixel)
    distance, near = cKDTree(a[chosen]).query(a, k=4)
    share = 1 / (distance**2 + 0.25 / k)
    i, j = _adjacent(first)
    if pieces is not None:
        share *= pieces[chosen][near] == pieces[:, None]
        share[share.sum(1) == 0, 0] = 1
        target = others[partner][near]
        goal = np.take_along_axis(target, share.argmax(1)[:, None], 1)
        share *= target == goal
        i, j = (ends[goal[i, 0] == goal[j, 0]] for ends in (i, j))
    share /= share.sum(1, keepdims=True)
    rest = b[partner] - a[chosen] @ stretch
    end = a @ stretch + np.einsum("nk,nkc->nc", share, rest[near])
    return _fill(Pairs(a, end, centres, (len(first), len(second)), turn, stretch), i, j, 1.0)


def squares(a: NDArray, b: NDArray) -> NDArray:
    """Squared distances (n, m) between points (n, 2) and (m, 2)."""
    return ((a[:, None] - b[None]) ** 2).sum(-1)


def _rotation(turn: float) -> NDArray:
    """For row vectors: points @ rotation."""
    return np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])


def _turn(a: NDArray, b: NDArray, some: NDArray, others: NDArray) -> float:
    """How far to turn points (n, 2) about zero to lie like others: not at all, or axis on axis, either way round.

    Bars at right angles have no cheapest transport without a turn and pass through a blot. The least cost between a few
    of the points (their indices) decides; near ties, the smallest turn.
    """
    angles = []
    for p in (a, b):
        _, axes = np.linalg.eigh(p.T @ p)
        angles.append(np.arctan2(axes[1, 1], axes[0, 1]))
    between = angles[1] - angles[0]
    turns = [0.0, *(float(np.angle(np.exp(1j * (between + half)))) for half in (0, np.pi))]
    costs = []
    for turn in turns:
        cost = squares(a[some], b[others] @ _rotation(-turn))
        costs.append(cost[linear_sum_assignment(cost)].mean())
    near_best = [turn for turn, cost in zip(turns, costs) if cost <= 1.1 * min(costs) + 1e-4]
    return min(near_best, key=abs)


def _z_order(points: NDArray[np.int64]) -> NDArray[np.int64]:
    """Order of pixels (n, 2) along a Z-order curve, on which neighbours in the list are neighbours in the plane."""
    y, x = (points - points.min(0)).T
    code = np.zeros(len(points), np.int64)
    for bit in range(max(int(y.max()), int(x.max()), 1).bit_length()):
        code |= (y >> bit & 1) << (2 * bit + 1) | (x >> bit & 1) << (2 * bit)
    return np.argsort(code)


def _every(order: NDArray, k: int) -> NDArray:
    """Take k items spread evenly over a list; repeats where k is larger."""
    return order[((np.arange(k) + 0.5) * len(order) / k).astype(int)]


def _adjacent(points: NDArray) -> tuple[NDArray, NDArray]:
    """Pairs of adjacent pixels; diagonal ones only where nothing else joins them."""
    y, x = (points - points.min(0) + 1).T
    index = np.full((y.max() + 2, x.max() + 2), -1)
    index[y, x] = own = np.arange(len(points))
    right, below = index[y, x + 1], index[y + 1, x]
    slant = [
        np.where((below < 0) & (index[y, x + step] < 0), index[y + 1, x + step], -1) for step in (1, -1)
    ]  # fmt: skip
    others = (right, below, *slant)
    return np.concatenate([own[o >= 0] for o in others]), np.concatenate([o[o >= 0] for o in others])


def _fill(pairs: Pairs, i: NDArray, j: NDArray, gap: float) -> Pairs:
    """Insert points evenly between the pairs i and j where they are farther apart than ``gap`` px at either end.

    A pair moves on a line (before it is turned), so points that close the gap at both ends close it between.
    """
    step = [np.linalg.norm(side[j] - side[i], axis=1) for side in (pairs.first, pairs.second)]
    length = np.sqrt(max(pairs.areas)) * np.maximum(*step)
    far = length > gap + 1e-6
    if not far.any():
        return pairs
    i, j, more = i[far], j[far], np.ceil(length[far] - 1e-6).astype(int) - 1
    link = np.repeat(np.arange(len(i)), more)
    rank = np.arange(len(link)) - np.repeat(np.cumsum(more) - more, more)
    share = ((rank + 1) / (more[link] + 1))[:, None]
    first, second = (
        np.concatenate([side, (1 - share) * side[i[link]] + share * side[j[link]]])
        for side in (pairs.first, pairs.second)
    )
    return pairs._replace(first=first, second=second)


def positions(pairs: Pairs, alphas: NDArray) -> NDArray[np.float32]:
    """Where all points are at each weight: rows and columns in px, (2, frames, n).

    The area goes linearly from one mask's to the other's. Interpolating two stretches entry by entry inflates what lies
    between them (a bar becomes a disc by way of a fat oval); its determinant takes that back.
    """
    between = (1 - alphas)[:, None, None] * np.eye(2) + alphas[:, None, None] * pairs.stretch
    ends = np.clip(np.linalg.det(pairs.stretch), 0.25, 4) ** alphas
    inflated = np.clip(np.linalg.det(between), 0.25, 4) / ends
    area = (1 - alphas) * pairs.areas[0] + alphas * pairs.areas[1]
    size = np.sqrt(area * np.clip(1 / inflated, 0.25, 1))
    turn = alphas * pairs.turn
    along, across, weight = (v[:, None].astype(np.float32) for v in (size * np.cos(turn), size * np.sin(turn), alphas))
    ends = zip(pairs.first.T.astype(np.float32), pairs.second.T.astype(np.float32))
    y, x = (start + weight * (end - start) for start, end in ends)
    centre = (pairs.centres[0] + alphas[:, None] * (pairs.centres[1] - pairs.centres[0])).astype(np.float32)
    return np.stack([y * along - x * across + centre[:, :1], y * across + x * along + centre[:, 1:]])


def draw(points: NDArray, frames: NDArray[np.bool_]) -> None:
    """Set the pixels at points (2, frames, n) in frames (frames, H, W).

    A pixel with three of its four neighbours set is set too: turning a grid leaves such holes. What would lie across
    the border is moved back inside; what is larger than the frame is cut.
    """
    limit = np.array(frames.shape[1:])
    points = np.rint(points).astype(np.int32)
    low, high = points.min(2).T, points.max(2).T
    for frame, y, x, lo, hi in zip(frames, *points, low, high):
        rows, columns = hi - lo + 3
        canvas = np.zeros((rows, columns), np.uint8)
        canvas.ravel()[(y - (lo[0] - 1)) * columns + (x - (lo[1] - 1))] = 1
        around = canvas[:-2, 1:-1] + canvas[2:, 1:-1] + canvas[1:-1, :-2] + canvas[1:-1, 2:]
        drawn = (canvas[1:-1, 1:-1] > 0) | (around >= 3)
        corner = np.where(hi - lo >= limit, lo, np.clip(lo, 0, np.maximum(0, limit - 1 - (hi - lo))))
        start = np.maximum(corner, 0)
        stop = np.minimum(corner + drawn.shape, limit)
        cut = tuple(slice(a - c, b - c) for a, b, c in zip(start, stop, corner))
        frame[tuple(slice(a, b) for a, b in zip(start, stop))] |= drawn[cut]
