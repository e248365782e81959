"""Count the parameters and multiply-accumulates of every network of widefield, for `widefield models`.

python benchmarks/model_counts.py

It writes `src/widefield/models/counts.json`, which the command reads. Run it after a network changed, or what
is stated about it.
"""

from __future__ import annotations

import json

from widefield.cli.models import COUNTS, our_names, row


def main() -> None:
    rows = (f"{json.dumps(name)}: {json.dumps(row(name))}" for name in our_names())
    COUNTS.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
