"""Read the package's docstrings as MkDocs wants them: formulas, and names of sections."""

import re
from typing import Any

import griffe

BLOCK = re.compile(r"^( *)\.\. math:: *(.*(?:\n(?:\1 +\S.*))*)", re.MULTILINE)
INLINE = re.compile(r":math:`([^`]*)`")
# "Example:" is an admonition to griffe, whose prompts would not be code.
SECTIONS = {"Example:": "Examples:"}


def markdown(docstring: str) -> str:
    r"""Return a docstring with its formulas between dollars.

    >>> markdown("For :math:`x^2`.")
    'For $x^2$.'
    """

    def block(match: re.Match[str]) -> str:
        indent, formula = match[1], " ".join(match[2].split())
        return f"{indent}$$\n{indent}{formula}\n{indent}$$"

    def inline(match: re.Match[str]) -> str:
        return f"${' '.join(match[1].split())}$"

    text = INLINE.sub(inline, BLOCK.sub(block, docstring))
    return "\n".join(SECTIONS.get(line, line) for line in text.splitlines())


class Docstrings(griffe.Extension):
    """Rewrite every docstring when it is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
