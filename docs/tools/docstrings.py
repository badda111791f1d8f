"""Read the package's docstrings as MkDocs wants them: formulas, and names of sections."""

import re
from typing import Any

import griffe

BLOCK = re.compile(r"^( *)\.\. math:: *(.*(?:\n(?:\1 +\S.*))*)", re.MULTILINE)
INLINE = re.compile(r":math:`([^`]*)`")
# A public name becomes a link to its page.
NAME = re.compile(r"`(jaxent\.(?:porting\.)?\w+)`")
# Names of several arguments that go on in the next line.
NAMES = re.compile(r"^(  \w[\w, ]*,)\n +(?=\w)", re.MULTILINE)
# "Example:" is an admonition to griffe, whose prompts would not be code.
SECTIONS = {"Example:": "Examples:"}


def markdown(docstring: str) -> str:
    """Return a docstring with its formulas between dollars, and links to public names."""

    def block(match: re.Match[str]) -> str:
        indent, formula = match[1], " ".join(match[2].split())
        return f"{indent}$$\n{indent}{formula}\n{indent}$$"

    def inline(match: re.Match[str]) -> str:
        return f"${' '.join(match[1].split())}$"

    text = INLINE.sub(inline, BLOCK.sub(block, docstring))
    while NAMES.search(text):
        text = NAMES.sub(r"\1 ", text)
    text = NAME.sub(r"[`\1`][\1]", text)
    return "\n".join(SECTIONS.get(line, line) for line in text.splitlines())


class Docstrings(griffe.Extension):
    """Rewrite every docstring when it is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object."""
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
