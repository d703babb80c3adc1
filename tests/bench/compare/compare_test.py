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
DOCUMENT = "prose before\n<!-- figures: tests/bench/compare/run --document -->\nold\n<!-- end of figures -->\nprose behind\n"
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


def bars_of(chart):
    return len(xml.etree.ElementTree.parse(chart).getroot().findall("{http://www.w3.org/2000/svg}rect"))


def end_all_of(session):
    for pid in processes_of(session):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


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

    def draw(self, tree, figures):
        """The finished `run --from --document` of that tree, and what the document has then."""
        file = self.directory / "earlier.json"
        file.write_text(json.dumps(figures))
        done = run(sys.executable, "-B", tree / HERE / "run", "--from", file, "--document")
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
        done, text = self.draw(tree, self.figures)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertTrue(text.startswith("prose before\n<!-- figures"), text)
        self.assertTrue(text.endswith("<!-- end of figures -->\nprose behind\n"), text)
        self.assertNotIn("old", text.split("<!--")[1])
        self.assertIn(f"Measured on: {self.figures['machine']}", text)
        median = self.figures["measured"][0]["peers"][0]["figures"][0]["median"]
        self.assertRegex(text, rf"\| `connect` connect\(\) min, us \| {median:.2f} ")
        for chart in self.charts.iterdir():
            self.assertRegex(text, rf"!\[[^\]]+\]\(charts/{chart.name}\)")
            self.assertTrue((tree / "docs/charts" / chart.name).exists())
        self.assertEqual(self.draw(tree, self.figures)[1], text)

    def test_the_document_shows_what_others_did_meanwhile(self):
        figures = json.loads(json.dumps(self.figures))
        for peer in figures["measured"][0]["peers"]:
            peer["rounds"] = [{**peer["rounds"][0], "others": share} for share in (0.5, 0.125, 0.25)]
        self.assertIn("| `connect` | 0.25 (0.12 to 0.50) |", self.draw(tree_in(self.directory), figures)[1])

    def test_the_document_takes_nothing_that_failed(self):
        figures = json.loads(json.dumps(self.figures))
        figures["measured"][0]["peers"][1]["rounds"][0]["failures"] = 1
        done, text = self.draw(tree_in(self.directory), figures)
        self.assertEqual((done.returncode, text), (1, DOCUMENT))
        self.assertIn("connect, bpf: 1 failures", done.stderr)

    def test_what_is_written_belongs_to_whom_the_directory_belongs(self):
        tree = tree_in(self.directory)
        self.directory.chmod(0o755)
        nobody = 65534
        for path in (tree, *tree.rglob("*")):
            os.chown(path, nobody, nobody)
        done, _ = self.draw(tree, self.figures)
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
        self.assertTrue((tree / "docs/charts/connect.svg").exists())
        self.assertEqual([path for path in tree.rglob("*") if path.stat().st_uid != nobody], [])
        os.chown(tree / "build/release", 0, 0)  # as a build by root would have left it
        done = run(sys.executable, "-B", tree / HERE / "run", env=environment)
        self.assertEqual(done.returncode, 1)
        self.assertIn("does not belong to the owner of", done.stderr)


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

    def test_rules_lead_to_backends_on_loopback_too(self):
        done = run(*RUN, *SHORT, "--stage", "loopback", "--peers", "direct,nftables,iptables")
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    def test_mistakes_in_the_command_are_told(self):
        for options in (["--only", "nothing"], ["--peers", "nobody"], ["--rounds", "0"], ["--stage", "nowhere"]):
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
            for text in ("", "[]", "3", "{}", '{"measured": []}'):
                file.write_text(text)
                done = run(*RUN, "--from", file, "--charts", charts)
                self.assertEqual(done.returncode, 2, text)
                self.assertIn("not the figures of an earlier run", done.stderr)
            for options in (["--from", f"{file}.none", "--charts", charts], ["--from", file],
                            ["--from", file, "--quick", "--charts", charts], ["--document", "--quick"],
                            ["--document", "--only=connect"], ["--document", "--peers", "bpf"]):
                done = run(*RUN, *options)
                self.assertEqual(done.returncode, 2, options)
                self.assertTrue(done.stderr.startswith("run: "), done.stderr)
            self.assertFalse(charts.exists())

    def test_a_host_that_cannot_be_is_told(self):
        done = run(BENCHMARK, "serve-as-host", "/nothing.toml", "/nowhere")
        self.assertEqual(done.returncode, 1)
        self.assertTrue(done.stderr.startswith("bench_compare: "), done.stderr)


if __name__ == "__main__":
    unittest.main()
