"""The kernels themselves: Triton's language in Python's syntax, which type checkers cannot follow."""
