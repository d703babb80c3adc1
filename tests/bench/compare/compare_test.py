# SPDX-License-Identifier: BSD-2-Clause
"""The comparison runs: every peer gives figures, charts are drawn, the document gets its tables, and nothing is left behind, not
even after Ctrl-C. What the figures are, nobody judges.

ctest sets CLUSTERIP_SOURCE and CLUSTERIP_BUILD.
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
import xml.etree.ElementTree

SOURCE = pathlib.Path(os.environ["CLUSTERIP_SOURCE"])
BUILD = pathlib.Path(os.environ["CLUSTERIP_BUILD"])
HERE = "tests/bench/compare"
RUN = [sys.executable, "-B", SOURCE / HERE / "run", "--build", BUILD]
BENCHMARK = BUILD / HERE / "bench_compare"
# What leaves no time for anything but to see that it works.
SHORT = ["--only", "connect", "--quick", "--rounds", "1", "--turns", "1"]
DOCUMENT = ("prose before\n<!-- figures: tests/bench/compare/run --document -->\nold\n<!-- end of figures -->\nprose between\n"
            "<!-- figures of loopback: the same command -->\nold\n<!-- end of figures of loopback -->\nprose behind\n")
PEERS = {"direct", "bpf", "bpf-names", "nftables", "iptables", "userspace", "haproxy", "nginx"}
PROXIES = {"userspace", "haproxy", "nginx"}


def cgroups_of(pid):
    mounts = (line.split() for line in pathlib.Path("/proc/self/mounts").read_text().splitlines())
    mount = next(fields[1] for fields in mounts if fields[2] == "cgroup2")
    return list(pathlib.Path(mount).glob(f"clusterip-test-{pid}-*"))


def processes_of(session):
    """Whatever was started in this session and has not ended."""
    found = []
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(stat.parent.name)
    return found


def programs_of(pids):
    """The ids of BPF programs that these processes hold."""
    found = set()
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # ended meanwhile
            for info in pathlib.Path(f"/proc/{pid}/fdinfo").iterdir():
                found |= {int(line.split()[1]) for line in info.read_text().splitlines() if line.startswith("prog_id:")}
    return found


def loaded(programs):
    return [one for one in programs if subprocess.run(["bpftool", "prog", "show", "id", str(one)], check=False,
                                                      capture_output=True).returncode == 0]


def namespaces_of(pids):
    found = set()
    for pid in pids:
        for kind in ("net", "mnt", "pid"):
            with contextlib.suppress(OSError):  # ended, or nobody's to see
                found.add(os.readlink(f"/proc/{pid}/ns/{kind}"))
    return found


def everybody():
    return [entry.name for entry in pathlib.Path("/proc").glob("[0-9]*")]


def run(*command, **how):
    return subprocess.run([str(word) for word in command], text=True, capture_output=True, check=False, **how)


def tree_in(directory):
    """A source tree with what `run` needs of one, and a short document."""
    tree = pathlib.Path(directory, "tree")
    (tree / HERE).mkdir(parents=True)
    for file in ("run", "charts.py", "document.py"):
        shutil.copy(SOURCE / HERE / file, tree / HERE)
    (tree / "docs").mkdir()
    (tree / "docs/benchmarks.md").write_text(DOCUMENT)
    return tree


def copy_of(figures):
    return json.loads(json.dumps(figures))


def whole(figures):
    """(veth, loopback) as a run for the document would have measured them, of figures of `connect`: the same for all measures."""
    figures = copy_of(figures)
    measured, = figures["measured"]
    by_peer = {peer["peer"]: {**peer, "rounds": peer["rounds"] * 5} for peer in measured["peers"]}
    by_peer["haproxy-splice"] = {**by_peer["haproxy"], "peer": "haproxy-splice"}
    figures |= {"commit": "0123abc", "quick": False, "rounds": 5,
                "build": {"compiler": "GNU 12", "type": "RelWithDebInfo", "flags": "-O2 -g -DNDEBUG", "options": ["CLUSTERIP_HARDEN=ON"]}}

    def on(stage, measures):
        return {**figures, "stage": stage, "measured": [
            {**measured, "measure": name, "peers": [by_peer[peer] for peer in peers]} for name, peers in measures.items()]}

    part = ("direct", "userspace", "haproxy", "haproxy-splice", "nginx")
    return copy_of(on("veth", figures["whole"])), copy_of(on("loopback", {
        name: [peer for peer in figures["whole"][name] if peer in part] for name in ("rate", "request1024", "bulk1", "bulk8")}))


def bars_of(chart):
    return len(xml.etree.ElementTree.parse(chart).getroot().findall("{http://www.w3.org/2000/svg}rect"))


def end_all_of(session):
    for pid in processes_of(session):
        end_process(int(pid))


def end_process(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def wait_for(what, found):
    """What `found` returns, as soon as it is true."""
    deadline = time.monotonic() + 60
    while not (result := found()):
        if time.monotonic() > deadline:
            raise AssertionError(f"no {what} within a minute")
        time.sleep(0.01)
    return result


def benchmark_of(process):
    """The process of bench_compare, once `run` has started it."""
    def found():
        children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return next((int(pid) for pid in children
                     if pathlib.Path(f"/proc/{pid}/comm").read_text().strip() == "bench_compare"), None)
    return wait_for("bench_compare", found)


PRIVILEGED = unittest.skipIf(os.geteuid() != 0 and os.environ.get("CLUSTERIP_REQUIRE_PRIVILEGE") != "1", "needs root")


@PRIVILEGED
class Measured(unittest.TestCase):
    """One short run, and what becomes of its figures."""

    @classmethod
    def setUpClass(cls):
        directory = tempfile.TemporaryDirectory()
        cls.addClassCleanup(directory.cleanup)
        cls.json, cls.charts = pathlib.Path(directory.name, "figures.json"), pathlib.Path(directory.name, "charts")
        process = start(cls.addClassCleanup, *SHORT, "--json", cls.json, "--charts", cls.charts)
        cls.benchmark = benchmark_of(process)
        out, err = process.communicate(timeout=120)
        cls.left = cgroups_of(cls.benchmark) + processes_of(process.pid)
        if process.returncode != 0:
            raise AssertionError(err + out)
        cls.figures = json.loads(cls.json.read_text())

    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = pathlib.Path(directory.name)

    def draw(self, tree, veth, loopback):
        """The finished `run --from --from --document` of that tree, and what the document has then."""
        options = []
        for name, figures in (("one", veth), ("other", loopback)):
            (self.directory / name).write_text(json.dumps(figures))
            options += ["--from", self.directory / name]
        done = run(sys.executable, "-B", tree / HERE / "run", *options, "--document")
        return done, (tree / "docs/benchmarks.md").read_text()

    def test_every_peer_gives_figures(self):
        measured, = self.figures["measured"]
        self.assertEqual({one["peer"] for one in measured["peers"]}, PEERS)
        for one in measured["peers"]:
            for figure in one["figures"]:
                self.assertGreater(figure["median"], 0, one)
        self.assertEqual(self.left, [])

    def test_figures_say_how_they_came_to_be(self):
        expected = {"quick": True, "rounds": 1, "turns": 1, "stage": "veth", "threads": 2, "congestion_control": "reno"}
        self.assertEqual({key: self.figures[key] for key in expected}, expected)
        self.assertIsNone(self.figures["commit"])  # of a build that was there, nobody knows
        self.assertRegex(self.figures["build"]["flags"], "-O[12] ")
        self.assertIn("connect", self.figures["whole"])
        self.assertEqual({goal["verdict"] for goal in self.figures["goals"]} - {"met", "missed", "within noise"}, set())
        self.assertIn("CPUs", self.figures["machine"])
        self.assertTrue(self.figures["versions"]["clusterip"].startswith("clusterip "))

    def test_charts_leave_proxies_out_where_their_figure_is_not_one_to_a_backend(self):
        self.assertEqual(bars_of(self.charts / "answered.svg"), len(PEERS))
        self.assertEqual(bars_of(self.charts / "connect.svg"), len(PEERS - PROXIES))

    def test_an_earlier_run_is_drawn_as_it_was_then(self):
        again = self.directory / "again"
        done = run(*RUN, "--from", self.json, "--charts", again)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        contents = [{file.name: file.read_text() for file in where.iterdir()} for where in (self.charts, again)]
        self.assertEqual(*contents)

    def test_the_document_gets_tables_and_charts_and_keeps_its_prose(self):
        tree = tree_in(self.directory)
        veth, loopback = whole(self.figures)
        done, text = self.draw(tree, loopback, veth)  # in whatever order
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertTrue(text.startswith("prose before\n<!-- figures"), text)
        self.assertIn("<!-- end of figures -->\nprose between\n<!-- figures of loopback", text)
        self.assertTrue(text.endswith("<!-- end of figures of loopback -->\nprose behind\n"), text)
        self.assertNotIn("\nold\n", text)
        self.assertEqual(text.count(f"Measured on {veth['date']}: {veth['machine']}"), 2)
        self.assertIn("of 0123abc, built by GNU 12 as RelWithDebInfo (-O2 -g -DNDEBUG; CLUSTERIP_HARDEN=ON); 5 rounds", text)
        median = veth["measured"][0]["peers"][0]["figures"][0]["median"]
        self.assertRegex(text, rf"\| `connect` connect\(\) min, us \| {median:.2f} ")
        for chart in self.charts.iterdir():
            self.assertRegex(text, rf"!\[[^\]]+\]\(charts/{chart.name}\)")
            self.assertTrue((tree / "docs/charts" / chart.name).exists())
        # From the figures beside the charts comes the same again.
        files = {file: file.read_text() for file in (tree / "docs").rglob("*") if file.is_file()}
        options = [word for stage in ("veth", "loopback") for word in ("--from", tree / f"docs/charts/{stage}.json")]
        done = run(sys.executable, "-B", tree / HERE / "run", *options, "--document")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertEqual({file: file.read_text() for file in (tree / "docs").rglob("*") if file.is_file()}, files)

    def test_the_document_here_is_what_its_figures_draw(self):
        tree = tree_in(self.directory)
        shutil.rmtree(tree / "docs")
        shutil.copytree(SOURCE / "docs", tree / "docs")
        options = [word for stage in ("veth", "loopback") for word in ("--from", SOURCE / f"docs/charts/{stage}.json")]
        done = run(sys.executable, "-B", tree / HERE / "run", *options, "--document")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        for file in [tree / "docs/benchmarks.md", *(tree / "docs/charts").iterdir()]:
            self.assertEqual(file.read_text(), (SOURCE / file.relative_to(tree)).read_text(), file.name)

    def test_the_document_shows_what_others_did_meanwhile(self):
        veth, loopback = whole(self.figures)
        for peer in veth["measured"][0]["peers"]:
            peer["rounds"] = [{**peer["rounds"][0], "others": share} for share in (0.5, 0.125, 0.25, 0.25, 0.25)]
        self.assertIn("| `connect` | 0.25 (0.12 to 0.50) |", self.draw(tree_in(self.directory), veth, loopback)[1])

    def test_the_document_says_where_others_are_ahead_and_what_is_noise(self):
        veth, loopback = whole(self.figures)
        measures = {one["measure"]: one for one in veth["measured"]}
        rate = measures["rate"]
        rate["columns"][0]["title"] = "connections/s"
        for peer in rate["peers"]:
            middle = {"nginx": 300, "userspace": 200}.get(peer["peer"], 100)
            peer["figures"][0] = {"min": middle - 10, "median": middle, "max": middle + 10}
        for name, ratio in (("connect", 4), ("services-1", 5), ("backends-1", 4)):
            nginx = next(peer for peer in measures[name]["peers"] if peer["peer"] == "nginx")
            nginx["ratios"][3] = {"min": ratio - 1, "median": ratio, "max": ratio + 1}
        veth["goals"] = [{"measure": "connect", "figure": "it", "peer": "bpf", "to": "direct", "goal": "<= 1.03",
                          "reached": {"min": 1.01, "median": 1.04, "max": 1.05}, "met": False, "verdict": "within noise"}]
        _, text = self.draw(tree_in(self.directory), veth, loopback)
        self.assertIn("**`rate` connections/s: userspace 200.00 (190.00-210.00), nginx 300.00 (290.00-310.00)**", text)
        self.assertNotIn("haproxy 100.00 (90.00-110.00)", text.partition("*Where others")[2])
        self.assertIn("| nginx | answered | 4.00 x to 5.00 x | 3.00 x to 6.00 x | 1.25 |", text)
        self.assertIn("| 1.040 (1.010-1.050) | within noise, median **missed** |", text)

    def test_the_document_takes_whole_runs_only(self):
        tree = tree_in(self.directory)

        def refused(change, expected):
            both = whole(self.figures)
            change(*both)
            done, text = self.draw(tree, *both)
            self.assertEqual((done.returncode, text), (1, DOCUMENT), expected)
            self.assertIn(expected, done.stderr)
            self.assertFalse((tree / "docs/charts").exists(), expected)

        def fail(veth, _):
            veth["measured"][0]["peers"][1]["rounds"][0]["failures"] = 1

        refused(fail, "veth: connect, bpf: 1 failures")
        refused(lambda veth, loopback: veth.update(self.figures), "a quick run")
        refused(lambda veth, loopback: veth["measured"].pop(), "veth: start-50000 lacks bpf, bpf-names")
        refused(lambda veth, loopback: veth["measured"][3]["peers"].pop(), "veth: request1 lacks nginx")
        refused(lambda veth, loopback: loopback["measured"][0]["peers"][0]["rounds"].pop(), "loopback: rate lacks direct")
        refused(lambda veth, loopback: loopback.update(rounds=4), "loopback: 4 rounds")
        refused(lambda veth, loopback: loopback.update(stage="veth"), "veth instead of loopback")
        refused(lambda veth, loopback: veth.update(commit=None), "veth: of no commit")
        refused(lambda veth, loopback: veth.update(commit="0123abc-dirty"), "veth: the tree has changes")
        refused(lambda veth, loopback: loopback.update(commit="4567def"), "not the same commit")
        refused(lambda veth, loopback: veth["build"].update(flags="-O1 -g1"), "veth: not of a build of the preset release")
        refused(lambda veth, loopback: veth["build"].update(options=["CLUSTERIP_SANITIZE=address"]), "CLUSTERIP_SANITIZE=address")
        refused(lambda veth, loopback: veth.pop("whole"), "not known what all measures are")

    def test_links_of_others_lead_nowhere(self):
        """root writes what it is told to: not where somebody else would have it."""
        tree = tree_in(self.directory)
        self.directory.chmod(0o755)
        nobody = 65534
        precious = self.directory / "precious"  # root's
        precious.mkdir()
        (precious / "file").write_text("precious")
        both = whole(self.figures)
        for path in (tree, *tree.rglob("*")):
            os.chown(path, nobody, nobody)

        def link(path, target):
            path.symlink_to(target)
            os.lchown(path, nobody, nobody)
            self.addCleanup(path.unlink, missing_ok=True)

        link(tree / "json", precious / "file")
        link(tree / "new", precious / "new")
        link(tree / "charts", precious)
        link(tree / "docs/charts", precious)
        for option, path in (("--json", "json"), ("--json", "new"), ("--json", "charts/new"), ("--charts", "charts"),
                             ("--charts", "charts/new")):
            done = run(*RUN, *SHORT, option, tree / path)
            self.assertEqual((done.returncode, done.stdout), (2, ""), done.stderr)
            self.assertTrue(done.stderr.startswith(f"run: {option}: {tree / path}: "), done.stderr)
        done, text = self.draw(tree, *both)
        self.assertEqual((done.returncode, text), (1, DOCUMENT), done.stderr)
        (tree / "docs/charts").unlink()
        (tree / "docs/benchmarks.md").unlink()
        link(tree / "docs/benchmarks.md", precious / "file")
        self.assertEqual(self.draw(tree, *both)[0].returncode, 1)
        done = run(*RUN, "--from", self.json, "--charts", tree / "charts")
        self.assertEqual(done.returncode, 1)
        self.assertIn("it is a link", done.stderr)
        self.assertEqual([(path.name, path.read_text()) for path in precious.iterdir()], [("file", "precious")])

    def test_what_is_written_belongs_to_whom_the_directory_belongs(self):
        tree = tree_in(self.directory)
        self.directory.chmod(0o755)
        nobody = 65534
        for path in (tree, *tree.rglob("*")):
            os.chown(path, nobody, nobody)
        done, _ = self.draw(tree, *whole(self.figures))
        self.assertEqual(done.returncode, 0, done.stderr)
        # A stand-in for cmake, which leaves what a build leaves.
        (tree / "cmake").write_text("#!/bin/sh\nmkdir -p build/release && touch build/release/CMakeCache.txt\n")
        (tree / "cmake").chmod(0o755)
        os.chown(tree / "cmake", nobody, nobody)
        environment = {**os.environ, "PATH": f"{tree}:{os.environ['PATH']}"}
        done = run(sys.executable, "-B", tree / HERE / "run", "--json", tree / "json", env=environment)
        self.assertEqual(done.returncode, 1)
        self.assertIn("bench_compare: No such file or directory", done.stderr)  # which has not been built
        self.assertTrue((tree / "build/release/CMakeCache.txt").exists())
        for file in ("connect.svg", "veth.json", "loopback.json"):
            self.assertTrue((tree / "docs/charts" / file).exists())
        self.assertEqual([path for path in tree.rglob("*") if path.stat().st_uid != nobody], [])
        os.chown(tree / "build/release", 0, 0)  # as a build by root would have left it
        done = run(sys.executable, "-B", tree / HERE / "run", env=environment)
        self.assertEqual(done.returncode, 1)
        self.assertIn("does not belong to the owner of", done.stderr)
        self.assertIn(f"sudo chown -hR {nobody}:{nobody} {tree}/build/release", done.stderr)


def start(clean_up, *options):
    """In a session of its own."""
    process = subprocess.Popen([*RUN, *options], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True)
    clean_up(end_all_of, process.pid)
    clean_up(process.stdout.close)
    clean_up(process.stderr.close)
    return process


@PRIVILEGED
class Compare(unittest.TestCase):
    def assert_nothing_is_left_after(self, end):
        """`end` is given the process of `run`, in the middle of its work."""
        process = start(self.addCleanup, "--only", "bulk1,rate", "--peers", "direct,bpf,nftables,userspace", "--rounds", "100",
                        "--turns", "4", "--seconds", "0.1")
        benchmark = benchmark_of(process)
        process.stderr.readline()  # a round is over, and the next begins
        wait_for("cgroup", lambda: cgroups_of(benchmark))
        programs = wait_for("BPF program", lambda: programs_of(processes_of(process.pid)))
        namespaces = wait_for("namespace", lambda: namespaces_of(processes_of(process.pid)) - namespaces_of(["self"]))
        end(process)
        _, err = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 130, err)
        self.assertIn("interrupted", err)
        self.assertEqual(cgroups_of(benchmark), [])
        self.assertEqual(processes_of(process.pid), [])
        self.assertEqual(namespaces & namespaces_of(everybody()), set())
        wait_for(f"end of the programs {programs}", lambda: not loaded(programs))  # the kernel frees them some time later

    def test_nothing_is_left_after_an_interrupt(self):
        self.assert_nothing_is_left_after(lambda process: os.killpg(process.pid, signal.SIGINT))  # as a terminal does

    def test_nothing_is_left_after_a_request_to_end(self):
        self.assert_nothing_is_left_after(lambda process: process.terminate())  # told to `run` alone, as kill does

    def test_nothing_is_left_of_a_build_that_is_interrupted(self):
        with tempfile.TemporaryDirectory() as directory:
            tree = tree_in(directory)
            # A stand-in for cmake, which starts others and waits for them, as a build does.
            (tree / "cmake").write_text(f"#!/bin/sh\nsleep 600 &\necho $! >{tree}/builds\nwait\n")
            (tree / "cmake").chmod(0o755)
            for number in (signal.SIGINT, signal.SIGTERM):
                process = subprocess.Popen([sys.executable, "-B", tree / HERE / "run"], text=True, stderr=subprocess.PIPE,
                                           env={**os.environ, "PATH": f"{tree}:{os.environ['PATH']}"})
                self.addCleanup(process.stderr.close)
                self.addCleanup(process.kill)
                pid = int(wait_for("build", lambda: (tree / "builds").exists() and (tree / "builds").read_text()))
                self.addCleanup(lambda pid=pid: end_process(pid))
                process.send_signal(number)
                _, err = process.communicate(timeout=60)
                self.assertEqual((process.returncode, err), (130, ""))
                wait_for("end of the build", lambda: not pathlib.Path(f"/proc/{pid}").exists())  # noqa: B023
                (tree / "builds").unlink()

    def test_figures_that_the_document_refuses_are_kept(self):
        with tempfile.TemporaryDirectory() as directory:
            tree = tree_in(directory)
            # Stand-ins for what builds and what measures: figures of a run that was not whole.
            program = tree / "build/release" / HERE / "bench_compare"
            program.parent.mkdir(parents=True)
            program.write_text("""#!/bin/sh
