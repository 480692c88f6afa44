"""The checkout that the tests belong to: its root, and the files that git knows."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def git_files(*which: str) -> set[str]:
    """Return the files that ``git ls-files`` lists; skip the test outside of a checkout."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    command = ["git", "ls-files", *which]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in output.splitlines() if (ROOT / name).is_file()}
