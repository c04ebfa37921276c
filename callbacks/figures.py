"""The report's plots: numbers in, PNG bytes out. Needs matplotlib: `pip install 'samplewise[report]'`."""

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Plot = TypeVar("Plot", bound=Callable[..., bytes])
COLOURS = ("#39424e", "#2a7ab9", "#d97a1e", "#2c9a6b", "#a2559c", "#b3403a", "#7a6a2c", "#4aa6a6")
DPI, WIDTH, COLUMNS = 120, 9.0, 4
LEAST_LOSS = 1e-5
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": "#39424e",
    "axes.titlesize": 9.5,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6eaee",
    "grid.linewidth": 0.8,
    "xtick.color": "#5b6875",
    "ytick.color": "#5b6875",
    "legend.frameon": False,
    "axes.facecolor": "white",
    "figure.facecolor": "white",
    "font.family": ["sans-serif"],
}


def styled(plot: Plot) -> Plot:
    """Draw in the report's style, whatever the user's settings; they are left as they are."""

    @functools.wraps(plot)
    def draw(*args: Any, **kwargs: Any) -> bytes:
        try:
            from matplotlib import rc_context
        except ImportError as error:
            raise ImportError("the report's plots need matplotlib: pip install 'samplewise[report]'") from error
        with rc_context(STYLE):
            return plot(*args, **kwargs)

    return draw  # type: ignore[return-value]


