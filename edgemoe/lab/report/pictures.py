"""Pictures of a trace and of replays, as matplotlib figures (the extra "lab")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.lab.routing.timing import Timing
from edgemoe.runtime.trace import Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["budgets", "check", "heat_maps", "png", "qualities", "timeline", "waits"]

_BEFORE, _COMPUTING, _WAITING, _READING = "#9aa5b1", "#2b6cb0", "#e05d44", "#3a9d5d"


def check() -> None:
    """Raises an ImportError that says what to install if pictures cannot be drawn."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ImportError("plots need matplotlib: pip install 'edgemoe[lab]'") from None


def _figure(width: float, height: float) -> Figure:
    check()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure) -> bytes:
    """Returns a figure as a PNG file."""
    import io

    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def budgets(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws hit rate and predicted speed against the budget, a line per scheduler and policy.

    Args:
        rows: as `edgemoe.lab.routing.study.study` returns them.
    """
    has_rate = any(r["rate"] for r in rows)
    figure = _figure(11 if has_rate else 6, 4.2)
    axes = figure.subplots(1, 2 if has_rate else 1, squeeze=False)[0]
    for name in dict.fromkeys(r["name"] for r in rows):
        line = [r for r in rows if r["name"] == name]
        x = [100 * r["share"] for r in line]
        style = "--" if line[0]["is_oracle"] else "-"
        (drawn,) = axes[0].plot(x, [r["hit_rate"] for r in line], style, marker="o", label=name)
        axes[0].plot(
            x, [r["shuffled_hit_rate"] for r in line], ":", color=drawn.get_color(), alpha=0.6
        )
        if has_rate:
            axes[1].plot(x, [r["rate"] for r in line], style, marker="o", label=name)
    axes[0].set(xlabel="experts that fit, %", ylabel="hit rate (dotted: shuffled)", ylim=(0, 1))
    axes[0].legend(fontsize="small")
    if has_rate:
        axes[1].set(xlabel="experts that fit, %", ylabel="predicted tokens/s")
        axes[1].set_ylim(bottom=0)
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure


def qualities(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws each setting's change of perplexity against its predicted speed; bars are one standard error.

    Args:
        rows: as `edgemoe.lab.routing.study.measured` returns them.
    """
    figure = _figure(11, 4.2)
    axis = figure.subplots()
    for r in rows:
        axis.errorbar(
            [r["rate"]], [100 * r["change"]], yerr=[100 * r["error"]], fmt="o", label=r["name"]
        )
    axis.axhline(1, color="grey", linestyle="--", linewidth=1)
    axis.set_yscale("symlog", linthresh=1)
    axis.set(xlabel="predicted tokens/s", ylabel="change of perplexity, %")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


def heat_maps(trace: Trace) -> Figure:
    """Draws, by layer and expert, how often an expert was chosen, and how often it was in memory then."""
    _, tokens = trace.passes()
    single = bool((tokens == 1).any())  # a chunk finds what its own first layers left
    experts = trace.by_token("experts", single=single).astype(np.int64)
    resident = trace.by_token("resident", single=single) > 0
    T, L, _ = experts.shape
    chosen, found = (np.zeros((L, trace.header.num_experts)) for _ in range(2))
    at = (np.arange(L)[None, :, None], experts)
    np.add.at(chosen, at, 1)
    np.add.at(found, at, resident)
    rate = np.divide(found, chosen, out=np.full(found.shape, np.nan), where=chosen > 0)
    figure = _figure(11, 1.5 + 0.13 * L)
    axes = figure.subplots(1, 2)
    pictures: list[tuple[str, NDArray[Any], float]] = [
        ("share of tokens that chose it", chosen / max(T, 1), float(chosen.max() / max(T, 1))),
        ("share of these that found it in memory", rate, 1.0),
    ]
    for axis, (title, values, top) in zip(axes, pictures, strict=True):
        image = axis.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=top or 1)
        axis.set(title=title, xlabel="expert", ylabel="layer")
        figure.colorbar(image, ax=axis)
    return figure


def timeline(trace: Trace, *, timing: Timing | None, tokens: int = 2) -> Figure:
    """Draws some single tokens from the middle of the trace: compute, reads, and waiting in between.

    Reads are drawn from the start of their layer's experts, with the length that their bytes take at the fitted rate:
    a trace does not record when each read ended.
    """
    before = trace.by_token("before_us", single=True)
    first = max(0, min(len(before) // 2, len(before) - tokens))
    span = slice(first, first + tokens)
    parts = [
        trace.by_token(name, single=True)[span].ravel() / 1e3
        for name in ("before_us", "experts_us", "wait_us")
    ]
    size = trace.by_token("bytes_read", single=True)[span].ravel()
    ends = np.cumsum(parts[0] + parts[1])
    starts = ends - parts[1]
    bars: dict[str, list[tuple[float, float]]]
    bars = {"dense parts": [], "experts": [], "waiting": [], "reads": []}
    for begin, end, dense, waited, n in zip(starts, ends, parts[0], parts[2], size, strict=True):
        bars["dense parts"].append((begin - dense, dense))
        bars["waiting"].append((begin, waited))  # when in the layer is not recorded
        bars["experts"].append((begin + waited, end - begin - waited))
        if timing is not None and n:
            bars["reads"].append((begin, n / timing.rate / 1e3))
    figure = _figure(11, 2.6)
    axis = figure.subplots()
    colours = dict(zip(bars, (_BEFORE, _COMPUTING, _WAITING, _READING), strict=True))
    for name, spans in bars.items():
        lane = 0 if name == "reads" else 1
        axis.broken_barh(spans, (lane, 0.8), facecolors=colours[name], label=name)
    for end in ends[trace.header.num_layers - 1 :: trace.header.num_layers]:
        axis.axvline(end, color="black", linewidth=0.7)
    axis.set(yticks=[0.4, 1.4], yticklabels=["disk", "processor"], xlabel="ms; a line ends a token")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.25), ncols=4, frameon=False)
    return figure


def waits(layers: Mapping[str, Sequence[float]]) -> Figure:
    """Draws the mean time of a single token in each layer; `layers` as in `report.waits`."""
    figure = _figure(11, 3.2)
    axis = figure.subplots()
    x = np.arange(len(layers["wait_us"]))
    bottom = np.zeros(len(x))
    for name, label, colour in (
        ("before_us", "dense parts", _BEFORE),
        ("computing_us", "experts", _COMPUTING),
        ("wait_us", "waiting for reads", _WAITING),
    ):
        axis.bar(x, layers[name], bottom=bottom, color=colour, label=label)
        bottom += np.array(layers[name])
    axis.set(
        xlabel="layer with experts (the first has embedding and head too)", ylabel="µs per token"
    )
    axis.legend(frameon=False)
    return figure
