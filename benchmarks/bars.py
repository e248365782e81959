"""Collect the bars of all benchmarks from their results into one table.

python benchmarks/bars.py [--out benchmarks/results]

Prints the table and writes it to bars.md. `make bench` measures everything, and ends with it. A bar without a
measurement is of a run that left its rows out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from widefield import report
from widefield.benchmarks import Bar

RESULTS = Path(__file__).parent / "results"


def rows_of(folder: Path) -> list[dict[str, str]]:
    """Return a row for each bar of the results in a folder, those of earlier versions left out."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        if path.stem.endswith("_before"):
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        for entry in result.get("summary", ()):
            fields = {key: value for key, value in entry.items() if key != "verdict"}
            rows.append({"results": path.stem, **Bar(**fields).formatted(), "date": result["environment"]["date"]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder with results")
    args = parser.parse_args()
    rows = rows_of(args.out)
    missed = sum(row["verdict"] == "not met" for row in rows)
    print(report.markdown(rows))
    print(f"{len(rows)} bars, {missed} not met.")
    (args.out / "bars.md").write_text(report.markdown(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
