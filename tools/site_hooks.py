"""What MkDocs adds to the pages in docs/ (see mkdocs.yml): pages from the repository's root, and a page of options per
stage, made from the option classes and the docstrings under their fields.

The option classes import nothing but Python, so the site is built without torch.
"""

import ast
import inspect
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from recgpt_torchrec.config.fields import Option, options  # noqa: E402
from recgpt_torchrec.config.stages import STAGES  # noqa: E402

AT_THE_ROOT = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
"""Pages of the repository's root, and their names on the site."""
NOTEBOOK = "notebook.ipynb"


def on_config(config: Any) -> Any:
    """Put the pages of options where the navigation says OPTIONS."""
    for entry in config.nav:
        if entry.get("Options") == "OPTIONS":
            entry["Options"] = [{name: f"options/{name}.md"} for name in STAGES]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not in docs/."""
    from mkdocs.structure.files import File

    for source, name in AT_THE_ROOT.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text()))
    files.append(File.generated(config, "notebook.md", content=notebook_page(ROOT / "docs" / NOTEBOOK)))
    for name in STAGES:
        files.append(File.generated(config, f"options/{name}.md", content=options_page(name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links between docs/ and the root to where the pages are on the site."""
    if page.file.src_uri in AT_THE_ROOT.values():
        markdown = re.sub(r"\]\(docs/", "](", markdown)
    markdown = markdown.replace(f"({NOTEBOOK})", "(notebook.md)")
    markdown = re.sub(r"<!-- not run: (.+?) -->", r"*Not run with this page: \1.*", markdown)
    markdown = re.sub(r"<!-- (run by hand|stays running).*? -->\n", "", markdown)
    for source, name in AT_THE_ROOT.items():
        markdown = re.sub(rf"\]\((\.\./)?{source}", f"]({name}", markdown)
    return markdown


def notebook_page(notebook: Path) -> str:
    """A notebook as a page in Markdown: its texts, its code, and what it gave as text."""
    parts = []
    for cell in json.loads(notebook.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            text = "".join(output.get("text") or output["data"]["text/plain"])
            parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def options_page(stage: str) -> str:
    """The page of a stage's options, in Markdown: a table per group."""
    config = STAGES[stage].config
    lines = [f"# {stage}", "", f"`recgpt {stage}`: {STAGES[stage].purpose}.", "", *_paragraphs(config), ""]
    group = None
    for option in options(config):
        name, _, _ = option.name.rpartition(".")
        if name != group:
            group = name
            lines += [
                "",
                *([f"## --{name}.*", ""] if name else []),
                "| option | values | default | |",
                "|---|---|---|---|",
            ]
        cells = [f"`--{option.name}`", values_of(option.type), default_of(option), describe(config, option.name)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def values_of(kind: Any) -> str:
    """What an option takes, in words."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ", ".join(f"`{each}`" for each in arguments)
    if origin in (Union, UnionType):
        return ", ".join("null" if each is type(None) else values_of(each) for each in arguments)
    if origin is list:
        return f"list of {values_of(arguments[0])}"
    if origin is dict:
        return "name: value, ..."
    return {int: "whole number", float: "number", str: "text", bool: "true, false"}.get(
        kind, getattr(kind, "__name__", "")
    )


def default_of(option: Option) -> str:
    """An option's default, as it would be given."""
    if option.required:
        return "*must be given*"
    make: Any = option.field.default_factory
    default = option.field.default if make is MISSING else make()
    words = {None: "null", True: "true", False: "false"}
    return f"`{words[default] if isinstance(default, bool) or default is None else default}`"


def describe(config: type, name: str) -> str:
    """The docstring under an option's field."""
    head, _, rest = name.partition(".")
    owner = next(each for each in config.__mro__ if head in each.__dict__.get("__annotations__", {}))
    if not rest:
        return docstrings(owner).get(head, "")
    kind = get_type_hints(owner)[head]
    groups = [each for each in (kind, *get_args(kind)) if is_dataclass(each) and isinstance(each, type)]
    return describe(groups[0], rest)


def docstrings(config: type) -> dict[str, str]:
    """The docstrings under the fields of a class, by field."""
    (body,) = ast.parse(inspect.getsource(config)).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            found[field.target.id] = inspect.cleandoc(ast.literal_eval(text.value))
    return found


def _paragraphs(config: type) -> Iterator[str]:
    for line in inspect.cleandoc(config.__doc__ or "").splitlines():
        yield re.sub(r"^Example: (.*)$", r"Example: `\1`", line)
