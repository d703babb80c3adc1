# SPDX-License-Identifier: BSD-2-Clause
"""Runs what the documents tell their readers to run, and compares what they show with what is said.

Every command of README.md, docs/ and the manual pages is in a table below: how it is run here, or which test runs it. A
command that is in no table is a failure, and so is an entry that no document uses: documents cannot grow commands that nobody
has tried.

The commands run as root in a sandbox: network, mount, PID and cgroup namespaces that end with the test, the host's files
read-only. In there the cgroup hierarchy begins at a cgroup that this test has made, so that not even a mistake reaches the
root cgroup of the machine; and what is attached, is attached to the `trial` below it, as README.md recommends.

ctest sets CLUSTERIP_SOURCE and CLUSTERIP_BUILD.
"""

import collections
import contextlib
import ctypes
import dataclasses
import http.server
import json
import os
import pathlib
import queue
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest

SOURCE = pathlib.Path(os.environ["CLUSTERIP_SOURCE"]).resolve()
BUILD = pathlib.Path(os.environ["CLUSTERIP_BUILD"]).resolve()
CLUSTERIP = BUILD / "cli/clusterip"
PLUGIN = BUILD / "plugin/libclusterip.so.1"
FALLBACK_PROXY = BUILD / "run/fallback_proxy"
BPFTOOL = shutil.which("bpftool", path="/usr/sbin:/sbin:/usr/local/sbin:" + os.environ["PATH"])
CMAKE = shutil.which(os.environ.get("CMAKE_COMMAND", "cmake"))
IN_SANDBOX = os.environ.get("CLUSTERIP_SANDBOX")  # its directory, the only one of the host's that is writable there
NAME = "clusterip-documents-"  # of the cgroup and the directory; a process id follows
CGROUPS = "/sys/fs/cgroup"  # of the sandbox
TRIAL = f"{CGROUPS}/trial"
PATIENCE = 30  # seconds, for whatever is awaited: far more than it takes

DOCUMENTS = ["README.md"] + sorted(str(path.relative_to(SOURCE)) for path in SOURCE.glob("docs/**/*.md")) + \
    ["plugin/hosts/README.md"]

# What begins a command, in a list of commands and in prose.
PROGRAMS = set("""sudo clusterip fallback_proxy bpftool cat cc cp apt cmake curl echo find findmnt fuser ip iperf3 journalctl mkdir
                  mount nft nginx/build promtool rm ss sysctl systemctl systemd-cgls ulimit uname""".split())


# --- the documents ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Block:
    document: str
    line: int
    language: str
    lines: list

    def __str__(self):
        return f"{self.document}:{self.line}"

    @property
    def text(self):
        return "\n".join(self.lines) + "\n"

    def kind(self):
        """toml, json, yaml, c; session: commands behind a prompt, with what they print; list: commands; output: none."""
        if self.language:
            return self.language
        if re.match(r"[$#] ", self.lines[0]):
            return "session"
        if all(first_word(line) in PROGRAMS or re.match(r"\s{2,}|$", line) for line in self.lines):
            return "list"
        return "output"

    def commands(self):
        """Each command, with the lines that the document shows below it."""
        if self.kind() == "list":
            # What is two blanks away from a command says what it does.
            return [(re.split(r"\s{2,}", line)[0], []) for line in self.lines if re.match(r"\S", line)]
        found = []
        if self.kind() == "session":
            for line in self.lines:
                if re.match(r"[$#] ", line):
                    found.append((line[2:], []))
                else:
                    found[-1][1].append(line)
        return found


def first_word(text):
    return text.split(" ")[0]


def read(document):
    return (SOURCE / document).read_text()


def blocks(document):
    """The fenced blocks of a document, the indented ones of a manual page."""
    lines = read(document).splitlines()
    found, block = [], None
    for number, line in enumerate(lines, 1):
        if document.startswith("docs/man/"):
            if line.startswith("    "):
                if block is None:
                    language = "toml" if line.startswith("    [[") else "c" if line.startswith("    #include") else ""
                    block = Block(document, number, language, [])
                    found.append(block)
                block.lines.append(line[4:])
            elif line:
                block = None
            elif block is not None:
                block.lines.append("")
        elif block is not None and line == "```":
            block = None
        elif line.startswith("```"):
            block = Block(document, number, line[3:], [])
            found.append(block)
        elif block is not None:
            block.lines.append(line)
    for block in found:
        while block.lines[-1] == "":
            block.lines.pop()
    return found


def prose_commands(document):
    """Commands in the running text and in tables: code that begins with a program and gives it an argument."""
    text = re.sub(r"^```.*?^```$", "", read(document), flags=re.M | re.S)
    spans = [re.sub(r"\s*\n\s*", " ", span).replace(r"\|", "|") for span in re.findall(r"`([^`]+)`", text)]
    return {span for span in spans if " " in span and first_word(span) in PROGRAMS}


def section(document, heading):
    return re.split(r"^## ", read(document).split(f"\n## {heading}\n")[1], flags=re.M)[0]


def rows(text):
    """The first cells of the tables in a text."""
    return re.findall(r"^\| (.*?) \|", text, re.M)


# --- how each command is run ----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    stage: str = ""  # what is there before; "": what the command before it has left
    instead: str = ""  # what is run for it: placeholders filled in
    holds: tuple = ()  # patterns, each in what it prints
    status: tuple = (0,)
    until: str = ""  # for what does not end by itself: awaited, then SIGTERM
    meanwhile: str = ""  # called again and again until then
    exact: bool = False  # the document shows all that it prints


@dataclasses.dataclass
class Elsewhere:
    reason: str
    file: str  # that has it run
    text: str  # which is in there


ROUTES, NO_ROUTES = " && ip route show table local proto 96", (r"\A(?!.*local)",)
BENCHMARK = "a benchmark: minutes, and figures that nobody judges"
GUEST = "tests/systemd/scenario"
CLUSTER, DEPLOY = "it takes a cluster; a test does the same with a pod of its own", "tests/install/deploy_test.py"
IN_AN_INSTALLATION = Elsewhere("Install.Hosts runs them all, in order, as the document has them", "tests/install/install_test.py",
                               'run("bash", "-ec", commands')

