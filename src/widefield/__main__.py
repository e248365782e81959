"""Run the command line: ``python -m widefield`` is the same as ``widefield``."""

from widefield.cli import main

raise SystemExit(main())
