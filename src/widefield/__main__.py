"""``python -m widefield`` is ``widefield``."""

from widefield.cli import main

raise SystemExit(main())
