"""Run every verb of widefield on the smallest model of every family of timm and torchvision.

    python tests/zoo/sweep.py                      # everything without a result yet
    python tests/zoo/sweep.py "timm:res*"          # some of these
    python tests/zoo/sweep.py timm:resnet50        # any model
    python tests/zoo/sweep.py --again failed       # repeat what failed, or exceeded its time or memory
    python tests/zoo/sweep.py --table              # run nothing, print the table

Each model runs in its own process with limits on time and memory, so one crash does not stop the sweep. Results are
appended to results.jsonl, one line per model, so the sweep can be interrupted and started again.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import platform
import re
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
STATUSES = ("pass", "refused", "caught", "failed", "timeout", "memory")
BAD = ("failed", "timeout", "memory")

Row = dict[str, Any]
"""A line of results.jsonl: "model", "commit", "date", "machine", "seconds", "checks"."""

Reason = tuple[str, str, str]
"""Verb, status, and the first clause of the message."""


def main(words: Sequence[str] | None = None) -> int:
    """Run the requested models; return 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models",
        nargs="*",
        default=["*"],
        help="names such as timm:resnet18, or globs over the smallest of each family",
    )
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl", help="file to append to")
    parser.add_argument("--again", choices=("failed", "all"), help="repeat models that have results")
    parser.add_argument("--jobs", type=int, default=2, help="number of processes, each with one thread")
    parser.add_argument("--seconds", type=float, default=600, help="time limit per model")
    parser.add_argument("--gib", type=float, default=10, help="memory limit per model")
    parser.add_argument("--skip", nargs="+", default=[], metavar="VERB", help="verbs to skip, such as quantize")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table of results")
    asked = parser.parse_args(words)
    rows = read(asked.results)
    if not asked.table:
        names = _names(asked.models)
        todo = [name for name in names if name not in rows or _is_due(rows[name], asked.again)]
        print(f"{len(names)} models, {len(todo)} to run", file=sys.stderr)
        rows |= _run(todo, asked)
    shown = [row for name, row in rows.items() if any(fnmatch.fnmatchcase(name, glob) for glob in asked.models)]
    print(table(shown))
    return int(any(check["status"] in BAD for row in shown for check in row["checks"]))


def read(path: Path) -> dict[str, Row]:
    """Return model -> its last row."""
    if not path.exists():
        return {}
    return {row["model"]: row for row in map(json.loads, path.read_text().splitlines())}


def _names(globs: Sequence[str]) -> list[str]:
    """Return the requested models; names without wildcards are used as they are.

    Finding the smallest model of each family takes minutes and memory, so it runs in its own process.
    """
    if not any(set("*?[") & set(glob) for glob in globs):
        return list(globs)
    listed = subprocess.run([sys.executable, "-W", "ignore", HERE / "subjects.py"], capture_output=True, text=True)
    if listed.returncode:
        raise RuntimeError(listed.stderr)
    return [name for name in listed.stdout.split() if any(fnmatch.fnmatchcase(name, glob) for glob in globs)]


def _is_due(row: Row, again: str | None) -> bool:
    return again == "all" or (again == "failed" and any(check["status"] in BAD for check in row["checks"]))


def _run(names: Sequence[str], asked: argparse.Namespace) -> dict[str, Row]:
    done: dict[str, Row] = {}
    writing = threading.Lock()

    def one(name: str) -> None:
        row = measure(name, asked.seconds, asked.gib, asked.skip)
        with writing:
            done[name] = row
            with asked.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            counts = Counter(check["status"] for check in row["checks"])
            told = ", ".join(f"{count} {status}" for status, count in counts.items())
            print(f"[{len(done)}/{len(names)}] {name}: {told} ({row['seconds']:.0f} s)", file=sys.stderr)

    with ThreadPoolExecutor(asked.jobs) as pool:
        list(pool.map(one, names))
    return done


