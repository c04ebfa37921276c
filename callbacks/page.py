"""One self-contained HTML page from headings, text, tables and pictures: no script, nothing loaded from elsewhere."""

import base64
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

STYLE = """
:root { --ink: #1d2733; --soft: #5b6875; --line: #dde3e9; --paper: #fff; --wash: #f5f7f9; --mark: #0b6e99; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--wash); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 27px; line-height: 1.25; margin: 0 0 12px; }
h2 { font-size: 19px; margin: 0 0 12px; }
header p { margin: 4px 0; max-width: 78ch; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 22px 24px;
  margin-top: 22px; }
section p { max-width: 78ch; margin: 8px 0; }
.scroll { overflow-x: auto; margin: 12px 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: 6px 0 6px 15px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.words { text-align: left; white-space: normal; vertical-align: top; }
figure { margin: 16px 0 4px; }
figure img { max-width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: 13.5px; max-width: 84ch; margin-top: 6px; }
footer { color: var(--soft); font-size: 13px; margin-top: 22px; }
"""


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; with `words`, all columns are left-aligned and wrap."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: bool = False


@dataclass(frozen=True)
class Picture:
    """A PNG, the name of its file, and what it shows."""

    name: str
    png: bytes
    caption: str


@dataclass(frozen=True)
class Section:
    """A heading with paragraphs (str), tables and pictures below it."""

    title: str
    parts: Sequence[str | Table | Picture]


@dataclass(frozen=True)
class Page:
    """What the report says; `lead` are the sentences under the title."""

    title: str
    lead: Sequence[str]
    sections: Sequence[Section]

    def html(self) -> str:
        """The page as text; pictures are embedded."""
        lead = "".join(f"<p>{escape(line)}</p>" for line in self.lead)
        body = "\n".join(_section(section) for section in self.sections)
        return (
            f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(self.title)}</title>\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
            f"<body><main><header><h1>{escape(self.title)}</h1>{lead}</header>\n{body}\n"
            f"<footer>Written by samplewise. This page is self-contained.</footer></main></body></html>\n"
        )

    def write(self, path: str | Path) -> Path:
        """Write the page to `path` in one step, and its pictures as PNG files into `plots/` beside it."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(self.html(), encoding="utf-8")
        temporary.replace(path)
        folder = path.parent / "plots"
        folder.mkdir(exist_ok=True)
        for picture in (part for section in self.sections for part in section.parts if isinstance(part, Picture)):
            (folder / f"{picture.name}.png").write_bytes(picture.png)
        return path


def _section(section: Section) -> str:
    return f"<section><h2>{escape(section.title)}</h2>{''.join(_part(part) for part in section.parts)}</section>"


def _part(part: str | Table | Picture) -> str:
    if isinstance(part, str):
        return f"<p>{escape(part)}</p>"
    if isinstance(part, Table):
        return _table(part)
    data = base64.b64encode(part.png).decode()
    short = re.split(r"[.;:](?:\s|$)", part.caption)[0]  # not within 2.5
    return (
        f'<figure><img alt="{escape(short)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(part.caption)}</figcaption></figure>"
    )


def _table(table: Table) -> str:
    cell = '<td class="words">' if table.words else "<td>"
    header = "".join(f"<th>{escape(text)}</th>" for text in table.header)
    rows = "".join(f"<tr>{''.join(cell + escape(text) + '</td>' for text in row)}</tr>" for row in table.rows)
    head = f"<thead><tr>{header}</tr></thead>" if table.header else ""
    return f'<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>'
