"""Make what the site has beside its pages: formulas in MathML, and pages made of other files.

MkDocs calls the functions `on_...`. Nothing is run or imported of jaxent: its sources are read.
"""

import ast
import functools
import html
import json
import pathlib
import posixpath
import re
import sys
import types
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(pathlib.Path(__file__).parent)]

from docstrings import markdown  # noqa: E402

from benchmarks import engine  # noqa: E402

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
LETTER = r'<m[io] mathvariant="normal">[^<]*</m[io]>'
NAME = re.compile(rf"{LETTER}(?:{LETTER}|<mn>\d+</mn>)+")
FUNCTION = re.compile(r'(?<!<msub>)(<mi>(?:log|exp|tanh)</mi>)(?!<mo stretchy="false">&#x00028;)')
PAGE = re.compile(r"\bdocs/([\w/]+\.md)")
MODULES = ("metrics", "porting", "reference")
# Pages that are files of the repository.
COPIED = {
    "index.md": "README.md",
    "examples.md": "examples/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changes.md": "CHANGELOG.md",
    "evidence/benchmarks.md": "benchmarks/README.md",
}
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
# A link that stands for code: [examples/digits.py: `Network`, `evaluate`](../../examples/digits.py)
CODE = re.compile(r"^\[(\S+\.py): (.*?)\]\(.*\)$", re.MULTILINE)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s:#]+)(#[^)]*)?\)")
TYPES = """## Types

| name | is |
| --- | --- |
| `ArrayOrList` | what `jax.numpy.asarray` takes: an array of JAX or NumPy, a number, a list |
| `TargetsLike` | an `ArrayOrList`, or `jaxent.SparseTargets` |
| `Reduction` | "mean", "sum" or "none" |
| `AxisName` | the name of a mapped axis, or a tuple of names; of a head, a `PartitionSpec`, too |
| `DotGeneral` | a function that is called as `jax.lax.dot_general` is |
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the API, of the workarounds and of the measurements."""
    pages = {f"api/{name}.md": api_page(name) for name in public_names()}
    pages |= {page: (ROOT / path).read_text() for page, path in COPIED.items()}
    pages["design/workarounds.md"] = workarounds()
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        pages[f"evidence/{path.stem}.md"] = measured(json.loads(path.read_text()))
    for src_uri, content in pages.items():
        files.append(File.generated(config, src_uri, content=content))
    return files


def linked(text: str, path: str, page: str) -> str:
    """Return the text of a file, its links as they are from a page of the site.

    In the repository, what is made for the site is linked by what it is made of. A link to what is
    no page stays a name.
    """

    def link(match: re.Match[str]) -> str:
        mark, text, target, anchor = match.groups()
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        if not (ROOT / target).exists():
            raise PluginError(f"{path} links to {target}, which does not exist")
        name = page_of(target, text.strip("`"))
        if name is None:
            return f"`{target}`"
        relative = posixpath.relpath(name, posixpath.dirname(page) or ".")
        return f"{mark}[{text}]({relative}{anchor or ''})"

    parts = FENCE.split(text)  # and code is left alone
    parts[::2] = [LINK.sub(link, part) for part in parts[::2]]
    return "".join(parts)


def page_of(target: str, text: str) -> str | None:
    """Return the page that a link to a file leads to, by its text where there are several."""
    copied = {source: name for name, source in COPIED.items()}
    if target == "docs/api/README.md" and text in public_names():
        return f"api/{text}.md"
    if target == "jaxent/_xla/__init__.py":
        return "design/workarounds.md"
    if target.startswith("benchmarks/results/"):
        return f"evidence/{posixpath.splitext(posixpath.basename(target))[0]}.md"
    if target in copied:
        return copied[target]
    if not target.startswith("docs/"):
        return None
    name = target.removeprefix("docs/")
    return name if posixpath.splitext(name)[1] else f"{name}/README.md"


