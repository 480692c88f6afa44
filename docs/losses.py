"""Make the table of losses and the entries of the reference from fastdiv itself.

A public function whose first argument is ``input`` is a loss.  Its row of the table is the first
line and the first formula of its docstring, so that a new loss appears by itself.
"""

from __future__ import annotations

import inspect
import re

import fastdiv
from fastdiv import reference

KINDS = {
    "labels": "Labels, or logits alone",
    "teacher": "A teacher",
    "linear": "A linear layer",
}


def parameters(name: str) -> list[str]:
    """Return the names of the arguments of a public function."""
    return list(inspect.signature(getattr(fastdiv, name)).parameters)


def kind(name: str) -> str:
    """Return what a loss compares with, one of ``KINDS``."""
    if name.startswith("linear_"):
        return "linear"
    return "teacher" if {"target_type", "values_type"} & set(parameters(name)) else "labels"


def losses(of_kind: str | None = None) -> list[str]:
    """Return the public losses: cross entropy, then divergences in the reference's order."""
    first = ["cross_entropy", *reference.DIVERGENCES]

    def place(name: str) -> tuple[int, str]:
        plain = name.removeprefix("linear_")
        return (first.index(plain) if plain in first else len(first)), plain

    functions = (n for n in fastdiv.__all__ if inspect.isfunction(getattr(fastdiv, n)))
    found = [n for n in functions if parameters(n)[:1] == ["input"]]
    return sorted((n for n in found if of_kind in (None, kind(n))), key=place)


def summary(name: str) -> str:
    """Return the first line of a docstring."""
    return (inspect.getdoc(getattr(fastdiv, name)) or "").split("\n\n")[0].replace("\n", " ")


def formulas(name: str) -> list[str]:
    """Return the parts of the first formula of a docstring, without the definition of q."""
    text = inspect.getdoc(getattr(fastdiv, name)) or ""
    found = re.search(r"^\.\. math::(.*?)(?:\n\s*\n|\Z)", text, flags=re.M | re.S)
    one_line = " ".join(found[1].split()) if found else ""
    parts = [part.strip(" ,.") for part in one_line.split(r"\qquad")]
    return [part for part in parts if part and not part.startswith(r"q = \mathrm{softmax}")]


def table() -> str:
    """Return the table of all losses as reStructuredText."""
    lines = [".. list-table::", "   :header-rows: 1", ""]
    lines += ["   * - function", "     - value of a row"]
    for of_kind, title in KINDS.items():
        lines += [f"   * - **{title}**", "     -"]
        for name in losses(of_kind):
            math = ", ".join(f":math:`{part}`" for part in formulas(name))
            lines += [f"   * - :func:`~fastdiv.{name}`", f"     - {summary(name)}"]
            lines += ["", f"       {math}"] if math else []
    return "\n".join(lines)


def entries(of_kind: str) -> str:
    """Return the directives that document the losses of a kind."""
    names = (f".. autofunction:: {name}" for name in losses(of_kind))
    return "\n".join([".. currentmodule:: fastdiv", *names])
