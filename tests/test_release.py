"""The release script, in a clone."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from scripts import load_script

ROOT = Path(__file__).parents[1]
URL = "https://example.org/widefield"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("tools/release.py")


def test_links_become_absolute(script: ModuleType) -> None:
    text = "[a](docs/a.md#b) ![c](docs/c.png) [d](https://d.org) [e](#e) [`f`](f.py)"
    assert script.absolute(text, URL, "v1") == (
        f"[a]({URL}/blob/v1/docs/a.md#b) ![c]({URL}/raw/v1/docs/c.png) [d](https://d.org) [e](#e) "
        f"[`f`]({URL}/blob/v1/f.py)"
    )
    readme = script.absolute((ROOT / "README.md").read_text(), URL, "v1")
    assert "](docs/" not in readme


def test_changes_move_under_the_version(script: ModuleType) -> None:
    before = "# Changelog\n\n## [Unreleased]\n\n### Added\n\n- A.\n\n## [0.1.0] - 2020-01-01\n\n- B.\n"
    after, section = script.released(before, "0.2.0", datetime.date(2026, 1, 2))
    assert section == "### Added\n\n- A."
    assert after == before.replace("## [Unreleased]\n", "## [Unreleased]\n\n## [0.2.0] - 2026-01-02\n")
    with pytest.raises(SystemExit, match="nothing to release"):
        script.released(after, "0.3.0", datetime.date(2026, 1, 2))
    with pytest.raises(SystemExit, match=r"a section for 0.1.0 already"):
        script.released(before, "0.1.0", datetime.date(2026, 1, 2))


@pytest.mark.slow
def test_a_release_of_a_clone(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    (clone / "tools").mkdir(exist_ok=True)
    (clone / "tools" / "release.py").write_bytes((ROOT / "tools" / "release.py").read_bytes())
    names = {f"GIT_{role}_{key}": "x@example.org" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
    environment = {**os.environ, **names}

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, cwd=clone, env=environment, capture_output=True, text=True, check=False)

    call("git", "add", "--all")
    call("git", "commit", "--message", "release script")
    script = (sys.executable, "tools/release.py")
    (clone / "new.txt").touch()
    assert "uncommitted changes" in call(*script, "99.0.0", "--url", URL).stderr
    (clone / "new.txt").unlink()
    assert "is older" in call(*script, "0.0.1", "--url", URL).stderr
    dry = call(*script, "99.0.0", "--url", URL, "--dry-run")
    assert dry.stdout.startswith("### ")
    assert call("git", "status", "--porcelain").stdout == ""
    done = call(*script, "99.0.0", "--url", URL)
    assert done.returncode == 0, done.stderr
    assert call("git", "describe").stdout.strip() == "v99.0.0"
    assert "### Added" in call("git", "tag", "--list", "--format", "%(contents)", "v99.0.0").stdout
    with zipfile.ZipFile(clone / "dist" / "widefield-99.0.0-py3-none-any.whl") as wheel:
        metadata = wheel.read("widefield-99.0.0.dist-info/METADATA").decode()
    assert f"{URL}/blob/v99.0.0/docs/fit.md" in metadata
    assert f"Project-URL: Repository, {URL}" in metadata
