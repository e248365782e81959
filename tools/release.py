"""Make a release: the version, its section of the changelog, a tag, and checked archives in dist.

python tools/release.py VERSION --url URL [--dry-run]

URL is where people read the repository, such as https://github.com/NAME/widefield: links of the README become
absolute, and the package's page links there. Nothing is pushed or uploaded; the script ends with the commands to do
so.
"""

from __future__ import annotations

import argparse
import datetime
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.version import InvalidVersion, Version

PICTURES = (".png", ".svg", ".jpg")


def git(root: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def bumped(source: str, version: str) -> str:
    """Return the package's ``__init__`` with another version."""
    text, count = re.subn(r'^__version__ = "[^"]*"$', f'__version__ = "{version}"', source, flags=re.MULTILINE)
    if count != 1:
        raise SystemExit("src/widefield/__init__.py must hold one line with __version__.")
    return text


def current(source: str) -> str:
    """Return the version that the package's ``__init__`` states."""
    found = re.search(r'^__version__ = "([^"]*)"$', source, re.MULTILINE)
    if found is None:
        raise SystemExit("src/widefield/__init__.py holds no line with __version__.")
    return found[1]


def released(changelog: str, version: str, day: datetime.date) -> tuple[str, str]:
    """Return the changelog with the unreleased changes under a version, and the text of that section."""
    head, mark, rest = changelog.partition("## [Unreleased]\n")
    section, later, older = rest.partition("\n## [")
    if not mark or not section.strip():
        raise SystemExit("CHANGELOG.md has no changes under ## [Unreleased]: there is nothing to release.")
    if f"## [{version}]" in changelog:
        raise SystemExit(f"CHANGELOG.md has a section for {version} already.")
    return f"{head}{mark}\n## [{version}] - {day}\n{section}{later}{older}", section.strip()


def absolute(readme: str, url: str, tag: str) -> str:
    """Return the README with absolute links, which also work on the package's page."""

    def link(match: re.Match[str]) -> str:
        target = match[2]
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        kind = "raw" if target.partition("#")[0].endswith(PICTURES) else "blob"
        return f"{match[1]}({url}/{kind}/{tag}/{target})"

    return re.sub(r"(\[[^\]]*\])\(([^)\s]+)\)", link, readme)


def with_urls(project: str, url: str) -> str:
    """Return pyproject.toml with the project's URLs."""
    lines = (
        f'[project.urls]\nRepository = "{url}"\nIssues = "{url}/issues"\nChangelog = "{url}/blob/main/CHANGELOG.md"\n'
    )
    return project.replace("[project.scripts]\n", f"{lines}\n[project.scripts]\n", 1)


def build(root: Path, url: str, tag: str) -> list[Path]:
    """Build and check the archives of a tag; return them."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        git(root, "clone", "--quiet", "--branch", tag, str(root), str(source))
        for name, change in (
            ("README.md", lambda text: absolute(text, url, tag)),
            ("pyproject.toml", lambda text: with_urls(text, url)),
        ):
            file = source / name
            file.write_text(change(file.read_text()))
        dist = Path(folder) / "dist"
        subprocess.run([sys.executable, "-m", "build", "--outdir", str(dist), str(source)], check=True)
        subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *map(str, dist.iterdir())], check=True)
        (root / "dist").mkdir(exist_ok=True)
        return [Path(shutil.copy2(file, root / "dist")) for file in sorted(dist.iterdir())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version")
    parser.add_argument("--url", required=True)
    parser.add_argument("--dry-run", action="store_true", help="check everything and print the section; change nothing")
    args = parser.parse_args()
    root = Path(__file__).parents[1]
    init, changelog = root / "src/widefield/__init__.py", root / "CHANGELOG.md"
    before = current(init.read_text())
    try:
        if Version(args.version) < Version(before):
            raise SystemExit(f"the version is {before} already; {args.version} is older.")
    except InvalidVersion as error:
        raise SystemExit(f"{error}: give a version such as 0.2.0.") from None
    tag = f"v{args.version}"
    if git(root, "status", "--porcelain"):
        raise SystemExit("there are uncommitted changes: commit them first.")
    if git(root, "tag", "--list", tag):
        raise SystemExit(f"there is a tag {tag} already.")
    text, section = released(changelog.read_text(), args.version, datetime.date.today())
    print(section)
    if args.dry_run:
        return
    init.write_text(bumped(init.read_text(), args.version))
    changelog.write_text(text)
    git(root, "commit", "--all", "--message", f"Release {args.version}")
    git(root, "tag", "--annotate", tag, "--cleanup", "verbatim", "--message", f"widefield {args.version}\n\n{section}")
    files = build(root, args.url.rstrip("/"), tag)
    print(f"\nNow: git push origin HEAD {tag}\n     {sys.executable} -m twine upload {' '.join(map(str, files))}")


if __name__ == "__main__":
    main()
