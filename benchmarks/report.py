"""The comparison as a table in Markdown, as JSON, and as a bar chart."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .machine import Peaks
from .measure import Spread, geometric_mean
from .rows import Row, Timing
from .shapes import SUMMARY

_HEADER = (
    "workload",
    "fastcnn ms",
    "peer ms",
    "peer",
    "ratio (quartiles)",
    "rate",
    "of peak",
    "peak MB (above imports)",
    "peer's",
)
# PyTorch is what the project measures itself by.
_YARDSTICK = "torch"
_SLOWER, _CLOSE = 0.9, 1.2
_FASTER_COLOR, _SLOWER_COLOR = "#2a7f62", "#b5523b"


class Run(NamedTuple):
    """All that a run of the comparison found out.

    `machine` describes it; `versions` are of fastcnn and its peers; `settings` the command line's.
    """

    rows: Sequence[Row]
    peaks: Peaks
    machine: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]


def milliseconds(seconds: float) -> str:
    """Three digits that count."""
    value = 1e3 * seconds
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.{2 if value >= 1 else 4}f}"


def _memory(timing: Timing | None) -> str:
    if timing is None or timing.memory is None:
        return ""
    peak, imported = timing.memory["peak"], timing.memory["imported"]
    return f"{peak / 1e6:.0f} ({(peak - imported) / 1e6:.0f})"


def cells(row: Row, peaks: Peaks, timing: Timing | None) -> list[str]:
    """The row's line in the table, beside one of its peers."""
    if row.failed is not None or row.ours.seconds is None:
        return [row.name, "FAILED", "", "", row.failed or "", "", "", "", ""]
    kind, rate, share = row.bound(peaks)
    line = [row.name, milliseconds(row.ours.seconds.median)]
    if timing is None or timing.seconds is None:
        line += ["", timing.variant if timing else "", timing.error or "" if timing else ""]
    else:
        line += [milliseconds(timing.seconds.median), timing.variant, _ratio(row, timing)]
    unit = "GFLOP/s" if kind == "FMA" else "GB/s"
    return [
        *line,
        f"{rate:.{1 if rate < 100 else 0}f} {unit}",
        f"{share:.0%} {kind}",
        _memory(row.ours),
        _memory(timing),
    ]


def _ratio(row: Row, timing: Timing) -> str:
    if timing.ratio is None:
        assert timing.seconds is not None
        assert row.ours.seconds is not None
        return f"about {timing.seconds.median / row.ours.seconds.median:.1f}x"
    median, low, high = timing.ratio
    return f"{median:.2f}x ({low:.2f} to {high:.2f})"


def _lines(row: Row, peaks: Peaks, every: bool) -> Iterator[list[str]]:
    if every and row.failed is None and row.peers:
        for timing in row.peers:
            yield cells(row, peaks, timing)
    else:
        yield cells(row, peaks, row.best())


def table(run: Run, every: bool = False) -> str:
    """Rows in Markdown: each beside its best peer, or beside every one."""
    lines = [list(_HEADER), *(line for row in run.rows for line in _lines(row, run.peaks, every))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADER))]
    text = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([text[0], rule, *text[1:]])


def summary(rows: Sequence[Row]) -> list[str]:
    """Geometric means over the networks of `shapes.SUMMARY`, and which rows are slow beside PyTorch."""
    lines = []
    for op, title in (("train", "Training step"), ("infer-1", "One image"), ("infer-256", "Batch of 256")):
        wanted = [row for row in rows if row.op == op and row.name.split("/")[1] in SUMMARY]
        libraries = dict.fromkeys(t.peer for row in wanted for t in row.peers)
        for library in libraries:
            found = [t.ratio.median for row in wanted if (t := row.best(library)) and t.ratio is not None]
            if found:
                mean = f"geometric mean {geometric_mean(found):.2f}x, lowest {min(found):.2f}x"
                lines.append(f"{title}, {len(found)} of {len(SUMMARY)} networks, against {library}: {mean}.")
    ratios = {row.name: t.ratio.median for row in rows if (t := row.best(_YARDSTICK)) and t.ratio is not None}
    for limit in (_SLOWER, _CLOSE):
        below = [f"{name} ({ratio:.2f}x)" for name, ratio in ratios.items() if ratio < limit]
        if ratios:
            which = f": {', '.join(below)}" if below else ""
            lines.append(f"Below {limit}x of {_YARDSTICK}'s best: {len(below)} of {len(ratios)} rows{which}.")
    failed = [row.name for row in rows if row.failed is not None]
    if failed:
        lines.append(f"Failed: {', '.join(failed)}.")
    return lines