@dataclass(frozen=True)
class Line:
    """One curve: `x` and `y` of equal length, `spread` is half the height of the band around it."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    spread: Sequence[float] | None = None
    marker: str = "o"


@styled
def lines(
    curves: Sequence[Line],
    *,
    x: str,
    y: str,
    epochs: bool = False,
    share: bool = False,
    late: bool = False,
    alike: bool = False,
) -> bytes:
    """Curves over a common axis.

    Args:
        curves: drawn thinner and thinner, so that one that others cover still shows.
        x: label of the axis.
        y: label of the axis.
        epochs: whole numbers on the x axis.
        share: `y` is in [0, 1] and shown as a percentage.
        late: for curves that rise: cut the picture below what they reach halfway, and draw them alike.
        alike: draw all curves with the same width.
    """
    figure, (axes,) = _panels(1, height=3.3)
    for index, curve in enumerate(curves):
        colour = COLOURS[curve.colour % len(COLOURS)]
        single = len(curve.x) == 1
        size, width = (8.0, 0.0) if single else (4.0, 1.6 + (0.0 if late or alike else max(0.0, 3.2 - 1.1 * index)))
        axes.plot(curve.x, curve.y, color=colour, marker=curve.marker, ms=size, lw=width, label=curve.name)
        if curve.spread is not None and not single:
            low, high = np.subtract(curve.y, curve.spread), np.add(curve.y, curve.spread)
            axes.fill_between(curve.x, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.set(xlabel=x, ylabel=y)
    if late:
        top, low = max(max(c.y) for c in curves), min(c.y[len(c.y) // 2] for c in curves)
        room = (top - low) or 1.0
        axes.set_ylim(low - 0.3 * room, top + 0.15 * room)
    _axis(axes, epochs=epochs, share=share)
    if len(curves) > 1:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return _png(figure)


@styled
def dots(names: Sequence[str], points: Sequence[Sequence[float]], colours: Sequence[int], *, x: str) -> bytes:
    """A row for each name: its single results, their mean as a bar, and one standard deviation to each side."""
    figure, (axes,) = _panels(1, height=0.8 + 0.28 * len(names))
    for row, (values, index) in enumerate(zip(points, colours, strict=True)):
        colour, mean = COLOURS[index % len(COLOURS)], float(np.mean(values))
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        axes.plot([mean - deviation, mean + deviation], [row, row], color=colour, linewidth=7, alpha=0.22)
        axes.plot([mean], [row], "|", color=colour, markersize=14, markeredgewidth=2)
        axes.plot(values, [row] * len(values), "o", color=colour, markersize=4)
    axes.set(xlabel=x, yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.4, -0.6))
    axes.grid(axis="y", visible=False)
    return _png(figure)


@styled
def bars(names: Sequence[str], parts: Mapping[str, Sequence[float]], *, x: str) -> bytes:
    """A stacked horizontal bar for each name; `parts` are the stretches, label -> one length for each name."""
    figure, (axes,) = _panels(1, height=1.0 + 0.28 * len(names))
    left = np.zeros(len(names))
    for index, (label, lengths) in enumerate(parts.items()):
        axes.barh(range(len(names)), lengths, left=left, height=0.62, color=COLOURS[1 + index], label=label)
        left += np.asarray(lengths)
    axes.set(xlabel=x, yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.4, -0.6))
    axes.grid(axis="y", visible=False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(parts))
    return _png(figure)


@styled
def histogram(
    edges: Sequence[float],
    base: Sequence[float],
    over: Mapping[str, Sequence[float]],
    colours: Sequence[int],
    *,
    x: str,
    y: str,
    label: str = "data",
) -> bytes:
    """Bars of the shares `base` of B bins with `edges` (B + 1), and a stepped line for each of the shares `over`."""
    figure, (axes,) = _panels(1, height=3.3)
    axes.stairs(base, edges, fill=True, color=COLOURS[0], alpha=0.25, label=label)
    for place, ((name, shares), index) in enumerate(zip(over.items(), colours, strict=True)):
        width = 1.5 + 1.5 * (len(over) - 1 - place)  # where lines coincide, the earlier ones are seen beside the last
        axes.stairs(shares, edges, color=COLOURS[index % len(COLOURS)], linewidth=width, label=name)
    axes.set(xlabel=x, ylabel=y, ylim=(0, None))
    _axis(axes, epochs=False, share=False)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return _png(figure)


@styled
def scatter(
    groups: Mapping[str, tuple[Sequence[float], Sequence[float]]], front: Sequence[int], *, x: str, y: str
) -> bytes:
    """A dot for each point (x, y) of each group, and a line through the points numbered in `front`, over all groups."""
    figure, (axes,) = _panels(1, height=3.3)
    for index, (name, points) in enumerate(groups.items()):
        axes.scatter(*points, s=14, color=COLOURS[index % len(COLOURS)], alpha=0.7, label=name)
    every = [np.concatenate([np.asarray(points[axis]) for points in groups.values()])[list(front)] for axis in (0, 1)]
    axes.plot(*every, color="black", linewidth=1.2, marker=".", label="Pareto front")
    axes.set(xlabel=x, ylabel=y)
    _axis(axes, epochs=False, share=False)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return _png(figure)


@styled
def fans(panels: Mapping[str, tuple[Sequence[float], Sequence[Sequence[float]]]], *, y: str) -> bytes:
    """One panel for each name: `(epochs (E,), quantiles (E, 5))` at 5, 25, 50, 75 and 95 %, on one logarithmic axis.

    What is below `LEAST_LOSS` is drawn there.
    """
    figure, grid = _panels(len(panels), height=2.7)
    for axes, (name, (epochs, quantiles)) in zip(grid, panels.items(), strict=True):
        q = np.clip(np.asarray(quantiles, dtype=np.float64).reshape(-1, 5).T, LEAST_LOSS, None)
        axes.fill_between(epochs, q[0], q[4], color=COLOURS[1], alpha=0.16, linewidth=0, label="5-95 %")
        axes.fill_between(epochs, q[1], q[3], color=COLOURS[1], alpha=0.32, linewidth=0, label="25-75 %")
        axes.plot(epochs, q[2], color=COLOURS[1], marker="o", markersize=3, label="median")
        axes.set(title=name, xlabel="epoch", yscale="log")
        _axis(axes, epochs=True, share=False)
    grid[0].set_ylabel(y)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return _png(figure)


@styled
def heat(
    panels: Mapping[str, Sequence[Sequence[float | None] | None]], *, y: str, ticks: Sequence[str], bar: str
) -> bytes:
    """One panel for each name: shares in [0, 1] as colours, `(epochs, rows)`; None is blank."""
    figure, grid = _panels(len(panels), height=max(2.2, 1.0 + 0.16 * min(len(ticks), 25)))
    every = -(-len(ticks) // 25)
    for axes, (name, table) in zip(grid, panels.items(), strict=True):
        values = np.array([row if row is not None else [None] * len(ticks) for row in table], dtype=np.float64).T
        image = axes.imshow(values, aspect="auto", origin="lower", cmap="YlGnBu", vmin=0, vmax=1, interpolation="none")
        axes.set(title=name, xlabel="epoch", facecolor="#eef0f2")
        axes.set_yticks(range(0, len(ticks), every), ticks[::every])
        axes.grid(visible=False)
        _axis(axes, epochs=True, share=False)
    grid[0].set_ylabel(y)
    figure.colorbar(image, ax=grid, label=bar, shrink=0.9, pad=0.02)
    return _png(figure)


def _panels(count: int, *, height: float) -> tuple["Figure", list["Axes"]]:
    """A figure of `count` panels with a common y axis, `COLUMNS` in a row; unused places are hidden."""
    from matplotlib.figure import Figure

    columns = 1 if count == 1 else COLUMNS if count > 2 else 2
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, height * rows), dpi=DPI, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel().tolist()
    for axes in grid[count:]:
        axes.set_visible(False)
    return figure, grid[:count]


def _axis(axes: "Axes", *, epochs: bool, share: bool) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

    axes.xaxis.set_major_locator(MaxNLocator(integer=epochs, nbins=6))
    if not epochs:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(value, 9) + 0:,.12g}"))  # 2.5, 10,000
    if share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylim(0, 1.05)


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
