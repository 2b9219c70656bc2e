"""Fenced blocks of a page in Markdown: what is a command, what is code, and what a page says about running them.

A fence names its language: `bash` and `python` are run, anything else (`text`, `json`) is not. A comment on the line
above the fence says otherwise, with the reason:

    <!-- not run: needs a Slurm cluster -->
    <!-- run by hand: five minutes -->
    <!-- stays running -->                    a service, for the blocks after it
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parents[2]
PROGRAMS = {"recgpt", "python", "python3.11", "torchx", "torchrun", "make", "curl", "pip", "docker", "export", "source"}
"""First words of commands: a block that begins so is one, whatever its fence says."""

Mark = Literal["", "not run", "run by hand", "stays running"]
MARK = re.compile(r"\s*<!-- (not run|run by hand|stays running)(?:: (.+?))? -->\s*")


@dataclass
class Block:
    """A fenced block."""

    line: int
    """Of the fence, from 1."""
    language: str
    code: str
    mark: Mark
    reason: str

    @property
    def shows_commands(self) -> bool:
        """Whether the block holds commands, whatever its language says."""
        first = (self.code.split() or [""])[0]
        if self.language == "python":
            return False
        return self.language == "bash" or first in PROGRAMS or first.startswith(".venv")


def read_blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    lines = page.read_text().splitlines()
    number = 0
    while number < len(lines):
        fence = re.fullmatch(r"(\s*)```(\w*)", lines[number])
        if not fence:
            number += 1
            continue
        indent = len(fence[1])
        end = next(at for at in range(number + 1, len(lines)) if lines[at].strip() == "```")
        mark = MARK.fullmatch(lines[number - 1]) if number else None
        kind: Mark = mark[1] if mark else ""  # type: ignore[assignment]
        code = "\n".join(line[indent:] for line in lines[number + 1 : end]) + "\n"
        yield Block(number + 1, fence[2], code, kind, (mark[2] or "") if mark else "")
        number = end + 1


def commands(code: str) -> list[str]:
    """The command lines of a block: continued lines joined, comments and blank lines left out."""
    lines = re.sub(r"\\\n\s*", "", code).splitlines()
    return [line for line in map(str.strip, lines) if line and not line.startswith("#")]
