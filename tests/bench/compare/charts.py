# SPDX-License-Identifier: BSD-2-Clause
"""Draws the figures of bench_compare as SVG: small files without a script, readable on light and on dark ground."""

import html
import math
import pathlib

WIDTH, LABELS, RIGHT, ROW, BAR = 720, 130, 70, 24, 14

# Ours are blue, the others grey: names tell peers apart, not colours.
STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #24292f }
  .title { font-weight: 600; font-size: 15px }
  .small { font-size: 11px; fill: #57606a }
  .ours { fill: #0969da; stroke: #0969da } .theirs { fill: #8c959f; stroke: #8c959f } .base { fill: #57606a; stroke: #57606a }
  .line { stroke: #d0d7de } .whisker { stroke: #24292f }
  polyline { fill: none !important; stroke-width: 2 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .small { fill: #8d96a0 }
    .ours { fill: #4493f8; stroke: #4493f8 } .theirs { fill: #656c76; stroke: #656c76 } .base { fill: #9198a1; stroke: #9198a1 }
    .line { stroke: #3d444d } .whisker { stroke: #e6edf3 }
  }
"""
OURS = ("bpf", "bpf-names", "userspace")

# File, measure, column, and what is better.
BARS = [
    ("connect", "connect", 1, "less is better"),
    ("miss", "miss", 1, "less is better"),
    ("rate", "rate", 0, "more is better"),
    ("request", "request1024", 0, "more is better"),
    ("bulk", "bulk1", 0, "more is better"),
    ("bulk-cpu", "bulk1", 1, "less is better"),
    ("udp", "udp", 1, "less is better"),
    ("update", "update-10", 1, "less is better; each mark is ten times the one before"),
]
# File, group, column: over the number behind the dash.
CURVES = [("services", "services", 1, "services"), ("backends", "backends", 1, "backends of the service")]


def kind(peer):
    return "base" if peer == "direct" else "ours" if peer in OURS else "theirs"


def number(value):
    if value >= 10000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def text(x, y, what, css="", anchor="start"):
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}">{html.escape(what)}</text>'


def line(x1, y1, x2, y2, css):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def svg(height, title, parts):
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">\n'
            f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n")


def of(figures, measure):
    return next((one for one in figures["measured"] if one["measure"] == measure), None)


def ticks(most):
    """A few round numbers from 0 up to that."""
    step = 10.0 ** (len(str(int(most))) - 1) if most >= 1 else 0.1
    while step * 10 < most:
        step *= 10
    while most / step < 3:
        step /= 2
    return [step * i for i in range(int(most / step) + 1)]


def bars(measure, column, better):
    """One bar for each peer: the median, and a line from the least to the most of the rounds."""
    rows = [(peer["peer"], peer["figures"][column], (peer["ratios"] or [{}] * 9)[column])
            for peer in measure["peers"] if peer["figures"][column]["median"] is not None]
    most = max(figure["max"] for _, figure, _ in rows)
    by_decades = "ten times" in better
    title = f"{measure['title']}: {measure['columns'][column]['title']}"
    space, top = WIDTH - LABELS - RIGHT - 20, 52

    def at(value):
        if by_decades:
            return LABELS + space * math.log10(max(value, 1)) / math.ceil(math.log10(most))
        return LABELS + space * value / most

    parts = [text(8, 20, title, "title"), text(8, 38, better, "small")]
    bottom = top + ROW * len(rows)
    for value in [10 ** i for i in range(math.ceil(math.log10(most)) + 1)] if by_decades else ticks(most):
        parts += [line(at(value), top - 4, at(value), bottom, "line"), text(at(value), bottom + 14, number(value), "small", "middle")]
    for i, (peer, figure, ratio) in enumerate(rows):
        y = top + ROW * i
        middle = y + BAR / 2
        parts += [text(LABELS - 8, y + 12, peer, "", "end"),
                  f'<rect x="{LABELS}" y="{y}" width="{max(at(figure["median"]) - LABELS, 1):.1f}" height="{BAR}" '
                  f'class="{kind(peer)}"/>',
                  line(at(figure["min"]), middle, at(figure["max"]), middle, "whisker")]
        said = number(figure["median"])
        if ratio.get("median") is not None and peer != "direct":
            said += f"  ({ratio['median']:.2f} x)"
        parts.append(text(WIDTH - 8, y + 12, said, "small", "end"))
    return svg(bottom + 24, title, parts)


def curves(measures, column, what):
    """One line for each peer: the ratio to direct, over how many there are."""
    points = {}
    for measure in measures:
        for peer in measure["peers"]:
            ratio = peer["ratios"][column]["median"] if peer["ratios"] else None
            if ratio is not None:
                points.setdefault(peer["peer"], {})[int(measure["measure"].split("-")[1])] = ratio
    counts = sorted({count for line_ in points.values() for count in line_})
    limit = 5.0  # beyond that a line leaves the chart, with its value written there
    most = min(limit, max(ratio for line_ in points.values() for ratio in line_.values()))
    top, height, right = 48, 240, 150
    title = f"{measures[0]['columns'][column]['title'].split(',')[0]}, as a ratio to direct, by {what}"

    def at(count, ratio):
        x = LABELS / 2 + (WIDTH - right - LABELS / 2) * counts.index(count) / max(len(counts) - 1, 1)
        return x, top + height * (1 - min(ratio, most) / most)

    parts = [text(8, 20, title, "title"), text(8, 38, "less is better", "small")]
    for value in ticks(most):
        y = at(counts[0], value)[1]
        parts += [line(LABELS / 2, y, WIDTH - right, y, "line"), text(LABELS / 2 - 6, y + 4, number(value), "small", "end")]
    for count in counts:
        parts.append(text(at(count, 0)[0], top + height + 16, f"{count:,}", "small", "middle"))
    ends = []
    for peer, seen in points.items():
        path = [at(count, ratio) for count, ratio in sorted(seen.items())]
        parts.append(f'<polyline class="{kind(peer)}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in path)}"/>')
        ends.append((path[-1][1], path[-1][0], f"{peer} {sorted(seen.items())[-1][1]:.2f}"))
    before = -100.0
    for y, x, label in sorted(ends):
        before = max(y, before + 13)
        parts.append(text(x + 6 if x < WIDTH - right - 1 else WIDTH - right + 8, before + 4, label, "small"))
    return svg(top + height + 26, title, parts)


def draw(figures, directory):
    """Those charts for which there are figures: returns the names and titles of the files."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    drawn = []
    for file, name, column, better in BARS:
        measure = of(figures, name)
        if measure and any(peer["figures"][column]["median"] is not None for peer in measure["peers"]):
            (directory / f"{file}.svg").write_text(bars(measure, column, better))
            drawn.append((f"{file}.svg", measure["title"]))
    for file, group, column, what in CURVES:
        measures = [one for one in figures["measured"] if one["measure"].startswith(group + "-")]
        if len(measures) > 1:
            (directory / f"{file}.svg").write_text(curves(measures, column, what))
            drawn.append((f"{file}.svg", f"by {what}"))
    return drawn