BLOCKS = {
    "docs/testing.md": {command: Elsewhere("it runs a part of what ctest runs", "scripts/test", "ctest --test-dir") for command in (
        "sudo ctest --test-dir build/ci --output-on-failure -L parity",
        "sudo ctest --test-dir build/ci --output-on-failure -LE . -R ReadConfig",
        "sudo build/ci/tests/integration/integration_tests --gtest_filter='Connect.*'",
        "sudo build/ci/tests/parity/parity_tests --gtest_filter='*/MarkOnTheFastPath'")},
    "README.md": {
        "sudo scripts/quickstart": Run("empty", holds=("nothing is left",)),
        "sudo scripts/test": Elsewhere("it runs this test", "scripts/test", "ctest --test-dir"),
        "sudo scripts/install-packages --guest":
            Run("empty", status=(0, 1), holds=(r"packages: (all \d+ are there|installing )",)),
        "sudo tests/systemd/run":
            Elsewhere("a guest in an emulated machine: minutes, and packages that nothing else needs", "tests/systemd/run",
                      "qemu-system-x86_64 -accel tcg"),
        "sudo scripts/install-packages": Run("empty", holds=(r"packages: all \d+ are there",)),
        "sudo cmake --preset deb && sudo cmake --build --preset deb && sudo cpack --preset deb":
            Elsewhere("Install.Packages makes the packages, of the build under test", "tests/install/install_test.py", "DEB"),
        "sudo apt install ./build/deb/clusterip_*.deb ./build/deb/libclusterip1_*.deb":
            Elsewhere("the guest installs them", GUEST, "dpkg -i packages-1/*.deb"),
        "sudo cmake --preset release -D CLUSTERIP_BUILD_TESTS=OFF && sudo cmake --build --preset release":
            Run("empty", holds=("preset release",)),
        "sudo cmake --install build/release":
            Elsewhere("Install.Tree does, and looks at each file", "tests/install/install_test.py", 'run(CMAKE, "--install"'),
        "sudo systemctl daemon-reload": Elsewhere("it takes systemd", GUEST, "systemctl daemon-reload"),
        "mkdir -p /tmp/one /tmp/two && echo one >/tmp/one/name && echo two >/tmp/two/name":
            Run("empty", instead="mkdir -p one two && echo one >one/name && echo two >two/name"),
        "python3 -m http.server --bind 127.0.0.1 --directory /tmp/one 9001 >/dev/null 2>&1 &":
            Run(instead="python3 -m http.server --bind 127.0.0.1 --directory one 9001 >/dev/null 2>&1 &"),
        "python3 -m http.server --bind 127.0.0.1 --directory /tmp/two 9002 >/dev/null 2>&1 &":
            Run(instead="python3 -m http.server --bind 127.0.0.1 --directory two 9002 >/dev/null 2>&1 & "
                        "for port in 9001 9002; do curl -s --retry 30 --retry-connrefused 127.0.0.1:$port/name; done",
                holds=("one", "two")),
        "until curl -s 127.0.0.1:9001/name && curl -s 127.0.0.1:9002/name; do sleep 0.2; done": Run(exact=True),
        "sudo mkdir /sys/fs/cgroup/trial": Run(instead=f"test -d {TRIAL}"),
        "sudo clusterip load --config config/trial.toml": Run(exact=True),
        "sudo sh -c 'echo $$ >/sys/fs/cgroup/trial/cgroup.procs; for i in $(seq 40); do curl -s http://10.96.0.10/name; done "
        "| sort | uniq -c'": Run(exact=True),
        "sudo clusterip resolve 10.96.0.10:80": Run(holds=("127.0.0.1:900[12], one of 2 active backends",)),
        "sudo clusterip unload": Run(exact=True),
        "sudo rmdir /sys/fs/cgroup/trial; kill %1 %2; rm -r /tmp/one /tmp/two": Run(instead=f"mkdir {TRIAL}/x && rmdir {TRIAL}/x"),
        "sudo clusterip run --config /etc/clusterip/clusterip.toml": Run("empty", until=r"serving 2 services"),
        "sudo clusterip load --config /etc/clusterip/clusterip.toml":
            Run("empty", instead="sudo clusterip load --config config/clusterip.toml",
                holds=("^loaded 2 services, 4 backends",)),
        "sudo bpftool prog show name sock4_connect": Run("loaded"),
        "sudo bpftool map show name Service_Map": Run(),
        "sudo clusterip status": Run(),
        "sudo clusterip unload #2": Run(exact=True),
        "sudo fallback_proxy --config config/clusterip.toml": Run("empty", until=r"serving 2 services"),
        "ip route show table local proto 96": Run("proxy", exact=True),
        "for i in $(seq 40); do curl -s http://192.10.100.100:5201/name; done | sort | uniq -c": Run(exact=True),
        "sudo fallback_proxy --status": Run(exact=True),
    },
    "docs/benchmarks.md": {
        "sudo scripts/install-packages --benchmarks":
            Run("empty", status=(0, 1), holds=(r"packages: (all \d+ are there|installing .*linux-perf)",)),
        "sudo tests/bench/compare/run --quick":
            Elsewhere(BENCHMARK, "tests/bench/compare/compare_test.py", 'SHORT = ["--only", "connect", "--quick"'),
        "sudo tests/bench/compare/run --document": Elsewhere(BENCHMARK, "tests/bench/compare/run", "draw_document(*done)"),
        "sudo tests/bench/compare/run --from docs/charts/veth.json --from docs/charts/loopback.json --document":
            Elsewhere("it writes the document", "tests/bench/compare/compare_test.py", 'tree / f"docs/charts/{stage}.json"'),
        "sudo CLUSTERIP_SOURCE=. CLUSTERIP_BUILD=build/release tests/bench/kubernetes.py":
            Elsewhere(BENCHMARK, "tests/bench/kubernetes.py", "tests/bench/kubernetes.py [SERVICES ENDPOINTS SECONDS]"),
        "cmake --preset release && cmake --build --preset release --target bench_publish":
            Run("empty", holds=("target bench_publish",)),
        "sudo build/release/tests/bench/bench_publish":
            Elsewhere(BENCHMARK, "tests/bench/CMakeLists.txt", "add_executable(bench_publish"),
        "cmake --preset release && cmake --build --preset release --target bench_cost":
            Run("empty", holds=("target bench_cost",)),
        "sudo build/release/tests/bench/bench_cost":
            Elsewhere(BENCHMARK, "tests/bench/CMakeLists.txt", "add_executable(bench_cost"),
    },
    "docs/cli.md": {
        "clusterip [--plugin PATH] VERB [OPTION...] [ARGUMENT]":
            Run("empty", instead=f"clusterip --plugin {PLUGIN} check --json clusterip.toml", holds=('"valid": ?true',)),
        "clusterip check clusterip.toml": Run("empty", exact=True),
        "clusterip check broken.toml": Run(status=(3,), exact=True),
        "clusterip probe": Run("empty"),
        "clusterip load --config clusterip.toml": Run("empty", exact=True),
        "clusterip unload": Run("loaded", exact=True),
        "clusterip unload #2": Run(exact=True),
        "clusterip status": Run("service", exact=True),
        "clusterip trace": Run("traced", until=r"is ejected", meanwhile="connect_and_fail"),
        "clusterip resolve 192.10.100.100:5201": Run("loaded", exact=True),
        "clusterip resolve 192.10.100.100:80": Run(exact=True),
        "clusterip resolve 192.0.2.1:80": Run(exact=True),
        "clusterip resolve 127.0.1.9:80": Run("both up", exact=True),
    },
    "docs/configuration.md": {
        "nft insert rule inet sidecar output meta mark 0xc1 return": Run("sidecar"),
    },
    "docs/embedding.md": {
        "nft add table inet sidecar": Run("sidecar"),
        "nft 'add chain inet sidecar output { type nat hook output priority -100; }'": Run(),
        "nft add rule inet sidecar output meta skuid 1337 return": Run(),
        "nft add rule inet sidecar output meta l4proto tcp redirect to :15001": Run(),
        "nft insert rule inet sidecar output meta mark 0xc1 return": Run(),
    },
    "docs/fallback_proxy.md": {
        "sudo fallback_proxy --config clusterip.toml": Run("empty", until=r"serving 2 services"),
        "fallback_proxy --config FILE":
            Run("empty", instead="fallback_proxy --config clusterip.toml", until=r"serving 2 services"),
        "fallback_proxy --config FILE --take-over":
            Run("proxy", instead="fallback_proxy --config clusterip.toml --take-over", until=r"has ended"),
        "fallback_proxy --status [--json]":
            Run("proxy", instead="fallback_proxy --status && fallback_proxy --status --json && fallback_proxy --status "
                                 "--config clusterip.toml && fallback_proxy --status --control /run/clusterip/control.sock",
                holds=("SERVING", '"services":')),
        "fallback_proxy --cleanup": Run("proxy killed", instead="fallback_proxy --cleanup" + ROUTES, holds=NO_ROUTES),
        "ip route show table local proto 96": Run("proxy"),
    },
    "docs/service.md": {
        "clusterip check /etc/clusterip/clusterip.toml": Run("service", holds=("valid",)),
        "sudo systemctl enable --now clusterip":
            Elsewhere("it takes systemd", GUEST, 'fact "systemctl enable works" systemctl enable clusterip'),
        "sudo clusterip status": Run(holds=(r"2 services, 4 backends; clusterip \S+, pid \d+",)),
        "sudo clusterip run --config /etc/clusterip/clusterip.toml":
            Run("empty", until=r"serving 2 services: 1 by the fast path, 1 by the userspace engine"),
    },
    "docs/troubleshooting.md": {
        "sudo clusterip probe": Run("loaded", holds=("engine bpf would carry the services",)),
        "sudo clusterip status": Run(holds=("canary: rewritten",)),
        "sudo clusterip resolve 10.96.96.96:5201": Run(holds=("reaches",)),
        "sudo bpftool cgroup tree": Run(holds=(r"/trial\b[^/]*sock4_connect",)),
    },
    "plugin/hosts/README.md": {
        "cp -r /usr/share/doc/libclusterip-dev/examples/hosts hosts && cd hosts": IN_AN_INSTALLATION,
        "cc -std=c99 -O2 -I. $(pkg-config --cflags clusterip) -o host c/host.c -ldl": IN_AN_INSTALLATION,
        "cc -std=c99 -O2 -shared -fPIC -I. $(pkg-config --cflags clusterip lua5.3) -o clusterip_lua.so haproxy/clusterip_lua.c "
        "-ldl": IN_AN_INSTALLATION,
        "nginx/build .": IN_AN_INSTALLATION,
    },
    "docs/kubernetes.md": {
        "podman build -f deploy/kubernetes/Containerfile -t clusterip:0.1.0 .":
            Elsewhere("it builds all of this anew, from packages of the network; here, the name is compared", DEPLOY, "-t {CONTAINER"),
        "kubectl apply -f deploy/kubernetes/clusterip.yaml":
            Elsewhere("kubectl does that with an API server of the tests", DEPLOY, '"apply", "--validate=false", "-f", MANIFESTS'),
        "kubectl -n kube-system rollout status daemonset/clusterip": Elsewhere(CLUSTER, DEPLOY, '"it serves"'),
        "kubectl -n kube-system exec daemonset/clusterip -- clusterip status --config /etc/clusterip/clusterip.toml":
            Elsewhere(CLUSTER, DEPLOY, '["clusterip", "status", "--config", "/etc/clusterip/clusterip.toml"]'),
        "kubectl -n kube-system edit configmap clusterip": Elsewhere(CLUSTER, DEPLOY, "'on_exit = \"detach\"'"),
        "kubectl -n kube-system logs -l app=clusterip --prefix --tail=3":
            Elsewhere(CLUSTER, DEPLOY, '"reloaded" in log.read_text()'),
        "kubectl delete -f deploy/kubernetes/clusterip.yaml": Elsewhere(CLUSTER, DEPLOY, "pod.terminate()"),
    },
    "docs/man/clusterip.1.md": {
        "clusterip check /etc/clusterip/clusterip.toml && systemctl reload clusterip":
            Elsewhere("it takes systemd", GUEST, "systemctl reload clusterip && within 30 answers $vip backend2"),
        "clusterip resolve 10.96.0.10:80": Run("web", holds=("service web",)),
        "clusterip trace --service web --verdict no_backend --json":
            Run("web", until=r'"service":"web".*"verdict":"no_backend"', meanwhile="connect_to_web"),
    },
}

