"""The subset of given size with the smallest diameter: exactly, and much faster than by trying all subsets.

A subset of n - f rows has diameter <= r where the other f rows meet every pair that is further apart than r: where they
are a vertex cover of the graph of those pairs. Sets of rows are the bits of a Python int.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from narses.errors import InputError

Graph = list[int]  # per row, the rows further from it than r


def smallest_diameter(distances_NN: Tensor, size: int, max_nodes: int) -> list[int]:
    """The `size` rows, ascending, whose largest distance is smallest; of several such sets the lexicographically first.

    InputError if the search visits more than `max_nodes` partial subsets: at most 1.47^f for each of some 2 log2(n) + n
    decisions, and a few on data that is not made to be hard.
    """
    search = _Search(max_nodes)
    n = len(distances_NN)
    far_NN = distances_NN.cpu().numpy()
    radii = np.unique(far_NN)
    low, high = 0, len(radii) - 1
    while low < high:
        middle = (low + high) // 2
        if search.can_leave_out(_further_than(far_NN, radii[middle]), (1 << n) - 1, n - size):
            high = middle
        else:
            low = middle + 1
    far = _further_than(far_NN, radii[low])
    chosen: list[int] = []
    rest, spare = (1 << n) - 1, n - size
    for i in range(n):
        # To take row i is to leave out all rows that are too far from it.
        out = (far[i] & rest).bit_count()
        if rest >> i & 1 and out <= spare and search.can_leave_out(far, rest & ~far[i], spare - out):
            chosen.append(i)
            rest, spare = rest & ~far[i], spare - out
        elif rest >> i & 1:
            rest, spare = rest & ~(1 << i), spare - 1
        if len(chosen) == size:
            break
    return chosen


def _further_than(distances_NN: np.ndarray, r: float) -> Graph:
    return [sum(1 << int(j) for j in np.flatnonzero(row)) for row in distances_NN > r]


class _Search:
    """Vertex cover of at most k rows, by branching on the row with the most pairs; counts what it visits."""

    def __init__(self, max_nodes: int) -> None:
        self._max_nodes = max_nodes
        self._nodes = 0

    def can_leave_out(self, far: Graph, rest: int, k: int) -> bool:
        """Whether at most k of the rows in `rest` meet every pair in it."""
        pending = [(rest, k)]
        while pending:
            rest, k = pending.pop()
            self._nodes += 1
            if self._nodes > self._max_nodes:
                raise InputError(
                    f"the search for the smallest diameter passed max_nodes = {self._max_nodes}: these updates are too "
                    "many or too alike; raise max_nodes or take a rule whose cost is bounded"
                )
            most, pairs, widest, linked = 0, 0, 0, 0
            for i in _bits(rest):
                degree = (far[i] & rest).bit_count()
                if degree:
                    pairs += degree
                    linked |= 1 << i
                if degree > most:
                    most, widest = degree, i
            pairs //= 2
            if pairs > k * most:
                continue
            if most <= 2:
                if _paths_and_cycles(far, linked) <= k:
                    return True
                continue
            # Without row `widest`; or with it, and so without all that are too far from it.
            if most <= k:
                pending.append((linked & ~far[widest] & ~(1 << widest), k - most))
            pending.append((linked & ~(1 << widest), k - 1))
        return False


def _paths_and_cycles(far: Graph, rest: int) -> int:
    """The size of the least cover where no row has more than two pairs: half of each path's or cycle's pairs."""
    needed = 0
    while rest:
        component = frontier = rest & -rest
        while frontier:
            reached = 0
            for i in _bits(frontier):
                reached |= far[i]
            frontier = reached & rest & ~component
            component |= frontier
        needed += (sum((far[i] & component).bit_count() for i in _bits(component)) // 2 + 1) // 2
        rest &= ~component
    return needed


def _bits(mask: int) -> list[int]:
    positions = []
    while mask:
        lowest = mask & -mask
        positions.append(lowest.bit_length() - 1)
        mask ^= lowest
    return positions