def on_page_markdown(text: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make code of what stands for it, and links of the names in the list of all."""
    name = page.file.src_uri
    text = CODE.sub(lambda match: code_of(match[1], re.findall(r"`(\w+)`", match[2])), text)
    if name in COPIED or (ROOT / "docs" / name).exists():
        text = linked(text, COPIED.get(name, f"docs/{name}"), name)
    text = re.sub(r"^```python \w+$", "```python", text, flags=re.MULTILINE)
    return api_index(text) if name == "api/README.md" else text


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Render formulas, for which no script is needed, and link pages that docstrings name."""

    def link(match: re.Match[str]) -> str:
        target = files.get_file_from_path(match[1])
        if target is None:
            raise PluginError(f"{page.file.src_uri} names {match[0]}, which does not exist")
        return f'<a href="{target.url_relative_to(page.file)}">{match[0]}</a>'

    return PAGE.sub(link, FORMULA.sub(mathml, content))


def mathml(match: re.Match[str]) -> str:
    """Return a formula as MathML."""
    formula = html.unescape(match[3]).strip()
    display = "block" if match[2] == "[" else "inline"
    try:
        rendered = convert(formula, display=display)
    except Exception as error:
        raise PluginError(f"formula {formula!r} is not rendered: {error!r}") from error
    # A name of several letters is one identifier, and a function has a space behind it.
    rendered = NAME.sub(lambda name: f"<mi>{re.sub('<[^>]*>', '', name[0])}</mi>", rendered)
    return FUNCTION.sub(r'\1<mspace width="0.167em" />', rendered)


@functools.cache
def public_names() -> list[str]:
    """Return what `jaxent.__all__` has."""
    tree = ast.parse((ROOT / "jaxent" / "__init__.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    raise PluginError("jaxent/__init__.py has no __all__")


def api_page(name: str) -> str:
    """Return the page of a public name."""
    lines = ["---", f"title: {name}", "---", "", f"::: jaxent.{name}"]
    if name in MODULES:
        lines += ["    options:", "      show_root_members_full_path: true"]
        lines += ["      inherited_members: true", "      filters: ['!^_']"]
    if name == "TokenStats":  # its fields are described where they are made
        lines += ["    options:", "      show_if_no_docstring: true"]
        lines += ["", "[`token_stats`](token_stats.md) says what each is."]
    return "\n".join([*lines, ""])


def code_of(path: str, names: list[str]) -> str:
    """Return the source of functions and classes of a file, as a block of code."""
    source = (ROOT / path).read_text()
    found = {getattr(node, "name", None): node for node in ast.parse(source).body}
    if missing := {*names} - {*found}:
        raise PluginError(f"{path} has no {', '.join(sorted(missing))}")
    lines = source.splitlines()
    parts = []
    for node in (found[name] for name in names):
        first = min([node.lineno, *(x.lineno for x in node.decorator_list)])  # type: ignore[attr-defined]
        parts.append("\n".join(lines[first - 1 : node.end_lineno]))
    return "```python\n" + "\n\n\n".join(parts) + "\n```"


def api_index(text: str) -> str:
    """Return the list of all names with links to their pages, and the types."""
    missing = [name for name in public_names() if name != "TokenStats" and name not in text]
    if missing:
        raise PluginError(f"docs/api/README.md lacks {', '.join(missing)}")
    table, rest = text.split("\n\nEach has a page")
    linked = re.sub(r"`jaxent\.(\w+)[^`]*`", lambda match: f"[{match[0]}]({match[1]}.md)", table)
    return f"{linked}\n\nEach has a page{rest}\n\n{TYPES}"


def workarounds() -> str:
    """Return a page of the docstrings in `_xla/`, under those of its files."""
    folder = ROOT / "jaxent" / "_xla"
    text = ["# Workarounds", docstring_of(folder / "__init__.py")]
    for path in sorted(folder.glob("[!_]*.py")):
        found = [
            node
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.FunctionDef) and is_workaround(node)
        ]
        if found:
            text.append(f"## {docstring_of(path).partition(':')[0].rstrip('.')}")
        for node in found:
            text.append(f"### `{node.name}`")
            text.append(markdown(ast.get_docstring(node) or ""))
    return "\n\n".join(text) + "\n"


def docstring_of(path: pathlib.Path) -> str:
    """Return a module's docstring as Markdown."""
    return markdown(ast.get_docstring(ast.parse(path.read_text())) or "")


def is_workaround(node: ast.FunctionDef) -> bool:
    """Return whether a function is registered as a workaround."""
    return any(ast.unparse(each).startswith("workaround(") for each in node.decorator_list)


def measured(saved: dict[str, Any]) -> str:
    """Return the page of a benchmark, from what was kept of its last run."""
    question = types.SimpleNamespace(UNIT=saved["unit"], SIDES=saved["sides"])
    rows = [engine.Row(**row) for row in saved["rows"]]
    for row in rows:
        row.case = {k: tuple(v) if isinstance(v, list) else v for k, v in row.case.items()}
    names = (*rows[0].case, *saved["sides"], "jaxent's score", "bound")
    lines = [names, ["---"] * len(names), *(engine.cells(row, question) for row in rows)]
    table = "\n".join(f"| {' | '.join(map(str, each))} |" for each in lines)
    return "\n\n".join(
        (
            f"---\ntitle: {saved['question']}\n---",
            f"# {saved['title'].rstrip('.')}",
            f"Unit: {saved['unit']}. {saved['bound']} What is outside of its bound is bold.",
            f"Measured by `python -m benchmarks {saved['question']}` on {engine.origin(saved)}.",
            table,
            "",
        )
    )