# Blocks that show what was printed, by their first line: what prints it.
OUTPUTS = {
    "README.md": {
        "  application                          kernel                                   network": "a picture",
        "== Two backends and a client, each in a network namespace; no route leads to 192.10.100.100":
            "sudo scripts/quickstart",
        "== tests": "sudo scripts/test",
        'broken.toml:2:1: engine.mod: unknown key, did you mean "mode"?':
            Run("empty", instead="clusterip check broken.toml", status=(3,)),
    },
    "docs/configuration.md": {
        'clusterip.toml:2:8: engine.mode: expected auto, bpf or userspace, got "bfp", did you mean "bpf"?':
            Run("empty", instead="cd mistakes && clusterip check clusterip.toml", status=(3,), exact=True),
    },
    "docs/service.md": {
        "info: serving 3 services: 2 by the fast path, 1 by the userspace engine":
            Run("empty", instead="clusterip run --config reloaded.toml", until=r"reloaded:", meanwhile="reload_once"),
    },
}

SERVED = "10.96.96.96:5201"
PIN = "/sys/fs/bpf/clusterip"

PROSE = {
    "bpftool cgroup detach CGROUP connect4 pinned DIR/sock4_connect":
        Run("attached", instead=f"bpftool cgroup detach {CGROUPS}/other connect4 pinned {PIN}/sock4_connect && "
                                f"bpftool cgroup show {CGROUPS}/other", holds=(r"\A(?!.*sock4_connect)",)),
    "bpftool cgroup tree": Run("loaded", holds=("sock4_connect",)),
    "bpftool link": Run("loaded", holds=("cgroup",)),
    "bpftool map": Run("loaded", holds=("Service_Map",)),
    "bpftool map dump": Run("loaded", instead=f"bpftool map dump pinned {PIN}/Service_Map", holds=("key|5201",)),
    "cat /proc/PID/cgroup": Run("empty", instead="cat /proc/self/cgroup", holds=("^0::/trial$",)),
    "clusterip --help": Run("empty", holds=("Verbs:",)),
    "clusterip --version": Run("empty", holds=(r"^clusterip \d+\.\d+\.\d+$", r"^libclusterip \d+\.\d+\.\d+, ABI \d",)),
    "clusterip VERB --help":
        Run("empty", instead="for verb in run check probe load unload status trace resolve; do "
                             "clusterip $verb --help || exit; done",
            holds=("Usage: clusterip run", "Usage: clusterip resolve")),
    "clusterip check": Run("empty", instead="clusterip check - <clusterip.toml", holds=("valid",)),
    "clusterip check FILE": Run("empty", instead="clusterip check clusterip.toml", holds=("valid",)),
    "clusterip check /etc/clusterip/clusterip.toml": Run("empty", holds=("valid",)),
    "clusterip load": Run("empty", instead="clusterip load --config clusterip.toml", holds=("^loaded",)),
    "clusterip probe": Run("empty", holds=("engine bpf",)),
    "clusterip resolve": Run("loaded", instead=f"clusterip resolve {SERVED}", holds=("reaches",)),
    "clusterip resolve VIP:PORT": Run("loaded", instead=f"clusterip resolve {SERVED}", holds=("reaches",)),
    "clusterip run": Run("empty", instead="clusterip run --config clusterip.toml", until="serving 2 services"),
    "clusterip run --engine bpf":
        Run("empty", instead="clusterip run --config clusterip.toml --engine bpf", until="serving 2 services"),
    "clusterip run --engine userspace":
        Run("empty", instead="clusterip run --config clusterip.toml --engine userspace", until="serving 2 services"),
    "clusterip status": Run("loaded", holds=("^SERVICE",)),
    "clusterip status --pin DIR": Run("loaded", instead=f"clusterip status --pin {PIN}", holds=("^SERVICE",)),
    "clusterip trace": Run("loaded", until=r"-> 10\.244\.", meanwhile="connect"),
    "clusterip unload": Run("loaded", holds=("^unloaded",)),
    "clusterip unload --on-exit FILE":
        Run("loaded", instead=f"clusterip unload --on-exit keep.toml && test -e {PIN}/sock4_connect && "
                              f"clusterip unload --on-exit detach.toml && ! test -e {PIN}"),
    "curl http://10.96.96.96:5201/":
        Elsewhere("each host has this VIP in its tests", "tests/hosts/hosts_test.py", 'url = f"http://{stage.VIP}:{stage.PORT}/"'),
    "echo 0 > CGROUP/cgroup.freeze": Run("frozen", instead=f"echo 0 > {CGROUPS}/other/cgroup.freeze && "
                                                           f"cat {CGROUPS}/other/cgroup.events", holds=("frozen 0",)),
    "fallback_proxy --cleanup": Run("proxy killed", instead="fallback_proxy --cleanup" + ROUTES, holds=NO_ROUTES),
    "fallback_proxy --status": Run("proxy", holds=("SERVING",)),
    "fallback_proxy --take-over":
        Run("proxy", instead="fallback_proxy --config clusterip.toml --take-over", until="has ended"),
    "find /sys/fs/cgroup -type d": Run("empty", holds=(f"^{TRIAL}$",)),
    "findmnt -t bpf": Run("empty", holds=("^/sys/fs/bpf .*bpf",)),
    "findmnt -t cgroup2": Run("empty", holds=(f"^{CGROUPS} .*cgroup2",)),
    "fuser DIR": Run("service", instead=f"fuser {PIN}", holds=(r"\d",)),
    "ip addr add VIP/32 dev lo":
        Run("empty", instead="ip addr add 10.96.96.96/32 dev lo && ip addr del 10.96.96.96/32 dev lo"),
    "ip link set lo up": Run("empty"),
    "ip route add unreachable VIP":
        Run("empty", instead="ip route add unreachable 10.96.96.96 && ! ip route get 10.96.96.96 && "
                             "ip route del unreachable 10.96.96.96"),
    "ip route del local X dev lo table local proto 96":
        Run("proxy killed", instead="ip route del local 10.96.96.96 dev lo table local proto 96"),
    "ip route flush": Run("proxy", instead="ip route flush table local proto 96"),
    "ip route get BACKEND": Run("empty", instead="ip route get 10.244.209.27", holds=("dev lo",)),
    "ip route get VIP": Run("proxy", instead="ip route get 10.96.96.96", holds=("^local 10.96.96.96",)),
    "ip route show table local proto 96": Run("proxy killed", holds=("^local 10.96.96.96",)),
    "ip route show table local X": Run("proxy", instead="ip route show table local 10.96.96.96", holds=("proto 96",)),
    "journalctl -u clusterip": Elsewhere("it takes systemd", GUEST, "journalctl -u clusterip"),
    "mkdir -p /run/cgroup2 && mount -t cgroup2 none /run/cgroup2":
        Run("empty", instead="mkdir -p /run/cgroup2 && mount -t cgroup2 none /run/cgroup2 && "
                             "ls /run/cgroup2 && umount /run/cgroup2",
            holds=("^trial$",)),
    "mount -t bpf -o mode=0700 bpf /sys/fs/bpf":
        Run("empty", instead="umount /sys/fs/bpf && mount -t bpf -o mode=0700 bpf /sys/fs/bpf && stat -c %a /sys/fs/bpf",
            holds=("700$",)),
    "rm -r DIR": Run("loaded", instead=f"rm -r {PIN} && bpftool cgroup tree {TRIAL}", holds=(r"\A(?!.*sock4_connect)",)),
    "rm -r /sys/fs/bpf/clusterip":
        Run("loaded", instead=f"rm -r {PIN} && bpftool cgroup tree {TRIAL}", holds=(r"\A(?!.*sock4_connect)",)),
    "ss -tlnp sport = :PORT": Run("proxy", instead="ss -tlnp sport = :5201", holds=("fallback_proxy",)),
    "ss -xlp": Run("proxy", holds=("@clusterip/local_vips",)),
    "ss -xap 'src @clusterip/local_vips'": Run("proxy", holds=("fallback_proxy",)),
    "sudo build/ci/tests/torture/torture --publications 1000000":
        Elsewhere("a million takes minutes; ctest runs it with fewer", "tests/torture/CMakeLists.txt", "--publications"),
    "sudo clusterip status": Run("loaded", holds=("^SERVICE",)),
    "sudo clusterip unload": Run("loaded", holds=("^unloaded",)),
    "sudo clusterip unload --pin DIR": Run("loaded", instead=f"sudo clusterip unload --pin {PIN}", holds=("^unloaded",)),
    "sudo fallback_proxy --cleanup":
        Run("proxy killed", instead="sudo fallback_proxy --cleanup" + ROUTES, holds=NO_ROUTES),
    "sudo tests/bench/compare/run": Elsewhere(BENCHMARK, "tests/bench/compare/compare_test.py", 'SHORT = ["--only", "connect", "--quick"'),
    "sysctl fs.epoll.max_user_watches": Run("empty", holds=(r"= \d+",)),
    "sysctl fs.file-max": Run("empty", holds=(r"= \d+",)),
    "sysctl fs.inotify.max_user_instances": Run("empty", holds=(r"= \d+",)),
    "sysctl net.ipv4.ip_unprivileged_port_start": Run("empty", holds=(r"= \d+",)),
    "sysctl net.ipv6.conf.lo.disable_ipv6=0": Run("empty"),
    "systemctl enable --now clusterip":
        Elsewhere("it takes systemd", GUEST, 'fact "systemctl enable works" systemctl enable clusterip'),
    "systemctl reload": Elsewhere("it takes systemd", GUEST, "systemctl reload clusterip"),
    "systemctl reload clusterip": Elsewhere("it takes systemd", GUEST, "systemctl reload clusterip"),
    "systemctl restart clusterip": Elsewhere("it takes systemd", GUEST, "systemctl restart clusterip"),
    "systemctl status": Elsewhere("it takes systemd", GUEST, "systemctl status --no-pager clusterip"),
    "ulimit -Hn": Run("empty", holds=(r"^\d+$|unlimited",)),
    "ulimit -n": Run("empty", holds=(r"^\d+$|unlimited",)),
    "uname -r": Run("empty", holds=(r"^\d+\.\d+",)),
}


