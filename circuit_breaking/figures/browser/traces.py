"""Lines, bands and points with intervals, as traces of Plotly in the project's style."""

from collections.abc import Mapping, Sequence
from typing import Any

from circuit_breaking.figures.style import BLACK, DARK_GREY

SYMBOLS = {
    "o": "circle", "s": "square", "D": "diamond", "^": "triangle-up", "v": "triangle-down", "P": "cross", "X": "x",
    "*": "star", "x": "x-thin-open", "+": "cross-thin-open", "1": "y-down-open", "<": "triangle-left",
    ">": "triangle-right", "h": "hexagon", "d": "diamond-tall", "8": "octagon", "p": "pentagon", "H": "hexagon2",
}  # fmt: skip
DASHES = ("solid", "dash", "dot", "longdashdot")
Estimate = Mapping[str, Any]  # value, low and high; null where they are not finite


def line(name: str, x: Sequence[Any], y: Sequence[Any], colour: str = BLACK, **more: Any) -> dict[str, Any]:
    """A line, with markers where `marker` is given."""
    style = {"color": colour, "width": 1.8, **more.pop("line", {})}
    mode = "lines+markers" if "marker" in more else "lines"
    return {"type": "scatter", "mode": mode, "name": name, "x": list(x), "y": list(y), "line": style, **more}


def band(name: str, x: Sequence[Any], low: Sequence[Any], high: Sequence[Any], colour: str) -> list[dict[str, Any]]:
    """A pale band between two lines, which belongs to the line `name` of the legend."""
    common = {
        "type": "scatter", "mode": "lines", "x": list(x), "line": {"width": 0}, "legendgroup": name,
        "showlegend": False, "hoverinfo": "skip",
    }  # fmt: skip
    return [{**common, "y": list(low)}, {**common, "y": list(high), "fill": "tonexty", "fillcolor": faint(colour)}]


def points(name: str, x: Sequence[Any], y: Sequence[Any], colour: str, marker: str = "o", **more: Any) -> dict:
    """Markers at `x` and `y`. An estimate, with `value`, `low` and `high`, gets its interval as a bar."""
    trace: dict[str, Any] = {
        "type": "scatter", "mode": "markers", "name": name,
        "marker": {"color": colour, "size": 8, "symbol": SYMBOLS.get(marker, "circle")}, **more,
    }  # fmt: skip
    for axis, values in (("x", x), ("y", y)):
        estimates = [value if isinstance(value, Mapping) else None for value in values]
        trace[axis] = [value["value"] if isinstance(value, Mapping) else value for value in values]
        if any(one is not None and one.get("low") is not None for one in estimates):
            trace[f"error_{axis}"] = {
                "type": "data", "symmetric": False, "thickness": 1.2, "width": 3, "color": colour,
                "array": [_distance(one, "high", "value") for one in estimates],
                "arrayminus": [_distance(one, "value", "low") for one in estimates],
            }  # fmt: skip
    return trace


def _distance(one: Estimate | None, upper: str, lower: str) -> float | None:
    if one is None or one.get(upper) is None or one.get(lower) is None:
        return None
    return one[upper] - one[lower]


def faint(colour: str, opacity: float = 0.15) -> str:
    """A colour `#rrggbb` with an opacity, as CSS."""
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def level(value: float, text: str = "", colour: str = DARK_GREY) -> dict[str, Any]:
    """A layout with a dashed horizontal line at `value`."""
    style = {"color": colour, "width": 1, "dash": "dash"}
    shape = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": value, "y1": value, "line": style}
    label = {
        "xref": "paper", "x": 1, "xanchor": "right", "y": value, "yanchor": "bottom", "text": text, "showarrow": False,
        "font": {"size": 11, "color": colour},
    }  # fmt: skip
    return {"shapes": [shape], "annotations": [label] if text else []}


def axes(x: str, y: str, **more: Any) -> dict[str, Any]:
    """A layout with titles of both axes; `xaxis` and `yaxis` in `more` are added to the axes."""
    titles = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y, "standoff": 10}}}
    for name in titles:
        titles[name] |= more.pop(name, {})
    return {**titles, **more}
