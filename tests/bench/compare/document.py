# SPDX-License-Identifier: BSD-2-Clause
"""Puts the figures of bench_compare into docs/benchmarks.md, between two comments there, and the charts beside it."""

import pathlib
import statistics

import charts

BEGIN, END = "<!-- figures: tests/bench/compare/run --document -->\n", "<!-- end of figures -->\n"
PEERS = ["direct", "bpf", "bpf-names", "nftables", "iptables", "userspace", "haproxy", "haproxy-splice", "nginx"]

# Title, whether ratios to direct are shown as well, and rows: measure, column.
TABLES = [
    ("Connections, one after the other", True,
     [(measure, column) for measure in ("connect", "miss") for column in range(4)]),
    ("Loads", True,
     [("rate", 0), ("request1", 0), ("request1024", 0), ("bulk1", 0), ("bulk8", 0), ("bulk1", 1), ("bulk8", 1)]),
    ("Many services, many backends", True,
     [(f"{group}-{count}", column)
      for group, counts in (("services", (1, 1000, 10000, 50000)), ("backends", (1, 10, 100, 1000)))
      for column in (1, 3) for count in counts]),
    ("Datagrams", True, [(measure, column) for measure in ("udp", "udpmiss") for column in range(4)]),
    ("What a proxy's processes take", False,
     [("rate", 2), ("request1024", 2), ("bulk1", 2), ("bulk8", 2), ("idle", 0), ("listeners", 0), ("listeners", 1)]),
    ("What the kernel tracks", False, [("idle", 1)]),
    ("Changes and starts", False,
     [(f"update-{count}", column) for count in (10, 10000, 50000) for column in range(4)] +
     [(f"start-{count}", column) for count in (1000, 50000) for column in range(3)]),
]


def spread(figure, decimals):
    if not figure or figure["median"] is None:
        return ""
    least, middle, most = (f"{figure[which]:,.{decimals}f}" for which in ("min", "median", "max"))
    return middle if least == most else f"{middle} ({least}-{most})"


def others(figures, measures):
    """How busy the machine was with something else, for measures that say so."""
    cells = {}
    for one in figures["measured"]:
        for peer in one["peers"]:
            seen = [trial["others"] for trial in peer["rounds"] if trial["others"] is not None]
            if seen:
                cells[one["measure"], peer["peer"]] = (f"{statistics.median(seen):.2f} ({min(seen):.2f} to {max(seen):.2f})"
                                                       .replace("-0.00", "0.00"))
    names = [name for name in measures if any(measure == name for measure, _ in cells)]
    peers = [peer for peer in PEERS if any(who == peer for _, who in cells)]
    if not names:
        return []
    return ["*CPUs that others kept busy meanwhile*: median, and from least to most of the rounds.", "",
            row("", peers), row("---", ["---"] * len(peers)),
            *(row(f"`{name}`", [cells.get((name, peer), "") for peer in peers]) for name in names), ""]


def conditions(figures):
    """What it was measured on, and how."""
    said = f"Measured on: {figures['machine']}; " + ", ".join(figures["versions"].values())
    if figures.get("commit"):
        said += f", of {figures['commit']}"
    if figures.get("rounds"):
        said += (f"; {figures['rounds']} rounds of {figures['turns']} turns, loads of {figures['seconds']} s; "
                 f"{figures['stage']}, {figures['congestion_control']}")
    return said + "."


def row(name, cells):
    return f"| {name} | " + " | ".join(cells) + " |"


def tables(figures):
    measures = {one["measure"]: one for one in figures["measured"]}
    lines = [conditions(figures), ""]
    for title, with_ratios, rows in TABLES:
        rows = [(measures[name], column) for name, column in rows if name in measures]
        seen = {(one["measure"], peer["peer"]): peer for one, _ in rows for peer in one["peers"]}
        peers = [peer for peer in PEERS
                 if any((figure := seen.get((one["measure"], peer))) and figure["figures"][column]["median"] is not None
                        for one, column in rows)]
        if not peers:
            continue
        for ratios in (False, True) if with_ratios else (False,):
            shown = [peer for peer in peers if not ratios or peer != "direct"]
            lines += [f"*{title}{', as ratios to direct' if ratios else ''}*: median, and from least to most of the rounds.", "",
                      row("", shown), row("---", ["---"] * len(shown))]
            for one, column in rows:
                cells = []
                for peer in shown:
                    found = seen.get((one["measure"], peer))
                    values = (found["ratios"] if ratios else found["figures"]) if found else []
                    cells.append(spread(values[column], 2 if ratios else one["columns"][column]["decimals"]) if values else "")
                if any(cells):
                    lines.append(row(f"`{one['measure']}` {one['columns'][column]['title']}", cells))
            lines.append("")
    lines += others(figures, measures)
    lines += ["*Goals*, each by the median:", "", "| peer | measure | figure | compared with | goal | reached | |",
              "| --- | --- | --- | --- | --- | --- | --- |"]
    for goal in figures["goals"]:
        lines.append(f"| {goal['peer']} | `{goal['measure']}` | {goal['figure']} | {goal['to']} | {goal['goal']} | "
                     f"{goal['reached']:,.3f} | {'met' if goal['met'] else '**missed**'} |")
    return "\n".join(lines) + "\n"


def of(source):
    return pathlib.Path(source) / "docs/benchmarks.md"


def write(figures, source):
    path = of(source)
    before, _, rest = path.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    images = [f"![{title}](charts/{file})\n" for file, title in charts.draw(figures, path.parent / "charts")]
    path.write_text(before + BEGIN + "\n" + "\n".join([*images, tables(figures)]) + "\n" + END + after)
