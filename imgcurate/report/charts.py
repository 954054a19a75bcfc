"""The report's charts, made with Bokeh: they work without a network, in a light page and in a dark one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from bokeh.models import (
    BasicTicker,
    ColumnDataSource,
    HoverTool,
    LinearColorMapper,
    NumeralTickFormatter,
    PrintfTickFormatter,
    TabPanel,
    Tabs,
)
from bokeh.models.annotations import ColorBar, Span
from bokeh.palettes import Category20_20, Viridis256
from bokeh.plotting import figure

from imgcurate.report.findings import Score

__all__ = ["curve_chart", "map_chart", "progress_chart", "score_chart"]

_KEPT: Final = "#2a9d8f"
_LEFT: Final = "#b0627a"
_ELSEWHERE: Final = "#a9b4c0"
_LIMIT: Final = "#e07a1f"
# Readable on white and on black.
_INK: Final = "#7a7f87"
# The green that is left out is too like that of what is kept.
_KINDS: Final = [_LEFT, *(c for i, c in enumerate(Category20_20) if i // 2 != 2)]
_HEIGHT: Final = 220
_MOST_IN_LEGEND: Final = 12
_FEW_DECIMALS: Final = 0.1
_MAP_HEIGHT: Final = 560
# Bokeh fills in '@name' and escapes it; the picture is ours.
_MAP_TOOLTIP: Final = """
<div style="max-width:180px;font:12px sans-serif;overflow-wrap:anywhere">
<img src="@picture" alt="" style="display:block;max-width:128px;max-height:128px">
<b>@key</b><br>@status @note</div>
"""


def score_chart(score: Score) -> Any:
    """Return the histogram of a score, what left upon what stayed, with its thresholds."""
    kept, left, elsewhere = np.array(score.kept), np.array(score.left), np.array(score.elsewhere)
    source = ColumnDataSource({
        "from": score.edges[:-1], "to": score.edges[1:], "kept": kept, "left": left, "elsewhere": elsewhere,
        "middle": kept + left, "top": kept + left + elsewhere,
    })  # fmt: skip
    chart = _figure(x_axis_type="log" if score.is_log else "linear", x_axis_label=score.column)
    common = {"left": "from", "right": "to", "source": source, "line_width": 0}
    bars = [chart.quad(bottom=0, top="kept", fill_color=_KEPT, legend_label="kept", **common)]
    tips = [(score.column, "@from{0,0.[00]} to @to{0,0.[00]}"), ("kept", "@kept{0,0}")]
    if left.any():
        bars.append(chart.quad(bottom="kept", top="middle", fill_color=_LEFT, legend_label="left by this", **common))
        tips.append(("left by this", "@left{0,0}"))
    if elsewhere.any():
        label = "left for another reason" if score.rules else "left"
        bars.append(chart.quad(bottom="middle", top="top", fill_color=_ELSEWHERE, legend_label=label, **common))
        tips.append((label, "@elsewhere{0,0}"))
    chart.add_tools(HoverTool(renderers=bars, tooltips=tips))
    for rule in score.rules:
        chart.add_layout(Span(location=rule.threshold, dimension="height", line_color=_LIMIT, line_width=2))
    chart.y_range.start = 0
    chart.yaxis.formatter = NumeralTickFormatter(format="0,0")
    small = score.is_log and score.edges[0] < _FEW_DECIMALS
    chart.xaxis.formatter = PrintfTickFormatter(format="%g") if small else NumeralTickFormatter(format="0,0.[00]")
    _finish(chart)
    return chart


def curve_chart(curve: Sequence[Mapping[str, float]], eps: float) -> Any:
    """Return the share of samples that would stay, over eps."""
    points = sorted((float(p["eps"]), p["kept"] / max(1, p["kept"] + p["removed"])) for p in curve)
    source = ColumnDataSource({"eps": [p[0] for p in points], "share": [p[1] for p in points]})
    chart = _figure(x_axis_label="eps", y_axis_label="kept")
    chart.line("eps", "share", source=source, line_width=2, color=_KEPT)
    dots = chart.scatter("eps", "share", source=source, size=7, color=_KEPT)
    chart.add_tools(HoverTool(renderers=[dots], tooltips=[("eps", "@eps{0.0000}"), ("kept", "@share{0.0 %}")]))
    chart.add_layout(Span(location=eps, dimension="height", line_color=_LIMIT, line_width=2))
    chart.yaxis.formatter = NumeralTickFormatter(format="0.[0] %")
    _finish(chart)
    return chart


def progress_chart(timeline: Sequence[tuple[float, int]]) -> Any:
    """Return samples a second over the time of the phase that decodes, from (seconds, samples done until then)."""
    seconds, done = np.array([0.0, *(t for t, _ in timeline)]), np.array([0, *(n for _, n in timeline)])
    rates = np.diff(done) / np.maximum(np.diff(seconds), 1e-9)
    source = ColumnDataSource({"from": seconds[:-1], "to": seconds[1:], "rate": rates})
    chart = _figure(x_axis_label="seconds", y_axis_label="samples a second")
    bars = chart.quad(left="from", right="to", bottom=0, top="rate", source=source, fill_color=_KEPT, line_width=0)
    tips = [("from", "@from{0,0.0} s"), ("to", "@to{0,0.0} s"), ("samples a second", "@rate{0,0}")]
    chart.add_tools(HoverTool(renderers=[bars], tooltips=tips))
    chart.y_range.start = 0
    chart.yaxis.formatter = NumeralTickFormatter(format="0,0")
    _finish(chart)
    return chart


def map_chart(
    places: npt.NDArray[np.float64], columns: Mapping[str, Sequence[str]], labels: Mapping[str, Sequence[str]],
    values: Mapping[str, npt.NDArray[np.float64]],
) -> Any:  # fmt: skip
    """Return the map of embeddings, a tab for each way to colour it.

    Parameters
    ----------
    places : ndarray of shape (m, 2)
        Where the samples lie.
    columns : mapping
        ``key``, ``status``, ``note``, ``picture`` (data URIs) of each.
    labels : mapping of str to sequence of str
        Ways to colour by kind.
    values : mapping of str to ndarray of shape (m,)
        Ways to colour by number.
    """
    source = ColumnDataSource({"x": places[:, 0], "y": places[:, 1], **columns, **labels, **values})
    panels = []
    for name, kinds in labels.items():
        counted = sorted(set(kinds), key=lambda k: (-list(kinds).count(k), k))
        palette = {kind: _KINDS[i % len(_KINDS)] for i, kind in enumerate(counted)}
        if name == "status":
            palette = {kind: _KEPT if kind == "ok" else color for kind, color in palette.items()}
        source.add([palette[kind] for kind in kinds], f"color of {name}")
        groups = name if len(counted) <= _MOST_IN_LEGEND else None
        panels.append(TabPanel(child=_map(source, f"color of {name}", groups), title=name))
    for name in values:
        finite = values[name][np.isfinite(values[name])]
        if len(finite):
            low, high = float(finite.min()), float(finite.max())
            mapper = LinearColorMapper(palette=Viridis256, low=low, high=high, nan_color=_INK)
            chart = _map(source, {"field": name, "transform": mapper})
            chart.add_layout(ColorBar(
                color_mapper=mapper, width=8, ticker=BasicTicker(desired_num_ticks=5), background_fill_alpha=0,
                major_label_text_color=_INK, formatter=PrintfTickFormatter(format="%.3g"),
            ), "right")  # fmt: skip
            panels.append(TabPanel(child=chart, title=name))
    return Tabs(tabs=panels, sizing_mode="stretch_width")


def _map(source: ColumnDataSource, color: Any, groups: str | None = None) -> Any:
    chart = _figure(
        height=_MAP_HEIGHT, tools="pan,wheel_zoom,box_zoom,reset", active_scroll=None, toolbar_location="above"
    )
    legend = {} if groups is None else {"legend_group": groups}
    dots = chart.scatter("x", "y", source=source, size=7, color=color, alpha=0.8, line_width=0, **legend)
    chart.add_tools(HoverTool(renderers=[dots], tooltips=_MAP_TOOLTIP))
    chart.axis.visible = False
    chart.grid.visible = False
    _finish(chart)
    return chart


def _figure(**options: Any) -> Any:
    defaults = {"height": _HEIGHT, "tools": "", "toolbar_location": None, "sizing_mode": "stretch_width"}
    return figure(**{**defaults, **options})


def _finish(chart: Any) -> None:
    """Make a chart fit a page of any colour."""
    chart.background_fill_alpha = chart.border_fill_alpha = 0
    chart.outline_line_color = None
    chart.grid.grid_line_color, chart.grid.grid_line_alpha = _INK, 0.25
    chart.axis.axis_line_color = chart.axis.major_tick_line_color = _INK
    chart.axis.minor_tick_line_color = None
    chart.axis.axis_label_text_color = chart.axis.major_label_text_color = _INK
    if chart.legend:
        chart.legend.background_fill_alpha = 0
        chart.legend.border_line_alpha = 0
        chart.legend.label_text_color = _INK
        chart.legend.orientation = "horizontal"
        chart.add_layout(chart.legend[0], "above")
