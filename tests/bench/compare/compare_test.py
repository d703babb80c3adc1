# SPDX-License-Identifier: BSD-2-Clause
"""The comparison runs: every peer gives figures, charts are drawn, and nothing is left behind, not even after Ctrl-C. What the
figures are, nobody judges.

ctest sets CLUSTERIP_SOURCE and CLUSTERIP_BUILD.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import unittest
import xml.etree.ElementTree

SOURCE = pathlib.Path(os.environ["CLUSTERIP_SOURCE"])
BUILD = pathlib.Path(os.environ["CLUSTERIP_BUILD"])
RUN = [sys.executable, "-B", SOURCE / "tests/bench/compare/run", "--build", BUILD]
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


def bars_of(chart):
    return len(xml.etree.ElementTree.parse(chart).getroot().findall("{http://www.w3.org/2000/svg}rect"))


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


@unittest.skipIf(os.geteuid() != 0 and os.environ.get("CLUSTERIP_REQUIRE_PRIVILEGE") != "1", "needs root")
class Compare(unittest.TestCase):
    def start(self, *options):
        process = subprocess.Popen([*RUN, *options], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   start_new_session=True)
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.stderr.close)
        return process

    def assert_nothing_is_left(self, process, benchmark):
        self.assertEqual(cgroups_of(benchmark), [])
        self.assertEqual(processes_of(process.pid), [])

    def test_every_peer_gives_figures_and_charts_are_drawn(self):
        with tempfile.TemporaryDirectory() as directory:
            figures, charts = pathlib.Path(directory, "figures.json"), pathlib.Path(directory, "charts")
            process = self.start("--only", "connect", "--quick", "--rounds", "1", "--turns", "1", "--json", figures,
                                 "--charts", charts)
            benchmark = benchmark_of(process)
            out, err = process.communicate(timeout=120)
            self.assertEqual(process.returncode, 0, err + out)
            measured, = json.loads(figures.read_text())["measured"]
            self.assertEqual({one["peer"] for one in measured["peers"]}, PEERS, err)
            for one in measured["peers"]:
                for figure in one["figures"]:
                    self.assertGreater(figure["median"], 0, one)
            self.assertEqual(bars_of(charts / "answered.svg"), len(PEERS))
            self.assertEqual(bars_of(charts / "connect.svg"), len(PEERS - PROXIES))
            self.assert_nothing_is_left(process, benchmark)

    def test_nothing_is_left_after_an_interrupt(self):
        process = self.start("--only", "bulk1,rate", "--rounds", "100", "--seconds", "0.1")
        benchmark = benchmark_of(process)
        process.stderr.readline()  # a round is over, and the next begins
        wait_for("cgroup", lambda: cgroups_of(benchmark))
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, err = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 130, err)
        self.assertIn("interrupted", err)
        self.assert_nothing_is_left(process, benchmark)

    def test_mistakes_in_the_command_are_told(self):
        for options in (["--only", "nothing"], ["--peers", "nobody"], ["--rounds", "0"]):
            done = subprocess.run([*RUN, *options], text=True, capture_output=True, check=False)
            self.assertEqual(done.returncode, 2, options)
            self.assertTrue(done.stderr.startswith("bench_compare: "), done.stderr)


if __name__ == "__main__":
    unittest.main()