# --- what is printed, and what a document shows of it --------------------------------------------------------------------


# What differs from one time to the next, and what it looks like.
VARIABLE = {
    r"\w+\[\d+\]": r"\S+\[\d+\]",  # name[pid]
    r"\b(?=[0-9a-f]*\d)[0-9a-f]{16}\b": r"[0-9a-f]{16}",
    r"[\d.]+ [KMG](?=Bytes|bits)": r"[\d.]+ [KMG]?",
    r"\d+(?:,\d+)+": r"\d+(?:,\d+)+",
    r"\d+": r"\d+",
    r"the root cgroup": f"(?:the root cgroup|{TRIAL})",  # here it is never the root
}


def shape(line):
    """The pattern of a line: its words as they are; figures, ids and names of processes by their form."""
    result, at = "", 0
    line = re.sub(r"\s+", " ", line.strip())
    for match in re.finditer("|".join(f"({pattern})" for pattern in VARIABLE), line):
        result += re.escape(line[at:match.start()]) + list(VARIABLE.values())[match.lastindex - 1]
        at = match.end()
    return result + re.escape(line[at:])


def columns(line):
    """The titles of a table, if the line is that."""
    titles = re.split(r"\s{2,}", line.strip())
    return titles if len(titles) > 2 and all(re.fullmatch(r"[A-Z][A-Z ]*", title) for title in titles) else None


