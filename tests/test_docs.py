"""Check the pages: their examples run, their links lead somewhere, all that is public is there."""

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
README = ROOT / "README.md"
PAGES = [README, *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("[!_]*/**/*.md"))]
# Pages for those who work on the project; nothing in them runs.
OTHERS = ["HACKING.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"]
DOCUMENTS = [*PAGES, *(ROOT / name for name in OTHERS)]
# Pages that patch torch or another library run in a process of their own, and may lack a package.
PATCHING = [page for page in PAGES if "integrations" in page.parts]
OPTIONAL = {"transformers", "trl", "peft"}
LOSSES = {
    name
    for name in fastdiv.__all__
    if inspect.isfunction(getattr(fastdiv, name))
    and name not in ("backend", "build_info", "patch_torch", "warm_gradients")
}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)
each_document = pytest.mark.parametrize("page", DOCUMENTS, ids=name_of)


def text_of(page: Path) -> str:
    """Return the text without code, whose brackets are not links."""
    return re.sub(r"^ *```.*?^ *```|`[^`\n]*`", "", page.read_text(), flags=re.M | re.S)


def anchor(heading: str) -> str:
    """Return the anchor that GitHub and Sphinx make of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def navigation() -> list[Path]:
    """Return the pages in the order of the index's toctrees."""
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


@each_document
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", text_of(page))
    links += re.findall(r'src(?:set)?="([^"]+)"', text_of(page))
    for link in links:
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


@each_document
def test_lines_end_at_100_columns(page: Path) -> None:
    """Tables, pictures and links of their own line have no other place to break."""
    lines = [line for line in page.read_text().splitlines() if len(line) > 100]
    assert [line for line in lines if not line.lstrip().startswith(("|", "![", "<"))] == []


def test_the_readme_is_short_and_begins_with_code() -> None:
    text = README.read_text()
    assert len(text.split()) <= 800
    assert text.splitlines().index("```python") < 10


def test_losses_in_the_readme_exist() -> None:
    named = re.findall(r"^\| `(\w+)` \|", README.read_text(), flags=re.M)
    assert len(named) == 3
    assert set(named) <= LOSSES


def test_the_reference_has_every_public_name() -> None:
    """docs/losses.py lists the losses for three directives; the other names are on the pages."""
    reference = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    made = runpy.run_path(str(DOCS / "losses.py"))
    whole = set(re.findall(r"automodule:: fastdiv\.(\w+)", reference))
    single = set(re.findall(r"auto(?:function|class):: (\w+)", reference))
    for kind in re.findall(r"^\.\. losses:: (\w+)", reference, flags=re.M):
        single |= set(made["losses"](kind))
    for name in fastdiv.__all__:
        is_module = inspect.ismodule(getattr(fastdiv, name))
        assert name in (whole if is_module else single), name


def test_the_table_of_losses() -> None:
    made = runpy.run_path(str(DOCS / "losses.py"))
    assert set(made["losses"]()) == LOSSES
    for name in LOSSES:
        assert f":func:`~fastdiv.{name}`" in made["table"]()
        assert made["summary"](name).endswith(".")


def test_pictures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    if not (ROOT / "benchmarks/results").is_dir():
        pytest.skip("an sdist has no measurements")
    runpy.run_path(str(DOCS / "pictures.py"))["main"](tmp_path)
    drawn, kept = ({file.name for file in d.iterdir()} for d in (tmp_path, DOCS / "pictures"))
    assert drawn == kept
