# SPDX-License-Identifier: BSD-2-Clause
"""What the tests of hosts stand on: a network with nothing but `lo`, a cgroup of their own, backends that answer with their
name, a client that counts the answers, and what a process has of BPF."""

import collections
import ctypes
import os
import pathlib
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import unittest

BUILD = pathlib.Path(os.environ["CLUSTERIP_BUILD"])
SOURCE = pathlib.Path(os.environ["CLUSTERIP_SOURCE"])
PLUGIN = BUILD / "plugin/libclusterip.so.1"
VIP = "10.96.96.96"  # no address of any interface, and no route leads there
PORT = 5201
BACKENDS = {f"backend{number}": f"127.0.1.{number}:80" for number in (1, 2, 3)}
PODS = {name: address.replace("127.0", "10.89") for name, address in BACKENDS.items()}  # the same, at addresses that a pod may have


def wait_for(what, condition, seconds=30):
    """What the condition returns when that is true; it is asked again and again until then."""
    end = time.monotonic() + seconds
    while not (result := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.01)
    return result


def run(*command, check=True, **options):
    done = subprocess.run([str(word) for word in command], text=True, capture_output=True, check=False, **options)
    if check and done.returncode != 0:
        raise AssertionError(f"{' '.join(map(str, command))}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def missing_privilege():
    if os.geteuid() != 0:
        return "needs root"
    return "" if cgroup_mount() else "no cgroup v2 hierarchy is mounted"


def cgroup_mount():
    mounts = (line.split() for line in pathlib.Path("/proc/self/mounts").read_text().splitlines())
    return next((fields[1] for fields in mounts if fields[2] == "cgroup2"), "")


def enter_private_environment():
    """A network with `lo` alone, and a BPF filesystem where a pin would show. Both end with this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, new_network, private, recursive = 0x20000, 0x40000000, 1 << 18, 1 << 14
    if libc.unshare(new_mounts | new_network) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    if libc.mount(None, b"/", None, recursive | private, None) != 0:
        raise OSError(ctypes.get_errno(), "mount")
    if libc.mount(b"bpf", b"/sys/fs/bpf", b"bpf", 0, None) != 0:
        raise OSError(ctypes.get_errno(), "mount bpf")
    run("ip", "link", "set", "lo", "up")
    for address in PODS.values():
        run("ip", "addr", "add", f"{address.split(':')[0]}/32", "dev", "lo")


class Cgroup:
    """A cgroup that this process is in, with what it starts from now on."""

    def __init__(self):
        lines = pathlib.Path("/proc/self/cgroup").read_text().splitlines()
        line = next(line for line in lines if line.startswith("0::"))
        self.before = pathlib.Path(cgroup_mount()) / line[3:].lstrip("/")
        self.path = pathlib.Path(cgroup_mount()) / f"clusterip-test-{os.getpid()}-hosts"
        self.path.mkdir()
        (self.path / "cgroup.procs").write_text("0")

    def remove(self):
        (self.before / "cgroup.procs").write_text("0")
        processes = lambda: [int(line) for line in (self.path / "cgroup.procs").read_text().splitlines()]
        try:
            wait_for("the cgroup is empty", lambda: not processes())
        finally:
            for process in processes():  # a test that failed has left them
                os.kill(process, signal.SIGKILL)
            wait_for("the cgroup is empty", lambda: not processes())
            self.path.rmdir()

    def attached(self):
        """The programs on it, as bpftool shows them."""
        return run("bpftool", "cgroup", "show", self.path).stdout.splitlines()[1:]


class Directory:
    """A directory that workers without privileges may look into."""

    def __init__(self):
        self.path = pathlib.Path(tempfile.mkdtemp(prefix="clusterip-hosts-"))
        self.path.chmod(0o755)

    def remove(self):
        shutil.rmtree(self.path)

    def write(self, name, text):
        """Replaces it at once, as an editor does."""
        path = self.path / name
        part = path.with_suffix(".part")
        part.write_text(text)
        part.rename(path)
        return path


def nginx_paths(directory):
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    return " ".join(f"{kind}_temp_path {directory}/{kind};" for kind in kinds) + " access_log off;"


class Backends:
    """One nginx, without anything of clusterip, that answers at each backend's address with its name."""

    def __init__(self, directory):
        servers = "\n".join(f'server {{ listen {address}; listen {PODS[name]}; return 200 "{name}\\n"; }}'
                            for name, address in BACKENDS.items())
        file = directory.write("backends.conf", f"""daemon off; master_process off; pid {directory.path}/backends.pid;
            error_log stderr; events {{ worker_connections 4096; }}
            http {{ {nginx_paths(directory.path)} default_type text/plain; keepalive_requests 100000;\n{servers}\n}}""")
        self.process = subprocess.Popen(["nginx", "-c", file, "-e", "stderr"])
        wait_for("the backends answer", lambda: ask(f"http://{BACKENDS['backend3']}/") == {"backend3": 1})

    def end(self):
        self.process.terminate()
        self.process.wait()


def services(**weights):
    """A configuration with one service, of these backends."""
    backends = ", ".join(f'{{ address = "{BACKENDS[name].split(":")[0]}", port = 80, weight = {weight} }}'
                         for name, weight in weights.items())
    return f'[[service]]\nname = "web"\nvip = "{VIP}"\nport = {PORT}\nbackends = [ {backends} ]\n'


def many_services(count):
    """So many more, of one backend each."""
    return "".join(f'[[service]]\nname = "service{number}"\nvip = "10.97.{number // 250}.{number % 250}"\nport = 80\n'
                   f'backends = [ "127.0.1.1:80" ]\n' for number in range(count))


class Client:
    """A curl that asks so many times, one after the other, each of the answers on a line."""

    def __init__(self, url, count, *options):
        self.count = count
        self.process = subprocess.Popen(["curl", "-s", "-w", "%{http_code}\\n", *options, f"{url}?[1-{count}]"],
                                        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def answers(self):
        """How often each backend has answered, and what else was said."""
        lines = self.process.communicate(timeout=60)[0].splitlines()
        counted = collections.Counter(lines)
        if counted.pop("200", 0) != self.count or self.process.returncode != 0:
            raise AssertionError(f"not {self.count} answers: {counted}, exit {self.process.returncode}")
        return counted


class Load:
    """Clients one after the other, without a pause, until it is stopped."""

    def __init__(self, url, *options):
        self.answered, self.failure, self.stopping = collections.Counter(), None, False
        self.thread = threading.Thread(target=self.run, args=(url, options))
        self.thread.start()

    def run(self, url, options):
        try:
            while not self.stopping:
                self.answered += Client(url, 200, *options).answers()
        except AssertionError as failure:
            self.failure = failure

    def stop(self):
        """How often each backend has answered; fails if anything else came."""
        self.stopping = True
        self.thread.join()
        if self.failure:
            raise self.failure
        return self.answered


def ask(url, count=1, *options):
    try:
        return Client(url, count, *options).answers()
    except AssertionError:
        return None


def descriptors(pid):
    """How many descriptors of each kind a process has: sockets without their numbers, files by name."""
    kinds = collections.Counter()
    for entry in os.listdir(f"/proc/{pid}/fd"):
        try:
            kinds[re.sub(r"\d+", "N", os.readlink(f"/proc/{pid}/fd/{entry}"))] += 1
        except FileNotFoundError:
            pass
    return kinds


def threads(pid):
    return len(os.listdir(f"/proc/{pid}/task"))


def bpf_ids(pid):
    """("map", 12) and the like: what of BPF this process holds."""
    found = set()
    for entry in os.listdir(f"/proc/{pid}/fdinfo"):
        try:
            text = pathlib.Path(f"/proc/{pid}/fdinfo/{entry}").read_text()
        except FileNotFoundError:
            continue
        found |= {(kind, int(number)) for kind, number in re.findall(r"^(map|prog|link)_id:\s+(\d+)$", text, re.M)}
    return found


def still_there(ids):
    return {(kind, number) for kind, number in ids
            if run("bpftool", kind, "show", "id", number, check=False).returncode == 0}


def pins():
    """What is on the BPF filesystem, but for what the kernel itself has there."""
    return sorted(set(os.listdir("/sys/fs/bpf")) - {"maps.debug", "progs.debug"})


def children(pid):
    return {int(word) for word in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def set_up(test_class):
    """For setUpClass: a cgroup, an environment of the process's own, and a directory; or a skip with the reason."""
    if reason := missing_privilege():
        if os.environ.get("CLUSTERIP_REQUIRE_PRIVILEGE") == "1":
            raise AssertionError(reason)
        raise unittest.SkipTest(reason)
    test_class.cgroup = Cgroup()
    test_class.addClassCleanup(test_class.cgroup.remove)
    enter_private_environment()
    test_class.directory = Directory()
    test_class.addClassCleanup(test_class.directory.remove)
