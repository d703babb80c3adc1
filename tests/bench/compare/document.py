# SPDX-License-Identifier: BSD-2-Clause
"""The figures of bench_compare as docs/benchmarks.md shows them: between comments there, those through a virtual cable at one place
and those on loopback at another."""

import json
import statistics

import charts

MARKS = {"veth": ("<!-- figures: tests/bench/compare/run --document -->\n", "<!-- end of figures -->\n"),
         "loopback": ("<!-- figures of loopback: the same command -->\n", "<!-- end of figures of loopback -->\n")}
PEERS = ["direct", "bpf", "bpf-names", "nftables", "iptables", "userspace", "haproxy", "haproxy-splice", "nginx"]
PROXIES = PEERS[5:]
LEAST_ROUNDS = 5
# What the goals of the userspace engine were set for.
LOOPBACK_MEASURES, LOOPBACK_PEERS = ["rate", "request1024", "bulk1", "bulk8"], ["direct", *PROXIES]
LOOPBACK_OPTIONS = ["--stage", "loopback", "--only", ",".join(LOOPBACK_MEASURES), "--peers", ",".join(LOOPBACK_PEERS)]
# The same thing, measured at three times.
THRICE = ["connect", "services-1", "backends-1"]
CONNECT, ANSWERED = 1, 3  # the columns

