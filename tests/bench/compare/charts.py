# SPDX-License-Identifier: BSD-2-Clause
"""Draws the figures of bench_compare as SVG: small files without a script, readable on light and on dark ground."""

import html
import math

WIDTH, LABELS, RIGHT, ROW, BAR = 720, 130, 130, 24, 14

# The colours of Okabe and Ito, which the colour-blind tell apart as well; what would be too faint on one of the grounds has
# another there. Ours are filled and solid, the others dashed, and each has a mark of its own: no chart needs its colours.
COLOURS = {
    "direct": ("#8c959f", "#8c959f"), "bpf": ("#0072b2", "#2b8fd0"), "bpf-names": ("#56b4e9", "#56b4e9"),
    "userspace": ("#009e73", "#009e73"), "nftables": ("#e69f00", "#e69f00"), "iptables": ("#d55e00", "#d55e00"),
    "haproxy": ("#cc79a7", "#cc79a7"), "haproxy-splice": ("#cc79a7", "#cc79a7"), "nginx": ("#24292f", "#f0e442"),
}
MARKS = {  # around 0, 0
    "bpf": "M-4-4H4V4H-4Z", "bpf-names": "M0-5L5 0L0 5L-5 0Z", "userspace": "M0-5L5 4H-5Z", "nftables": "M-5-4H5L0 5Z",
    "iptables": "M-4-4L4 4M4-4L-4 4", "haproxy": "M-5 0H5M0-5V5", "nginx": "M-3.5-3.5H3.5V3.5H-3.5ZM-3.5 0H3.5",
}
OURS = ("bpf", "bpf-names", "userspace")
# Their connect() ends at their own listener, and their sendto() before anybody has read: neither is one to a backend.
PROXIES = ("userspace", "haproxy", "haproxy-splice", "nginx")


def style():
    def peers(ground):
        return " ".join(f".{peer} {{ fill: {colours[ground]}; stroke: {colours[ground]} }}" for peer, colours in COLOURS.items())
    return f"""
  text {{ font: 13px system-ui, sans-serif; fill: #24292f }}
  .title {{ font-weight: 600; font-size: 15px }}
  .small {{ font-size: 11px; fill: #57606a }}
  .ground {{ fill: #ffffff }} .line {{ stroke: #d0d7de }} .base {{ stroke: #57606a; stroke-width: 1.5 }}
  .whisker {{ stroke: #24292f; stroke-width: 1.5; fill: none }} .halo {{ stroke: #ffffff; stroke-width: 3.5; fill: none }}
  {peers(0)}
  .curve {{ fill: none; stroke-width: 1.8; stroke-dasharray: 7 3 }} .ours {{ stroke-width: 2.6; stroke-dasharray: none }}
  .leader {{ fill: none; stroke-width: 1; stroke-dasharray: 1 3 }} .mark {{ stroke-width: 1.6 }} .open {{ fill: none }}
  @media (prefers-color-scheme: dark) {{
    text {{ fill: #e6edf3 }} .small {{ fill: #9198a1 }} .ground {{ fill: #0d1117 }} .line {{ stroke: #3d444d }}
    .base {{ stroke: #9198a1 }} .whisker {{ stroke: #ffffff }} .halo {{ stroke: #0d1117 }}
    {peers(1)}
    .open, .curve, .leader {{ fill: none }}
  }}
"""