def compare(shown, said, exact=False, unanchored=False):
    """None, or what of the lines of a document is not in what was printed, in this order."""
    lines = [line for line in said.splitlines() if line.strip()]
    wanted = [line for line in shown if line.strip()]
    at = 0
    for line in wanted:
        if line.strip() == "...":
            exact = False
            continue
        pattern = ("" if unanchored else r"\A") + shape(line) + r"\Z"
        while at < len(lines) and not (columns(line) == columns(lines[at]) if columns(line) else
                                       re.search(pattern, re.sub(r"\s+", " ", lines[at].strip()))):
            if exact:
                return f"the document has\n{line}\nand this was printed:\n{lines[at]}"
            at += 1
        if at == len(lines):
            return f"the document has\n{line}\nwhich is not in, or not in this order:\n{said}"
        at += 1
    if exact and at < len(lines):
        return f"this was printed, and the document does not show it:\n{lines[at]}"
    return None


def paths_of(value, prefix=""):
    """The keys of a JSON object as docs/cli.md writes them: `a`, `a.b`, `a[]`, `a[].b`."""
    found = set()
    for key, inner in value.items():
        found.add(f"{prefix}{key}")
        if isinstance(inner, dict):
            found |= paths_of(inner, f"{prefix}{key}.")
        elif isinstance(inner, list):
            for element in inner:
                if isinstance(element, dict):
                    found |= paths_of(element, f"{prefix}{key}[].")
    return found


def fields(text):
    """The fields of a table; `.x` behind `a.y` is `a.x`. A list's own row may be written `a[]`."""
    found = set()
    for cell in rows(text):
        prefix = ""
        for name in re.findall(r"`([^`]+)`", cell):
            name = prefix + name if name.startswith(".") else name
            prefix = name.rpartition(".")[0]
            found.add(re.sub(r"\[\]$", "", name))
    return found


# --- the stages -----------------------------------------------------------------------------------------------------------

ADDRESSES = {"backend1": "10.244.209.27", "backend2": "10.244.105.222"}

STATUS_SCENARIO = """
[[service]]
name = "web"
vip = "10.96.0.1"
port = 80
health = { interval = "100ms", timeout = "500ms", rise = 2, fall = 2 }
backends = [ "127.0.0.1:8081", "127.0.0.1:8082" ]
[[service]]
name = "proxied"
vip = "127.0.1.9"
port = 80
engine = "userspace"
backends = [ "127.0.0.1:8081", "127.0.0.1:8082" ]
"""

RELOADED = """
[[service]]
name = "web"
vip = "10.96.0.1"
port = 80
backends = [ "10.244.0.8:80", "10.244.0.7:80" ]
[[service]]
name = "other"
vip = "10.96.0.2"
port = 80
backends = [ "10.244.0.8:80" ]
[[service]]
name = "proxied"
vip = "127.0.1.9"
port = 80
engine = "userspace"
backends = [ "127.0.0.1:8081" ]
"""

FILES = {
    "broken.toml": '[engine]\nmod = "auto"\n[[service]]\nname = "web"\nvip  = "10.0.0.300"\nport = 80\nbackends = []\n',
    "mistakes/clusterip.toml": """[engine]
mode = "bfp"

[[service]]
name = "virtual_svc1"
vip = "192.10.100.100"
port = 5201
helth = {}
backends = [
  "10.244.209.27:5201",
  { address = "10.244.105.222", port = 5201, wieght = 3 },
  "10.244.209.27:5201",
]
""",
    "keep.toml": 'service = []\n',
    "detach.toml": '[engine]\non_exit = "detach"\n',
}

# With the trial cgroup in [engine].
CONFIGURATIONS = {
    "/etc/clusterip/clusterip.toml": STATUS_SCENARIO,
    "traced.toml": """
[[service]]
name = "virtual_svc2"
vip = "192.10.100.100"
port = 5201
affinity = "1h"
eject = { failures = 3, time = "10s" }
backends = [ "10.244.209.27:1", "10.244.105.222:1" ]
""",
    "web.toml": """
[[service]]
name = "web"
vip = "10.96.0.10"
port = 80
backends = [ { address = "10.244.209.27", port = 8080, state = "drain" } ]
""",
    "reloaded.toml": RELOADED,
    "both.toml": STATUS_SCENARIO.replace("127.0.0.1:8082", "10.244.209.27:5201"),
    "metrics.toml": '[metrics]\nlisten = "127.0.0.1:9464"\n' + STATUS_SCENARIO,
}


def on_trial(text):
    """The configuration, for the trial cgroup."""
    engine = f'[engine]\ncgroup = "{TRIAL}"\n'
    return text.replace("[engine]\n", engine, 1) if "[engine]\n" in text else engine + text


WRAPPERS = {
    "sudo": 'exec "$@"',
    # `run` would attach to the root cgroup with a file that says nothing else.
    "clusterip": f"""
verb=$1
case $verb in
  load) case " $* " in *" --cgroup "*) ;; *) set -- "$@" --cgroup {TRIAL} ;; esac ;;
  run) [ "$2" = --help ] || grep -qx 'cgroup = "{TRIAL}"' "$3" || {{ echo "$3 does not name {TRIAL}" >&2; exit 99; }} ;;
esac
[ "$verb" = --plugin ] || set -- --plugin {PLUGIN} "$@"
exec {CLUSTERIP} "$@" """,
    # It walks the ids of the whole machine, and gives up where a program of somebody else ends meanwhile.
    "bpftool": f"""
for attempt in 1 2 3 4 5 6 7 8 9; do
  said=$({BPFTOOL} "$@" 2>&1)
  status=$?
  case $status:$said in *"by id ("*"No such file or directory"*) ;; *) break ;; esac
done
[ -z "$said" ] || printf '%s\n' "$said"
exit $status""",
    # Of packages that are missing it is enough to see which these are.
    "apt-get": 'echo "apt-get $*: not here"; exit 1',
    # The build under test stands for build/release: presets and targets must be there, and nothing is built.
    "cmake": f"""
cd {SOURCE}
build=false
while [ $# -gt 0 ]; do
  case $1 in
    --build) build=true ;;
    --preset) {CMAKE} --list-presets=$($build && echo build || echo configure) | grep -q "\\"$2\\"" || exit 1
              echo "preset $2"; shift ;;
    -D) shift ;;
    --target) shift
              for target; do
                {CMAKE} --build {BUILD} --target help | grep -q "^$target: " || exit 1; echo "target $target"
              done
              exit ;;
    *) exit 2 ;;
  esac
  shift
done""",
}


