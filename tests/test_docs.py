"""What the pages say runs, what they link to exists, and what is public is on one of them."""

from __future__ import annotations

import inspect
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import fastdiv
from helpers.checkout import ROOT

DOCS = ROOT / "docs"
if not DOCS.is_dir():
    pytest.skip("the pages are in the checkout only", allow_module_level=True)
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("[!_]*/**/*.md"))]
# Those that patch torch or another library get a process of their own, and may want for a package.
PATCHING = [page for page in PAGES if page.name == "README.md" or "integrations" in page.parts]
OPTIONAL = {"transformers", "trl", "peft"}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def text_of(page: Path) -> str:
    """Without code, in which brackets are no links."""
    return re.sub(r"^ *```.*?^ *```|`[^`\n]*`", "", page.read_text(), flags=re.M | re.S)


def anchor(heading: str) -> str:
    """As GitHub and Sphinx make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def navigation() -> list[Path]:
    """The pages in the order of the index's toctrees."""
    trees = re.findall(r"```\{toctree\}\n(.*?)```", (DOCS / "index.md").read_text(), flags=re.S)
    lines = [line for tree in trees for line in tree.splitlines()]
    return [DOCS / f"{line}.md" for line in lines if line and not line.startswith(":")]


@pytest.mark.cpu_only("tensors print their device")
@each_page
def test_blocks_run(page: Path) -> None:
    pytest.importorskip("sybil")
    if page not in PATCHING:
        from helpers.run_page import run_page

        run_page(page)
        return
    command = [sys.executable, str(ROOT / "tests/helpers/run_page.py"), str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    missing = re.search(r"ModuleNotFoundError: No module named '(\w+)", done.stderr)
    if missing and missing[1] in OPTIONAL:
        pytest.skip(f"{missing[1]} is not installed")
    assert done.returncode == 0, done.stdout + done.stderr


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        path, _, fragment = link.partition("#")
        if path.startswith(("http:", "https:", "mailto:")) or fragment.startswith("fastdiv."):
            continue  # names in the reference are checked by `make docs`
        target = page.parent / path if path else page
        assert target.exists(), link
        if fragment:
            headings = re.findall(r"^#+ (.*)$", text_of(target), flags=re.M)
            assert fragment in map(anchor, headings), link


def test_every_page_is_in_the_navigation() -> None:
    listed = navigation()
    assert len(listed) == len(set(listed))
    assert set(PAGES[1:]) <= {*listed, DOCS / "index.md"}


def test_the_reference_has_every_public_name() -> None:
    reference = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    whole = set(re.findall(r"automodule:: fastdiv\.(\w+)", reference))
    single = set(re.findall(r"auto(?:function|class):: (\w+)", reference))
    for name in fastdiv.__all__:
        is_module = inspect.ismodule(getattr(fastdiv, name))
        assert name in (whole if is_module else single), name


def test_pictures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runpy.run_path(str(DOCS / "pictures.py"))["main"](tmp_path)
    drawn, kept = ({file.name for file in d.iterdir()} for d in (tmp_path, DOCS / "pictures"))
    assert drawn == kept
