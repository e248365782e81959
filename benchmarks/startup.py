"""Measure how long `import widefield` and the light commands take: CPU time of child processes.

python benchmarks/startup.py [--before CHECKOUT] [--repeats 5] [--out benchmarks/results]

CPU time, user and system, is what other programs disturb least. The first run of each is not counted: it compiles the
modules, as the installation of a package does. `--before` measures another checkout in turns with this one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from widefield import report
from widefield.benchmarks.record import bar, publish

HERE = Path(__file__).parents[1]

IMPORTS = "import time, timm; start = time.process_time(); import widefield; print(time.process_time() - start)"
COMMAND = "import sys, widefield_cli; sys.exit(widefield_cli.main())"
CASES: dict[str, tuple[list[str], float]] = {
    "import widefield, after timm": ([IMPORTS], 0.05),
    "widefield --help": ([COMMAND, "--help"], 0.3),
    "widefield train --help": ([COMMAND, "train", "--help"], 0.5),
    "widefield models": ([COMMAND, "models"], 3.0),
    "widefield recipes": ([COMMAND, "recipes"], 1.5),
    "widefield runs": ([COMMAND, "runs"], 0.5),
    "widefield train, a wrong name": ([COMMAND, "train", "digits_mrf"], 0.5),
}
"""What is measured -> the words of `python -c`, and the limit in seconds."""


def seconds(case: str, checkout: Path, folder: str) -> float:
    """Return the CPU time of a case: what it prints, or else that of its whole process."""
    words = CASES[case][0]
    settings = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    settings |= {"PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1"}
    before = os.times()
    process = subprocess.run([sys.executable, "-c", *words], env=settings, cwd=folder, capture_output=True, text=True)
    after = os.times()
    if process.returncode not in (0, 1) or "Traceback" in process.stderr:
        raise RuntimeError(f"{case} fails in {checkout}: {process.stderr}")
    if words[0] == IMPORTS:
        return float(process.stdout)
    return after.children_user + after.children_system - before.children_user - before.children_system


def fill(folder: str) -> None:
    """Write twenty runs into a folder, each with the log of ten epochs."""
    for number in range(20):
        run = Path(folder, "runs", f"run_{number}")
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(f"base: digits_morf\nname: {run.name}\nepochs: 10\n")
        entries = [
            {"kind": "epoch", "step": 9 * i + 9, "epoch": i, "seconds": 3.0, "train_loss": 1.0, "top1": 0.5}
            for i in range(10)
        ]
        (run / "metrics.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))


def commit(checkout: Path) -> str:
    """Return the commit of a checkout."""
    words = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout to compare with")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    checkouts = {"before": args.before.resolve()} if args.before else {}
    checkouts["now"] = HERE
    results: dict[str, dict[str, list[float]]] = {}
    rows, bars = [], []
    with tempfile.TemporaryDirectory() as folder:
        fill(folder)
        for case, (_, limit) in CASES.items():
            times: dict[str, list[float]] = {label: [] for label in checkouts}
            for repeat in range(args.repeats + 1):
                for label, checkout in checkouts.items():
                    if label == "before" and times[label] and times[label][0] > 10:
                        continue  # half a minute of building networks needs no second look
                    spent = seconds(case, checkout, folder)
                    if repeat or spent > 10:
                        times[label].append(spent)
            results[case] = times
            found = {label: statistics.median(values) for label, values in times.items()}
            rows.append({"": case, **{f"{label}, s": f"{value:.3f}" for label, value in found.items()}})
            rows[-1]["limit, s"] = f"{limit:g}"
            print(" | ".join(rows[-1].values()), flush=True)
            bars.append(bar(case, [{"label": "", **found}], lambda row: float(row["now"]), at_most=limit))
    old = f" --before CHECKOUT-OF-{commit(args.before)}" if args.before else ""
    publish(
        args.out / "startup_cpu",
        f"python benchmarks/startup.py{old} --repeats {args.repeats}",
        {"seconds": results},
        f"CPU seconds of one process, medians.\n\n{report.markdown(rows)}",
        bars=bars,
    )


if __name__ == "__main__":
    main()