class Server(http.server.ThreadingHTTPServer):
    """Says its name to whoever asks, as the pages of the quickstart's backends do."""

    daemon_threads = True

    def __init__(self, name, address, port):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(f"{name}\n".encode())

            def log_message(self, *_):
                pass

        super().__init__((address, port), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def end(self):
        self.shutdown()
        self.server_close()


class Program:
    """A command that goes on until it is ended."""

    def __init__(self, sandbox, command):
        self.command = command
        self.process = subprocess.Popen(["bash", "-c", command], cwd=sandbox.directory, text=True, errors="replace",
                                        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.lines, self.said = queue.Queue(), ""
        self.asked = False  # for who is called meanwhile: its part is done
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        with self.process.stdout as lines:
            for line in lines:
                self.lines.put(line)
        self.lines.put(None)

    def line(self, seconds):
        """The next line; "" when there is none so soon."""
        try:
            line = self.lines.get(timeout=seconds)
        except queue.Empty:
            return ""
        if line is None:
            raise AssertionError(f"{self.command}: ended early, exit {self.process.wait()}\n{self.said}")
        self.said += line
        return line

    def await_line(self, pattern, meanwhile=lambda: None):
        deadline = time.monotonic() + PATIENCE
        while not re.search(pattern, self.said):
            if time.monotonic() > deadline:
                raise AssertionError(f"{self.command}: no line with {pattern} in\n{self.said}")
            meanwhile()
            self.line(0.05)
        return self.said

    def end(self, how=signal.SIGTERM):
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"{self.command}: does not end by {how}\n{self.said}") from None


class Sandbox:
    def __init__(self, directory):
        self.directory = pathlib.Path(directory)
        self.servers, self.programs = [], []

    def shell(self, command, status=(0,)):
        done = subprocess.run(["bash", "-c", command], cwd=self.directory, text=True, errors="replace", check=False,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120)
        if done.returncode not in status:
            raise AssertionError(f"{command}: exit {done.returncode}\n{done.stdout}")
        return done.stdout

    def json(self, command, status=(0,)):
        done = subprocess.run(["bash", "-c", command], cwd=self.directory, text=True, capture_output=True, check=False,
                              timeout=PATIENCE)
        if done.returncode not in status:
            raise AssertionError(f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return json.loads(done.stdout)

    def start(self, command):
        program = Program(self, command)
        self.programs.append(program)
        return program

    def make(self):
        """What is there in all stages. Everything here ends with the namespaces."""
        tools = self.directory / "tools"
        tools.mkdir()
        for name, text in WRAPPERS.items():
            (tools / name).write_text(f"#!/bin/sh\n{text.lstrip()}\n")
            (tools / name).chmod(0o755)
        (tools / "fallback_proxy").symlink_to(FALLBACK_PROXY)
        os.environ.update(PATH=f"{tools}:/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin", LC_ALL="C",
                          TMPDIR=str(self.directory))
        self.shell(f"""set -e
            mount --bind . .
            mkdir etc build && cp -a /etc/. etc && mkdir -p etc/clusterip && mount --bind etc /etc
            mount -t tmpfs -o mode=0755 tmpfs /run && mkdir /run/clusterip
            umount -R {CGROUPS} && mount -t cgroup2 none {CGROUPS}
            mount -t bpf -o mode=0700 bpf /sys/fs/bpf
            mount -o remount,bind,ro /
            ip link set lo up""")
        if not (pathlib.Path(CGROUPS) / "cgroup.type").exists():  # the machine's root alone has no such file
            raise AssertionError("the cgroup hierarchy of the sandbox begins at the machine's root")
        os.mkdir(TRIAL)
        (pathlib.Path(TRIAL) / "cgroup.procs").write_text("0")
        for address in ADDRESSES.values():
            self.shell(f"ip address add {address}/32 dev lo")
        for name, address in ADDRESSES.items():
            self.servers.append(Server(name, address, 5201))
        self.servers.append(Server("web", "127.0.0.1", 8081))

        for name in ("scripts", "config"):
            shutil.copytree(SOURCE / name, self.directory / name)
        (self.directory / "build/release").symlink_to(BUILD)
        example = on_trial(read("config/clusterip.toml"))
        for name, text in {**FILES, "config/clusterip.toml": example, "clusterip.toml": example,
                           **{name: on_trial(text) for name, text in CONFIGURATIONS.items()}}.items():
            path = self.directory / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)

    # What is there before a command. Each is left for the next by clear().

    def stage_empty(self):
        pass

    def stage_loaded(self, file="clusterip.toml"):
        self.shell(f"clusterip load --config {file}")

    def stage_traced(self):
        self.stage_loaded("traced.toml")

    def stage_web(self):
        self.stage_loaded("web.toml")

    def stage_service(self):
        service = self.start("clusterip run --config /etc/clusterip/clusterip.toml")
        service.await_line("serving 2 services")
        service.await_line(r"127\.0\.0\.1:8082 of web is down")
        self.shell("clusterip status")  # rates are since the last look

    def stage_both_up(self):
        self.start("clusterip run --config both.toml").await_line("serving 2 services")

    def stage_proxy(self):
        proxy = self.start("fallback_proxy --config config/clusterip.toml")
        proxy.await_line("serving 2 services")
        return proxy

    def stage_proxy_killed(self):
        self.stage_proxy().end(signal.SIGKILL)

    def stage_sidecar(self):
        self.shell("nft add table inet sidecar && "
                   "nft 'add chain inet sidecar output { type nat hook output priority -100; }'")

    def stage_attached(self):
        self.stage_loaded()
        self.shell(f"mkdir {CGROUPS}/other && "
                   f"bpftool cgroup attach {CGROUPS}/other connect4 pinned {PIN}/sock4_connect multi")

    def stage_frozen(self):
        self.shell(f"mkdir {CGROUPS}/other && echo 1 > {CGROUPS}/other/cgroup.freeze")

    def clear(self):
        while self.programs:
            self.programs.pop().end()
        if pathlib.Path("/run/clusterip/control.sock").exists():
            os.unlink("/run/clusterip/control.sock")  # of a killed one
        self.shell("clusterip unload && fallback_proxy --cleanup")
        self.shell(f"nft delete table inet sidecar; rmdir {CGROUPS}/other", status=(0, 1))
        if os.path.exists(PIN) or self.shell("ip route show table local proto 96"):
            raise AssertionError("something is left")

    def enter(self, stage):
        self.clear()
        getattr(self, "stage_" + stage.replace(" ", "_"))()

    # What applications do meanwhile.

    def connects(self, address, port):
        with socket.socket() as client:
            client.settimeout(PATIENCE)
            with contextlib.suppress(ConnectionRefusedError):
                client.connect((address, port))

    def connect(self, _):
        self.connects("192.10.100.100", 5201)

    def connect_to_web(self, _):
        self.connects("10.96.0.10", 80)

    def connect_and_fail(self, program):
        """A refused port shows that it looks, and changes nothing. Then the first by policy, and two by affinity: with the
        third failure comes the ejection."""
        if not program.said:
            self.connects("192.10.100.100", 80)
        elif not program.asked:
            for port in (5201, 5201, 80, 5201):
                self.connects("192.10.100.100", port)
            program.asked = True

    def reload_once(self, program):
        if "serving 3 services" in program.said and not program.asked:
            changed = RELOADED.replace("10.244.0.7", "10.244.0.9").replace("port = 80", 'port = 80\npolicy = "maglev"', 1)
            changed += '[[service]]\nname = "new"\nvip = "10.96.0.3"\nport = 80\nbackends = []\n'
            (self.directory / "reloaded.toml").write_text(on_trial(changed))
            program.process.send_signal(signal.SIGHUP)
            program.asked = True

    def run(self, key, how):
        """What the command has printed."""
        if how.stage:
            self.enter(how.stage)
        command = how.instead or key
        if how.until:
            program = self.start(command)
            meanwhile = getattr(self, how.meanwhile or "idle")
            said = program.await_line(how.until, lambda: meanwhile(program))
            status = program.end()
            # trace has no handler: nothing to tidy up.
            if status not in (0, -signal.SIGTERM if "trace" in command else 0):
                raise AssertionError(f"{command}: exit {status} by SIGTERM\n{program.said}")
        else:
            said = self.shell(command, how.status)
        for pattern in how.holds:
            if not re.search(pattern, said, re.M | (re.S if pattern.startswith(r"\A") else 0)):
                raise AssertionError(f"{command}: expected {pattern} in\n{said}")
        return said

    def idle(self, _):
        pass


# --- the tests --------------------------------------------------------------------------------------------------------------


class Documents(unittest.TestCase):
    """What needs no privileges."""

    maxDiff = None

    def test_every_command_in_a_block_is_in_the_table(self):
        for document in DOCUMENTS:
            found = [command for block in blocks(document) for command, _ in block.commands()]
            counts = collections.Counter(found)
            known = collections.Counter(re.sub(r" #\d$", "", key) for key in BLOCKS.get(document, {}))
            self.assertEqual(set(known), set(counts), document)
            for command, count in known.items():
                self.assertLessEqual(count, counts[command], document)

    def test_every_output_has_a_command(self):
        for document in DOCUMENTS:
            found = {block.lines[0].strip("\n") for block in blocks(document) if block.kind() == "output"}
            self.assertEqual({line.strip() for line in OUTPUTS.get(document, {})}, {line.strip() for line in found}, document)
            self.assertLessEqual({block.kind() for block in blocks(document)},
                                 {"toml", "json", "yaml", "c", "session", "list", "output"})

    def test_every_command_in_prose_is_in_the_table(self):
        self.assertEqual(set().union(*map(prose_commands, DOCUMENTS)), set(PROSE))

    def test_what_runs_elsewhere_is_there(self):
        for table in (*BLOCKS.values(), PROSE):
            for command, how in table.items():
                if isinstance(how, Elsewhere):
                    self.assertIn(how.text, read(how.file), command)

    def check(self, name, text):
        done = subprocess.run([CLUSTERIP, "--plugin", PLUGIN, "check", "-"], input=text, text=True, capture_output=True,
                              check=False)
        self.assertEqual(done.returncode, 0, f"{name}\n{done.stderr}")

    def test_configurations_are_valid(self):
        seen = 0
        for block in (block for document in DOCUMENTS for block in blocks(document) if block.kind() == "toml"):
            with self.subTest(str(block)):
                service = '[[service]]\nname = "x"\nvip = "10.96.0.10"\nport = 80\nbackends = ["10.244.0.1:80"]\n'
                self.check(block, block.text if block.lines[0].startswith("[") else service + block.text)
                seen += 1
        self.assertGreater(seen, 4)

    def test_rules_are_valid_and_of_metrics_that_there_are(self):
        if not shutil.which("promtool"):
            self.fail("promtool is missing: scripts/install-packages --tests")
        rules = [block for document in DOCUMENTS for block in blocks(document) if block.kind() == "yaml"]
        self.assertEqual(len(rules), 1)
        with tempfile.NamedTemporaryFile("w", suffix=".yml") as file:
            file.write(rules[0].text)
            file.flush()
            done = subprocess.run(["promtool", "check", "rules", file.name], text=True, capture_output=True, check=False)
            self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        names = set(re.findall(r"\bclusterip_\w+", rules[0].text))
        self.assertTrue(names)
        self.assertLessEqual(names, fields(read("docs/metrics.md")))

    def test_configuration_document_has_every_key(self):
        text = read("docs/configuration.md")
        reader = read("config/read_config.cpp")
        for table, keys in re.findall(r"constexpr Field<\w+> (\w+)_fields\[\] = \{\n(.*?)\n\};", reader, re.S):
            for key in re.findall(r'^ {4}\{"(\w+)"', keys, re.M):
                if table == "config":
                    self.assertRegex(text, re.compile(rf"^## \[+{key}\]+$", re.M))
                elif table in ("engine", "limits", "userspace", "metrics"):
                    self.assertIn(key, fields(section("docs/configuration.md", f"[{table}]")), table)
                else:
                    self.assertIn(f"\n| `{key}` |", text, table)

    def test_verbs_have_the_documented_options(self):
        table = dict(re.findall(r"^\| `(\w+)(.*?)` \|", read("docs/cli.md").split("## ")[0], re.M))
        self.assertGreater(len(table), 7)
        for verb, usage in table.items():
            said = subprocess.run([CLUSTERIP, verb, "--help"], text=True, capture_output=True, check=True).stdout
            self.assertEqual(set(re.findall(r"--[a-z-]+", usage)) | {"--plugin", "--help"},
                             set(re.findall(r"^  (?:-h \[ )?(--[a-z-]+)", said, re.M)), verb)

    def test_json_parses(self):
        seen = 0
        for block in (block for document in DOCUMENTS for block in blocks(document) if block.kind() == "json"):
            with self.subTest(str(block)):
                self.assertTrue(json.loads(block.text))
                seen += 1
        self.assertGreater(seen, 4)

    def test_synopsis_of_the_library_compiles(self):
        block, = (block for document in DOCUMENTS for block in blocks(document) if block.kind() == "c")
        first, *rest = block.lines
        include, build = re.split(r"\s{2,}", first)
        self.assertRegex(build, r"^cc .*pkg-config --cflags --libs clusterip")  # which Install.Tree runs
        text = "\n".join([include, "int main(void) {", *(line for line in rest if line != "..."), "return 0; }\n"])
        done = subprocess.run(["cc", "-std=c99", "-Wall", "-Werror", "-fsyntax-only", "-include", "stddef.h", "-x", "c",
                               "-I", SOURCE / "plugin/include", "-"], input=text, text=True, capture_output=True, check=False)
        self.assertEqual(done.returncode, 0, done.stderr)

    def test_a_comparison_can_fail(self):
        self.assertIsNone(compare(["at 12:30 curl[17]"], "at 01:02 wget[4]\n"))
        self.assertIsNone(compare(["810 MBytes  6.78 Gbits/sec"], "1.50 GBytes  12.9 Gbits/sec\n"))
        self.assertIsNotNone(compare(["loaded 2 services"], "loaded nothing\n"))
        self.assertIsNotNone(compare(["A  B  C"], "A  B  C  D\n"))
        self.assertIsNotNone(compare(["a 1"], "a 1\nb 2\n", exact=True))
        self.assertIsNotNone(compare(["a", "b"], "b\na\n"))
        self.assertIsNotNone(compare(["of 2 backends"], "of two backends\n"))


class Commands(unittest.TestCase):
    """What is run, in the sandbox."""

    maxDiff = None

    @classmethod
    def setUpClass(cls):
        if not IN_SANDBOX:
            why = "needs root, namespaces and a cgroup v2 hierarchy that may be written to"
            if os.environ.get("CLUSTERIP_REQUIRE_PRIVILEGE") == "1":
                raise AssertionError(why)
            raise unittest.SkipTest(why)
        cls.sandbox = Sandbox(IN_SANDBOX)
        cls.sandbox.make()

    def tearDown(self):
        self.sandbox.clear()

    def assert_shown(self, *what, **how):
        difference = compare(*what, **how)
        if difference:
            self.fail(difference)

    def run_blocks(self, document):
        said, ran, commands = {}, 0, collections.Counter()
        for block in blocks(document):
            for command, shown in block.commands():
                with self.subTest(f"{block}: {command}"):
                    commands[command] += 1
                    table = BLOCKS[document]
                    how = table.get(f"{command} #{commands[command]}", table.get(command))
                    if how is None or isinstance(how, Elsewhere):
                        continue
                    said[command] = self.sandbox.run(command, how)
                    self.assert_shown(shown, said[command], how.exact and shown)
                    ran += 1
            if block.kind() == "output":
                with self.subTest(str(block)):
                    how = next(how for line, how in OUTPUTS[document].items() if line.strip() == block.lines[0].strip())
                    if isinstance(how, Run):
                        self.assert_shown(block.lines, self.sandbox.run("", how), how.exact, unanchored=bool(how.until))
                    elif how in said:
                        self.assert_shown(block.lines, said[how])
        self.assertGreater(ran, 0)

    def test_commands_in_prose(self):
        for command, how in sorted(PROSE.items(), key=lambda item: item[0]):
            if isinstance(how, Run):
                with self.subTest(command):
                    self.sandbox.run(command, how)

    def fields_are(self, verb, *objects, never=frozenset()):
        """What is printed has the fields of the table in docs/cli.md and no others, and so has the example there."""
        text = section("docs/cli.md", verb)
        table = fields(text) - never
        # The parts of a field that the table describes in words.
        opaque = tuple(f"{name}." for name in table
                       if not any(other.startswith((f"{name}.", f"{name}[]")) for other in table))
        example = json.loads(re.search(r"^```json\n(.*?)^```$", text, re.M | re.S)[1])
        for value in objects:
            self.assertEqual({path for path in paths_of(value) if not path.startswith(opaque)}, table, verb)
            self.assertLessEqual(paths_of(example), paths_of(value), verb)
        self.assertEqual(set().union(*map(paths_of, objects)), paths_of(example), verb)

    def test_check_prints_the_documented_fields(self):
        self.sandbox.enter("empty")
        self.fields_are("check", self.sandbox.json("clusterip check --json broken.toml", status=(3,)))

    def test_probe_prints_the_documented_fields(self):
        self.sandbox.enter("empty")
        self.fields_are("probe", self.sandbox.json("clusterip probe --json"))

    def test_status_of_a_service_prints_the_documented_fields(self):
        self.sandbox.enter("service")
        self.fields_are("status", self.sandbox.json("clusterip status --json"))

    def test_status_of_pins_prints_the_documented_fields(self):
        self.sandbox.enter("loaded")
        self.fields_are("status", self.sandbox.json("clusterip status --json"))

    def test_trace_prints_the_documented_fields(self):
        self.sandbox.enter("loaded")
        program = self.sandbox.start("clusterip trace --json --count 1")
        said = program.await_line("rewritten", lambda: self.sandbox.connect(program))
        program.process.wait(PATIENCE)
        # `lost` comes alone, when this is read too slowly.
        self.fields_are("trace", json.loads(said), never={"lost"})

    def test_resolve_prints_the_documented_fields(self):
        self.sandbox.enter("loaded")
        self.fields_are("resolve", self.sandbox.json(f"clusterip resolve --json {SERVED}"))

    def test_status_of_the_proxy_prints_the_documented_fields(self):
        self.sandbox.enter("proxy")
        printed = paths_of(self.sandbox.json("fallback_proxy --status --json"))
        self.assertLessEqual(printed, fields(section("docs/cli.md", "status")))
        named = set()
        for cell in rows(section("docs/fallback_proxy.md", "Status")):
            for dots, name in re.findall(r"`(\.*)(\w+)`", cell):
                named.add(("", "services[].", "services[].backends[].")[len(dots)] + name)
        self.assertGreater(len(named), 20)
        self.assertLessEqual(named, printed)

    def test_metrics_are_those_of_the_tables(self):
        self.sandbox.enter("empty")
        service = self.sandbox.start("clusterip run --config metrics.toml")
        service.await_line("serving 2 services")
        scraped = self.sandbox.shell("curl -sS --max-time 10 http://127.0.0.1:9464/metrics")
        self.assertEqual(set(re.findall(r"^(clusterip_\w+)", scraped, re.M)), fields(read("docs/metrics.md")) - {"version"})


def add_a_test(document):
    def test(self):
        self.run_blocks(document)

    setattr(Commands, "test_commands_of_" + re.sub(r"\W+", "_", document.removesuffix(".md")), test)


for each, table in BLOCKS.items():
    if any(isinstance(how, Run) for how in table.values()):
        add_a_test(each)


# --- the sandbox from outside ---------------------------------------------------------------------------------------------


UNSHARE = ("unshare", "--net", "--mount", "--cgroup", "--pid", "--fork", "--kill-child", "--mount-proc")


def cgroup2_mount():
    for line in pathlib.Path("/proc/self/mountinfo").read_text().splitlines():
        if " - cgroup2 " in line and line.split()[3] == "/":
            return pathlib.Path(line.split()[4])
    return None


def remove_cgroup(cgroup):
    for directory, _, _ in os.walk(cgroup, topdown=False):
        os.rmdir(directory)


def remove_stale(directory, remove):
    """Those of tests that were killed: what was in them has died with them."""
    for found in pathlib.Path(directory).glob(f"{NAME}*"):
        if not pathlib.Path(f"/proc/{found.name.removeprefix(NAME).split('-')[0]}").exists():
            with contextlib.suppress(OSError):
                remove(found)


def may_isolate(mount):
    return (os.geteuid() == 0 and mount is not None and os.access(mount, os.W_OK) and
            subprocess.run([*UNSHARE, "true"], check=False).returncode == 0)


def await_empty(cgroup):
    """The first process of a PID namespace takes all others with it; when it is killed itself, a moment later."""
    with open(cgroup / "cgroup.events", encoding="ascii") as events:
        changes = select.poll()
        changes.register(events, select.POLLPRI)
        deadline = time.monotonic() + PATIENCE
        while "populated 1" in events.read() and time.monotonic() < deadline:
            changes.poll(1000 * PATIENCE)
            events.seek(0)


def run_in_sandbox(mount):
    """Exit status of the tests in there. However this process ends, what it has started ends with it."""
    remove_stale(mount, remove_cgroup)
    remove_stale(tempfile.gettempdir(), shutil.rmtree)
    cgroup = mount / f"{NAME}{os.getpid()}"
    cgroup.mkdir()
    directory = tempfile.mkdtemp(prefix=f"{NAME}{os.getpid()}-")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    process = None

    def enter():
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        (cgroup / "cgroup.procs").write_text("0")

    try:
        process = subprocess.Popen(
            [*UNSHARE, sys.executable, "-B", os.path.abspath(__file__), *sys.argv[1:]], preexec_fn=enter,
            env={**os.environ, "CLUSTERIP_SANDBOX": directory})
        return process.wait()
    finally:
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()
        await_empty(cgroup)
        remove_cgroup(cgroup)
        shutil.rmtree(directory)


if __name__ == "__main__":
    if not IN_SANDBOX and may_isolate(cgroup2_mount()):
        sys.exit(run_in_sandbox(cgroup2_mount()))
    unittest.main()