# Title, whether ratios to direct are shown as well, and rows: measure, column.
TABLES = [
    ("Connections, one after the other", True,
     [(measure, column) for measure in ("connect", "miss") for column in range(4)]),
    ("Loads", True,
     [("rate", 0), ("request1", 0), ("request1024", 0), ("bulk1", 0), ("bulk8", 0),
      ("rate", 1), ("request1", 1), ("request1024", 1), ("bulk1", 1), ("bulk8", 1)]),
    ("Many services, many backends", True,
     [(f"{group}-{count}", column)
      for group, counts in (("services", (1, 1000, 10000, 50000)), ("backends", (1, 10, 100, 1000)))
      for column in (1, 3) for count in counts]),
    ("Datagrams", True, [(measure, column) for measure in ("udp", "udpmiss") for column in range(4)]),
    ("What a proxy's processes take", False,
     [("rate", 2), ("request1", 2), ("request1024", 2), ("bulk1", 2), ("bulk8", 2), ("idle", 0), ("listeners", 0),
      ("listeners", 1)]),
    ("What each idle connection leaves in the kernel's connection tracking, and what it is charged in all", False,
     [("idle", 1), ("idle", 2)]),
    ("Changes and starts", False,
     [(f"update-{count}", column) for count in (10, 10000, 50000) for column in range(4)] +
     [("reload-50000", 0), ("reload-50000", 1)] +
     [(f"start-{count}", column) for count in (1000, 50000) for column in range(4)]),
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
    build = figures["build"]
    return (f"Measured on {figures['date']}: {figures['machine']}; {', '.join(figures['versions'].values())}; of "
            f"{figures['commit']}, built by {build['compiler']} as {build['type']} ({build['flags']}; "
            f"{', '.join(build['options'])}); {figures['rounds']} rounds of {figures['turns']} turns, loads of {figures['seconds']} s; {figures['threads']} threads for each proxy; {figures['stage']}, "
            f"{figures['congestion_control']}.")


def row(name, cells):
    return f"| {name} | " + " | ".join(cells) + " |"


def times(least, most):
    return f"{least:.2f} x" if f"{least:.2f}" == f"{most:.2f}" else f"{least:.2f} x to {most:.2f} x"


def of_peers(measures, name):
    return {peer["peer"]: peer for peer in measures[name]["peers"]} if name in measures else {}


def thrice(measures):
    """How well what was measured three times agrees."""
    seen = [of_peers(measures, name) for name in THRICE]
    lines = []
    for column, what, peers in ((CONNECT, "connect()", [one for one in PEERS[1:] if one not in PROXIES]),
                                (ANSWERED, "answered", PEERS[1:])):
        for peer in peers:
            if not all(peer in one and one[peer]["ratios"] for one in seen):
                continue
            ratios = [one[peer]["ratios"][column] for one in seen]
            medians = [ratio["median"] for ratio in ratios]
            lines.append(row(peer, [what, times(min(medians), max(medians)),
                                    times(min(ratio["min"] for ratio in ratios), max(ratio["max"] for ratio in ratios)),
                                    f"{max(medians) / min(medians):.2f}"]))
    if not lines:
        return []
    return [f"*The same thing at three times* ({', '.join(f'`{name}`' for name in THRICE)}): p50, as a ratio to direct. "
            "Two figures of a peer that are apart by less than the last column says may be the same.", "",
            "| peer | p50 of | medians | all rounds | most/least median |", "| --- | --- | --- | --- | --- |", *lines, ""]


def says_little(peer, title):
    """A proxy's connect() ends at its own listener."""
    return peer in PROXIES and title.startswith("connect()")


def more_is_better(title):
    return "/s" in title and "CPU" not in title


def ahead_of(ours, other, measure, column):
    """None, or a few words on how far the other is ahead."""
    mine, its = (peer["figures"][column] for peer in (ours, other))
    if mine["median"] is None or its["median"] is None or 0 in (mine["median"], its["median"]):
        return None
    title = measure["columns"][column]["title"]
    ratio = mine["median"] / its["median"] if more_is_better(title) else its["median"] / mine["median"]
    if ratio >= 0.995:
        return None
    apart = its["min"] > mine["max"] if more_is_better(title) else its["max"] < mine["min"]
    said = f"`{measure['measure']}` {title}: {ours['peer']} {spread(mine, measure['columns'][column]['decimals'])}, " \
           f"{other['peer']} {spread(its, measure['columns'][column]['decimals'])}"
    return f"**{said}**" if apart else said


def where_others_are_ahead(measures):
    """Of ours, each beside those that do the same in the same way."""
    rivals = {"bpf": ["nftables", "iptables"], "bpf-names": ["nftables", "iptables"],
              "userspace": ["haproxy", "haproxy-splice", "nginx"]}
    lines = []
    for ours, others_of_it in rivals.items():
        for other in others_of_it:
            found = []
            for name, measure in measures.items():
                peers = of_peers(measures, name)
                if ours not in peers or other not in peers:
                    continue
                for column, shown in enumerate(measure["columns"]):
                    if says_little(ours, shown["title"]):
                        continue
                    found.append(ahead_of(peers[ours], peers[other], measure, column))
            found = [one for one in found if one]
            if found:
                lines.append(f"- {other} of {ours}: " + "; ".join(found))
    if not lines:
        return []
    return ["*Where others are ahead of ours*, by the median; in bold where all of their rounds are ahead of all of ours:", "",
            *lines, ""]


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
                    found = None if says_little(peer, one["columns"][column]["title"]) else seen.get((one["measure"], peer))
                    values = (found["ratios"] if ratios else found["figures"]) if found else []
                    cells.append(spread(values[column], 2 if ratios else one["columns"][column]["decimals"]) if values else "")
                if any(cells):
                    lines.append(row(f"`{one['measure']}` {one['columns'][column]['title']}", cells))
            lines.append("")
    lines += others(figures, measures)
    lines += thrice(measures) + where_others_are_ahead(measures)
    met = sum(goal["met"] for goal in figures["goals"])
    lines += [f"*Goals*: by the medians {met} of {len(figures['goals'])} are met, {len(figures['goals']) - met} are missed. Where "
              "not all rounds agree on it, it is within noise.", "",
              "| peer | measure | figure | compared with | goal | reached (least-most) | |",
              "| --- | --- | --- | --- | --- | --- | --- |"]
    for goal in figures["goals"]:
        lines.append(f"| {goal['peer']} | `{goal['measure']}` | {goal['figure']} | {goal['to']} | {goal['goal']} | "
                     f"{spread(goal['reached'], 3)} | {in_words(goal)} |")
    return "\n".join(lines) + "\n"


def in_words(goal):
    if goal["verdict"] == "within noise":
        return "within noise, median " + ("met" if goal["met"] else "**missed**")
    return goal["verdict"] if goal["verdict"] == "met" else f"**{goal['verdict']}**"


def what_is_wrong_with_commit(commit):
    if not commit:
        return "of no commit that git knows"
    return "the tree has changes that no commit has" if commit.endswith("-dirty") else ""


def what_is_wrong_with_build(build):
    """As the preset `release` builds, if perhaps with another compiler."""
    if not build or build["type"] != "RelWithDebInfo" or "-O2" not in build["flags"].split():
        return "not of a build of the preset release"
    slower = ("CLUSTERIP_SANITIZE", "CLUSTERIP_COVERAGE", "CLUSTERIP_QUICK_TESTS", "CLUSTERIP_FUZZ")
    wrong = [option for option in build["options"] if option.split("=")[0] in slower]
    return f"of a build with {', '.join(wrong)}" if wrong else ""


def what_is_wrong_with_one(figures, stage, whole):
    """Of one run, which is to have measured all of `whole`: for each measure its peers."""
    if figures["stage"] != stage:
        return [f"{figures['stage']} instead of {stage}"]
    wrong = [what_is_wrong_with_commit(figures.get("commit")), what_is_wrong_with_build(figures.get("build"))]
    if figures.get("quick", True):
        wrong.append("a quick run")
    if figures.get("rounds", 0) < LEAST_ROUNDS:
        wrong.append(f"{figures.get('rounds')} rounds, not {LEAST_ROUNDS}")
    measured = {one["measure"]: {peer["peer"]: peer["rounds"] for peer in one["peers"]} for one in figures["measured"]}
    for measure, peers in whole.items():
        missing = [peer for peer in peers if len(measured.get(measure, {}).get(peer, [])) < LEAST_ROUNDS]
        if missing:
            wrong.append(f"{measure} lacks {', '.join(missing)}")
    for measure, peers in measured.items():
        wrong += [f"{measure}, {peer}: {trial['error'] or str(trial['failures']) + ' failures'}"
                  for peer, rounds in peers.items() for trial in rounds if trial["error"] or trial["failures"]]
    return [f"{stage}: {one}" for one in wrong if one]


def what_is_wrong_with(veth, loopback):
    """Why these are not the figures of whole runs of one program: empty when they are."""
    whole = veth.get("whole")
    if not whole:
        return ["it is not known what all measures are"]
    part = {measure: [peer for peer in whole.get(measure, []) if peer in LOOPBACK_PEERS] for measure in LOOPBACK_MEASURES}
    wrong = what_is_wrong_with_one(veth, "veth", whole) + what_is_wrong_with_one(loopback, "loopback", part)
    return wrong + [f"not the same {what}" for what in ("commit", "build", "machine", "versions")
                    if veth.get(what) != loopback.get(what)]


def rounded(what):
    """As many digits as mean anything."""
    if isinstance(what, dict):
        return {key: rounded(value) for key, value in what.items()}
    if isinstance(what, list):
        return [rounded(value) for value in what]
    return float(f"{what:.6g}") if isinstance(what, float) else what


def as_text(figures):
    """A line for each measure."""
    return json.dumps(rounded(figures), separators=(",", ":")).replace('{"measure":', '\n{"measure":') + "\n"


def with_figures(text, veth, loopback):
    """The document, with these instead of what it had."""
    images = [f"![{title}](charts/{file})\n" for file, title, _ in charts.draw(veth)]
    for figures, parts in ((veth, [*images, tables(veth)]), (loopback, [tables(loopback)])):
        begin, end = MARKS[figures["stage"]]
        before, found, rest = text.partition(begin)
        _, ends, after = rest.partition(end)
        if not (found and ends):
            raise ValueError(f"the document lacks {(end if found else begin).strip()}")
        text = before + begin + "\n" + "\n".join(parts) + "\n" + end + after
    return text