def measure(name: str, seconds: float, gib: float, skip: Sequence[str] = ()) -> Row:
    """Run the checks on one model in a process that is killed if it exceeds its time or memory."""
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", HERE / "checks.py", name, *skip],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    ended: list[str] = []
    watcher = threading.Thread(target=_watch, args=(process, start + seconds, gib * 2**30, ended))
    watcher.start()
    said, complained = process.communicate()
    watcher.join()
    checks = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    if process.returncode:
        status = ended[0] if ended else "failed"
        last = (complained.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
        after = checks[-1]["verb"] if checks else "the start"
        checks.append({"verb": f"after {after}", "status": status, "detail": "" if ended else last[:400]})
    return {
        "model": name,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "seconds": round(time.monotonic() - start, 1),
        "checks": checks,
    }


def _watch(process: subprocess.Popen[str], deadline: float, memory: float, ended: list[str]) -> None:
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            used = watched.memory_info().rss
        except psutil.NoSuchProcess:
            return
        if time.monotonic() > deadline or used > memory:
            ended.append("memory" if used > memory else "timeout")
            process.kill()
            return
        time.sleep(0.2)


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return found.stdout.strip()


def table(rows: Iterable[Row]) -> str:
    """Return Markdown: counts per verb, refusals by reason, and every failure."""
    rows = sorted(rows, key=lambda row: row["model"])
    verbs: dict[str, Counter[str]] = defaultdict(Counter)
    refusals: dict[Reason, list[str]] = defaultdict(list)
    failures: list[str] = []
    for row in rows:
        for check in row["checks"]:
            verb = check["verb"] if not check["verb"].startswith("after ") else "(ended early)"
            verbs[verb][check["status"]] += 1
            if check["status"] in ("refused", "caught"):
                refusals[verb, check["status"], _kind(check["detail"])].append(row["model"])
            elif check["status"] in BAD:
                failures.append(f"| {row['model']} | {check['verb']} | {check['status']}: {_cell(check['detail'])} |")
    lines = [f"{len(rows)} models, {sum(row['seconds'] for row in rows) / 60:.0f} minutes of one core.", ""]
    lines += [f"| verb | {' | '.join(STATUSES)} |", f"| --- |{' ---: |' * len(STATUSES)}"]
    lines += [f"| {verb} | {' | '.join(str(c[s] or '') for s in STATUSES)} |" for verb, c in verbs.items()]
    lines += ["", "| verb | | reason | models |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {verb} | {how} | {_cell(kind)} | {_some(names)} |" for (verb, how, kind), names in _by_count(refusals)
    ]
    lines += ["", "| failed | verb | what happened |", "| --- | --- | --- |", *failures]
    return "\n".join(lines)


def _by_count(groups: Mapping[Reason, list[str]]) -> list[tuple[Reason, list[str]]]:
    order = {verb: index for index, verb in enumerate(dict.fromkeys(verb for verb, _, _ in groups))}
    return sorted(groups.items(), key=lambda item: (order[item[0][0]], -len(item[1])))


def _kind(detail: str) -> str:
    """Return the first clause of a refusal without names, sizes and numbers of the model."""
    text = detail.split(": ", 1)[-1]
    while text != (text := re.sub(r"\([^()]*\)", "", text)):
        continue  # removes parentheses from the inside out
    text = re.sub(r"\([^()]*$", "", text).split(": ")[0]
    quoted, dotted, classes = r"'[^']*'", r"\b[A-Za-z_]\w*(\.\w+)+\b", r"^[A-Z]\w+|(?<=\bof )[A-Z]\w+"
    return re.sub(r"\d[\d.,x]*", "#", re.sub(f"{quoted}|{dotted}|{classes}", "…", text))[:150].strip()


def _cell(text: str) -> str:
    return re.sub(r"([|\\[\]<>*_`])", r"\\\1", text[:300])


def _some(names: Sequence[str], shown: int = 4) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{len(names)}: {', '.join(names[:shown])}{more}"


if __name__ == "__main__":
    raise SystemExit(main())
