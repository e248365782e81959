"""Find a patch in an image."""

from torch import Tensor, equal


def places(image: Tensor, patch: Tensor) -> list[tuple[int, int]]:
    """Return the (row, column) of all exact occurrences of a patch (C, h, w) in an image (C, H, W)."""
    height, width = patch.shape[1:]
    rows, columns = (whole - part + 1 for whole, part in zip(image.shape[1:], (height, width), strict=True))
    possible = None
    for row, column in ((0, 0), (height - 1, width - 1), (height // 2, width // 2)):  # few remain for the comparison
        there = (image[:, row : row + rows, column : column + columns] == patch[:, row, column, None, None]).all(0)
        possible = there if possible is None else possible & there
    return [(r, c) for r, c in possible.nonzero().tolist() if equal(image[:, r : r + height, c : c + width], patch)]
