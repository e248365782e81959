"""Define the GPU kernels in Triton's language, which type checkers cannot check."""
