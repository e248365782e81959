"""Draw predictions of every kind: as cards of a page, panels of a figure, and image files."""