# File, measure, column, who takes part, and what is better.
EVERYBODY, NO_PROXIES = lambda peer: True, lambda peer: peer not in PROXIES  # noqa: E731
BARS = [
    ("connect", "connect", 1, NO_PROXIES, "less is better"),
    ("answered", "connect", 3, EVERYBODY, "less is better"),
    ("miss", "miss", 1, EVERYBODY, "less is better"),
    ("rate", "rate", 0, EVERYBODY, "more is better"),
    ("request", "request1024", 0, EVERYBODY, "more is better"),
    ("bulk", "bulk1", 0, EVERYBODY, "more is better"),
    ("bulk-cpu", "bulk1", 1, EVERYBODY, "less is better"),
    ("udp", "udp", 1, NO_PROXIES, "less is better"),
    ("update", "update-10", 1, EVERYBODY, "less is better; each mark is ten times the one before"),
]
# File, group, column, who takes part: over the number behind the dash.
CURVES = [
    ("services", "services", 1, NO_PROXIES, "services"),
    ("services-answered", "services", 3, EVERYBODY, "services"),
    ("backends", "backends", 1, NO_PROXIES, "backends of the service"),
    ("backends-answered", "backends", 3, EVERYBODY, "backends of the service"),
]


def number(value):
    """On an axis."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def text(x, y, what, css="", anchor="start"):
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}">{html.escape(what)}</text>'


def line(x1, y1, x2, y2, css):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def path(what, css, at=None):
    place = f' transform="translate({at[0]:.1f} {at[1]:.1f})"' if at else ""
    return f'<path d="{what}" class="{css}"{place}/>'


def mark(peer, at):
    return path(MARKS[peer], f"{peer} mark{'' if peer in OURS else ' open'}", at)


def svg(height, title, parts):
    """On a ground of its own, since a page may be dark where the system is not."""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">\n'
            f"<title>{html.escape(title)}</title>\n<style>{style()}</style>\n"
            f'<path d="M0 0H{WIDTH}V{height}H0Z" class="ground"/>\n' + "\n".join(parts) + "\n</svg>\n")


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


def bars(measure, column, takes_part, better):
    """(title, SVG): one bar for each peer, the median, and a line from the least to the most of the rounds."""
    rows = [(peer["peer"], peer["figures"][column], (peer["ratios"] or [{}] * 9)[column])
            for peer in measure["peers"] if takes_part(peer["peer"]) and peer["figures"][column]["median"] is not None]
    most = max(figure["max"] for _, figure, _ in rows) or 1
    by_decades = "ten times" in better
    decades = max(math.ceil(math.log10(most)), 1) if by_decades else 0
    title = f"{measure['title']}: {measure['columns'][column]['title']}"
    said_of_ratios = "; in brackets: the ratio to direct, turn by turn" if any(ratio for _, _, ratio in rows) else ""
    space, top = WIDTH - LABELS - RIGHT, 52

    def at(value):
        share = math.log10(max(value, 1)) / decades if by_decades else value / most
        return LABELS + space * share

    parts = [text(8, 20, title, "title"),
             text(8, 38, f"{better}; the line: least to most of the rounds{said_of_ratios}", "small")]
    bottom = top + ROW * len(rows)
    for value in [10 ** i for i in range(decades + 1)] if by_decades else ticks(most):
        parts += [line(at(value), top - 4, at(value), bottom, "line"),
                  text(at(value), bottom + 14, number(value), "small", "middle")]
    for i, (peer, figure, ratio) in enumerate(rows):
        y = top + ROW * i
        middle, left, right = y + BAR / 2, at(figure["min"]), at(figure["max"])
        whisker = f"M{left:.1f} {middle:.1f}H{right:.1f}M{left:.1f} {middle - 3:.1f}v6M{right:.1f} {middle - 3:.1f}v6"
        said = f"{figure['median']:,.{measure['columns'][column]['decimals']}f}"
        if ratio.get("median") is not None and peer != "direct":
            said += f" ({ratio['median']:.2f} x)"
        parts += [text(LABELS - 8, y + 12, peer, "", "end"),
                  f'<rect x="{LABELS}" y="{y}" width="{max(at(figure["median"]) - LABELS, 1):.1f}" height="{BAR}" '
                  f'class="{peer}"/>',
                  path(whisker, "halo"), path(whisker, "whisker"), text(WIDTH - 8, y + 12, said, "small", "end")]
    return title, svg(bottom + 24, title, parts)


def apart(wanted, distance, least, most):
    """Those places, moved as little as keeps them apart and within bounds; in ascending order, as they came."""
    places = []
    for want in wanted:
        places.append(max(want, places[-1] + distance if places else least))
    limit = most
    for i in reversed(range(len(places))):
        places[i] = min(places[i], limit)
        limit = places[i] - distance
    return places


def curves(measures, column, takes_part, what):
    """(title, SVG): one line for each peer, its ratio to direct over how many there are; each doubling is as high as another."""
    points = {}
    for measure in measures:
        for peer in measure["peers"]:
            ratio = peer["ratios"][column]["median"] if peer["ratios"] else None
            if ratio is not None and takes_part(peer["peer"]) and peer["peer"] != "direct":
                points.setdefault(peer["peer"], {})[int(measure["measure"].split("-")[1])] = ratio
    counts = sorted({count for seen in points.values() for count in seen})
    ratios = [ratio for seen in points.values() for ratio in seen.values()]
    low, high = min(1.0, *ratios) / 1.04, max(1.5, *ratios) * 1.04
    left, right, top, height = LABELS / 2, WIDTH - RIGHT - 30, 52, 260
    title = f"{measures[0]['columns'][column]['title'].split(',')[0]}, as a ratio to direct, by {what}"

    def at(count, ratio):
        x = left + (right - left) * counts.index(count) / max(len(counts) - 1, 1)
        return x, top + height * (1 - math.log(ratio / low) / math.log(high / low))

    parts = [text(8, 20, title, "title"),
             text(8, 38, "less is better; the line at 1 is direct, of which the others are multiples; logarithmic", "small")]
    for value in [1, 1.1, 1.2, 1.3, 1.5] if high < 1.6 else [1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128]:
        if value > high:
            break
        y = at(counts[0], value)[1]
        parts += [line(left, y, right, y, "base" if value == 1 else "line"),
                  text(left - 12, y + 4, number(value), "small", "end")]
    for count in counts:
        parts.append(text(at(count, 1)[0], top + height + 16, f"{count:,}", "small", "middle"))
    ends = []
    for peer, seen in points.items():
        places = [at(count, ratio) for count, ratio in sorted(seen.items())]
        parts.append(path("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places),
                          f"{peer} curve{' ours' if peer in OURS else ''}"))
        parts += [mark(peer, place) for place in places]
        until = max(seen)
        ends.append((places[-1], peer, f"{seen[until]:.2f}{'' if until == counts[-1] else f' (at {until:,})'}"))
    ends.sort(key=lambda end: end[0][1])
    labels = apart([y for (_, y), _, _ in ends], 16, top, top + height)
    for ((x, y), peer, ratio), label in zip(ends, labels, strict=True):
        parts += [path(f"M{x + 8:.1f} {y:.1f}L{right + 8:.1f} {y:.1f}L{right + 22:.1f} {label:.1f}", f"{peer} leader"),
                  mark(peer, (right + 30, label)), text(right + 40, label + 4, f"{peer} {ratio}", "small")]
    return title, svg(top + height + 26, title, parts)


def draw(figures):
    """Those charts for which there are figures: file, title and text of each."""
    drawn = []

    def put(file, title, drawing):
        drawn.append((f"{file}.svg", title, drawing))

    for file, name, column, takes_part, better in BARS:
        measure = of(figures, name)
        if measure and any(takes_part(peer["peer"]) and peer["figures"][column]["median"] is not None
                           for peer in measure["peers"]):
            put(file, *bars(measure, column, takes_part, better))
    for file, group, column, takes_part, what in CURVES:
        measures = [one for one in figures["measured"] if one["measure"].startswith(group + "-")]
        if len(measures) > 1 and any(takes_part(peer["peer"]) and peer["peer"] != "direct" and peer["ratios"] and
                                     peer["ratios"][column]["median"] is not None
                                     for one in measures for peer in one["peers"]):
            put(file, *curves(measures, column, takes_part, what))
    return drawn
