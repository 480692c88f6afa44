"""Runs the Python blocks of a Markdown page, from top to bottom in one namespace.

    python tests/run_page.py docs/index.md

A block of prompts (>>>) must print what the page says it prints.  In front of a block that cannot
run stands <!-- skip: next -->.
"""

from __future__ import annotations

import doctest
import sys
from pathlib import Path

from sybil.document import Document
from sybil.evaluators.doctest import NUMBER
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS | NUMBER


def run_page(page: Path) -> int:
    """How many blocks, or prompts, there were."""
    parsers = (PythonCodeBlockParser(doctest_optionflags=FLAGS), SkipParser())
    examples = list(Document.parse(str(page), *parsers))
    for example in examples:
        example.evaluate()
    return len(examples)


if __name__ == "__main__":
    run_page(Path(sys.argv[1]))
