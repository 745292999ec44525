"""Corner pooling: Law and Deng, CornerNet, 2018, arXiv:1808.01244, section 3.4 (equations 6 and 7).

Often there is nothing to be seen at the corner of a box. So each cell of a top-left corner looks to the right along its
row for the object's topmost boundary, and down along its column for the leftmost one; a bottom-right corner looks the
other ways. What it sees is the largest value on the way, for all cells at once a running maximum. The gradient goes to
where the maximum stands, of equal values to the one farthest along the way that is run.

Letters: B images, C channels, H and W rows and columns.
"""

from __future__ import annotations

from torch import Tensor


def running_max(maps: Tensor, dim: int, *, reverse: bool) -> Tensor:
    """Return the largest value from one end of a dimension up to each place, of the same shape.

    Args:
        maps: any shape, floating point.
        dim: along which the maximum runs.
        reverse: from the last place to the first, so that every place sees what comes after it.
    """
    if not reverse:
        return maps.cummax(dim).values
    return maps.flip(dim).cummax(dim).values.flip(dim)


def top_left_pool(down: Tensor, right: Tensor) -> Tensor:
    """Return the sum of what each cell sees below it in one map and to its right in another.

    Args:
        down: ``(B, C, H, W)``, looked at along columns (f_t of the paper).
        right: ``(B, C, H, W)``, looked at along rows (f_l of the paper).

    Returns:
        ``(B, C, H, W)``.
    """
    return running_max(down, -2, reverse=True) + running_max(right, -1, reverse=True)


def bottom_right_pool(up: Tensor, left: Tensor) -> Tensor:
    """Return the sum of what each cell sees above it in one map and to its left in another.

    Args:
        up: ``(B, C, H, W)``, looked at along columns.
        left: ``(B, C, H, W)``, looked at along rows.

    Returns:
        ``(B, C, H, W)``.
    """
    return running_max(up, -2, reverse=False) + running_max(left, -1, reverse=False)