def heading(run: Run) -> list[str]:
    """What was measured on what."""
    m, peaks = run.machine, run.peaks
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    settings = run.settings
    return [
        f"{m['cpu']}, {m['vector_bits']}-bit vectors, last cache {m['last_cache_mib']:g} MiB, {m['system']}, "
        f"Python {m['python']}; {settings['threads']} of {m['cores']} cores.",
        f"Measured in the same run: {peaks.fma:.0f} GFLOP/s of multiply-adds in registers, "
        f"{peaks.copy:.1f} GB/s of copies.",
        f"{versions}. Commit {settings['commit']}, {settings['date']}; medians of {settings['rounds']} "
        "interleaved rounds.",
    ]


def markdown(run: Run, every: bool = False) -> str:
    """Heading, table and summary."""
    notes = "\n".join(f"- {line}" for line in summary(run.rows))
    return "\n\n".join(part for part in ("\n".join(heading(run)), table(run, every), notes) if part) + "\n"


def as_json(run: Run) -> str:
    """Everything, with each variant of each peer."""
    data = {
        "machine": run.machine,
        "peaks": {"fma_gflops": run.peaks.fma, "copy_gbytes": run.peaks.copy},
        "versions": run.versions,
        "settings": run.settings,
        "rows": [row.as_dict(run.peaks) for row in run.rows],
        "summary": summary(run.rows),
    }
    return json.dumps(data, indent=1) + "\n"


def chart(run: Run, path: Path) -> None:
    """A bar for each row that has a peer: how many times faster than its best one fastcnn is."""
    from matplotlib.figure import Figure

    bars = [
        (row.name, best.variant, best.ratio)
        for row in run.rows
        if row.failed is None and (best := row.best()) and best.ratio is not None
    ]
    ratios = [ratio for _, _, ratio in bars]
    medians = [ratio.median for ratio in ratios]
    places = range(len(bars))
    figure = Figure(figsize=(8, 1.0 + 0.24 * len(bars)), layout="constrained")
    axes = figure.subplots()
    axes.barh(
        places,
        [median - 1 for median in medians],
        left=1,
        xerr=[[r.median - r.low for r in ratios], [r.high - r.median for r in ratios]],
        color=[_FASTER_COLOR if median >= 1 else _SLOWER_COLOR for median in medians],
        height=0.7,
        error_kw={"linewidth": 0.8},
    )
    for place, (_, variant, ratio) in zip(places, bars, strict=True):
        text = f"{ratio.median:.{1 if ratio.median >= 1 else 2}f}x {variant}"
        axes.text(max(ratio.high, 1) * 1.05, place, text, va="center", fontsize=7)
    axes.set_yticks(places, [name for name, _, _ in bars], fontsize=7)
    axes.invert_yaxis()
    _ratio_axis(axes, ratios)
    label = f"times faster than the best peer, {run.settings['threads']} cores of {run.machine['cpu']}"
    axes.set_xlabel(label, fontsize=8)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _ratio_axis(axes: Any, ratios: Sequence[Spread]) -> None:
    """A logarithmic axis of ratios around 1, with room for the bars' labels."""
    low = min([0.5, *(0.9 * ratio.low for ratio in ratios)])
    high = 3 * max([1.0, *(ratio.high for ratio in ratios)])
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks], fontsize=7)
    axes.set_xticks([], minor=True)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.margins(y=0.01)
    axes.spines[["top", "right"]].set_visible(False)