while [ "$1" != --json ]; do [ "$1" = loopback ] && stage=loopback; shift; done
echo '{"stage": "'${stage:-veth}'", "machine": "this", "whole": {"connect": ["bpf"]}, "measured": [], "goals": []}' >$2
""")
            for name, text in (("cmake", ""), ("git", "[ $1 != rev-parse ] || echo 0123abc")):
                (tree / name).write_text(f"#!/bin/sh\n{text}\n")
            for path in (program, tree / "cmake", tree / "git"):
                path.chmod(0o755)
            done = run(sys.executable, "-B", tree / HERE / "run", "--document",
                       env={**os.environ, "PATH": f"{tree}:{os.environ['PATH']}", "TMPDIR": directory})
            self.assertEqual(done.returncode, 1, done.stderr)
            self.assertIn("connect lacks bpf", done.stderr)
            kept = [pathlib.Path(name) for name in done.stderr.partition("the figures are in ")[2].strip().split(", ")]
            self.assertEqual([json.loads(file.read_text())["stage"] for file in kept], ["veth", "loopback"])
            self.assertEqual({file.parent for file in kept}, {pathlib.Path(directory)})
            self.assertEqual((tree / "docs/benchmarks.md").read_text(), DOCUMENT)

    def test_rules_lead_to_backends_on_loopback_too(self):
        done = run(*RUN, *SHORT, "--stage", "loopback", "--peers", "direct,nftables,iptables")
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    def test_mistakes_in_the_command_are_told(self):
        for options in (["--only", "nothing"], ["--peers", "nobody"], ["--rounds", "0"], ["--stage", "nowhere"],
                        ["--onl", "connect"], ["--only=connect", "--round=1"]):
            done = run(*RUN, *options)
            self.assertEqual(done.returncode, 2, options)
            self.assertTrue(done.stderr.startswith("bench_compare: "), done.stderr)

    def test_where_figures_cannot_be_written_is_told_before_they_are_measured(self):
        with tempfile.TemporaryDirectory() as directory:
            file = pathlib.Path(directory, "file")
            file.write_text("")
            for option, path in (("--json", directory), ("--json", f"{file}/below"), ("--json", "/proc/nothing/below"),
                                 ("--charts", file), ("--charts", f"{file}/below")):
                done = run(*RUN, *SHORT, option, path)
                self.assertEqual((done.returncode, done.stdout), (2, ""), path)
                self.assertTrue(done.stderr.startswith(f"run: {option}: {path}: "), done.stderr)
            done = run(BENCHMARK, *SHORT, "--json", directory)
            self.assertEqual((done.returncode, done.stderr), (2, f"bench_compare: {directory} cannot be written\n"))

    def test_what_is_no_earlier_run_is_told(self):
        with tempfile.TemporaryDirectory() as directory:
            file, charts = pathlib.Path(directory, "file"), pathlib.Path(directory, "charts")
            given = {"machine": "", "versions": {}, "goals": [], "stage": "veth"}
            peers = [{"peer": 'x" onload="alert(1)', "figures": [], "ratios": None, "rounds": []}]
            some = {"measure": "connect", "title": "", "columns": []}
            for text in ("", "[]", "3", "{}", '{"measured": []}', *(json.dumps({**given, "measured": [one]}) for one in (
                    {}, {**some, "peers": peers}, {**some, "peers": [{**peers[0], "peer": "bpf"}]}))):
                file.write_text(text)
                done = run(*RUN, "--from", file, "--charts", charts)
                self.assertEqual(done.returncode, 2, text)
                self.assertIn("not the figures of an earlier run", done.stderr)
            for options in (["--from", f"{file}.none", "--charts", charts], ["--from", file],
                            ["--from", file, "--quick", "--charts", charts], ["--document", "--quick"],
                            ["--document", "--onl=connect"], ["--document", "--json", file], ["--document"]):
                done = run(*RUN, *options)
                self.assertEqual(done.returncode, 2, options)
                self.assertTrue(done.stderr.startswith("run: "), done.stderr)
            self.assertFalse(charts.exists())
            os.mkfifo(f"{file}.fifo")
            done = run(*RUN, "--from", f"{file}.fifo", "--charts", charts, timeout=60)
            self.assertEqual((done.returncode, done.stderr.startswith("run: ")), (2, True), done.stderr)

    def test_a_host_that_cannot_be_is_told(self):
        done = run(BENCHMARK, "serve-as-host", "/nothing.toml", "/nowhere")
        self.assertEqual(done.returncode, 1)
        self.assertTrue(done.stderr.startswith("bench_compare: "), done.stderr)


if __name__ == "__main__":
    unittest.main()
