"""Start the command line without the package's models: help, version and wrong usage need neither torch nor timm.

It lies outside of the package, whose import registers its models in timm.
"""

from widefield.cli import main

__all__ = ["main"]
