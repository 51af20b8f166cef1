"""What a page consists of: sections with text, tables, plots and graphs of edges. Plain data, without HTML."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, ClassVar

from circuit_breaking.figures.browser.edge_list import EdgeList


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    KIND: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Table:
    """A table; the first column holds names, the others figures.

    Attributes:
        header: names of the columns.
        rows: cells by row, as text.
        caption: what the table shows.
        folded: whether the reader opens it.
        numbers: whether all columns but the first are aligned to the right.
    """

    KIND: ClassVar[str] = "table"
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    folded: bool = False
    numbers: bool = True


@dataclass(frozen=True)
class Plot:
    """A plot of Plotly.

    Text in it comes from models and data, and Plotly reads some HTML in texts. So all strings are escaped here.

    Attributes:
        title: what is plotted.
        traces: Plotly's `data`.
        layout: Plotly's `layout`, besides the style that all plots share.
    """

    KIND: ClassVar[str] = "plot"
    title: str
    traces: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What `report.js` gives to Plotly: escaped, and null for numbers that are not finite."""
        return {"traces": _safe(list(self.traces)), "layout": _safe(dict(self.layout)), "title": self.title}


@dataclass(frozen=True)
class Plots:
    """Plots side by side where the page is wide enough."""

    KIND: ClassVar[str] = "plots"
    plots: Sequence[Plot]


@dataclass(frozen=True)
class Graph:
    """Edges between the nodes of a model, as lists of which the reader chooses one."""

    KIND: ClassVar[str] = "graph"
    lists: Sequence[EdgeList]


@dataclass(frozen=True)
class Picture:
    """A picture, as a data URI."""

    KIND: ClassVar[str] = "picture"
    source: str
    caption: str


@dataclass(frozen=True)
class Generations:
    """Texts that models wrote, by prompt; folded behind a warning.

    Attributes:
        prompts: of each prompt its text, and by model the continuation.
    """

    KIND: ClassVar[str] = "generations"
    prompts: Sequence[tuple[str, Mapping[str, str]]]


Part = Text | Table | Plots | Graph | Picture | Generations


@dataclass(frozen=True)
class Section:
    """A section of the page: its title, an identifier for links, and its parts."""

    title: str
    parts: Sequence[Part]

    @property
    def name(self) -> str:
        """Identifier of the section in links."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.title.lower())


def _safe(value: Any) -> Any:
    if isinstance(value, str):
        return escape(value, quote=False)
    if isinstance(value, Mapping):
        return {key: _safe(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_safe(inner) for inner in value]
    if hasattr(value, "tolist"):
        return _safe(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
