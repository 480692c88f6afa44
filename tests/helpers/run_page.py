"""Runs the Python blocks of a Markdown page, from top to bottom in one namespace.

    python tests/helpers/run_page.py docs/index.md

A block of prompts (>>>) must print what the page says it prints.  In front of a block that cannot
run stands <!-- skip: next -->.
"""

from __future__ import annotations

import doctest
import sys
from pathlib import Path


def run_page(page: Path) -> None:
    # Here, since pytest imports this file for its doctests where sybil may be missing.
    from sybil.document import Document
    from sybil.evaluators.doctest import NUMBER
    from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS | NUMBER
    blocks = PythonCodeBlockParser(doctest_optionflags=flags)
    for example in list(Document.parse(str(page), blocks, SkipParser())):
        example.evaluate()


if __name__ == "__main__":
    run_page(Path(sys.argv[1]))
