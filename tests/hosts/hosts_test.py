# SPDX-License-Identifier: BSD-2-Clause
"""Real hosts load the plugin: one scenario for each of them. ctest sets CLUSTERIP_SOURCE and CLUSTERIP_BUILD."""

import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import unittest

import stage
from stage import ask, run, services, wait_for

RELOADS = 100
# In a cgroup namespace with something else where the hierarchy is, a process is in a root without cgroup.type. Nothing could be
# attached to it from there: it is no cgroup at all.
IN_A_ROOT = ("unshare", "--cgroup", "--mount", "sh", "-c", f'mount -t tmpfs none {stage.cgroup_mount()} && exec "$@"', "sh")
NGINX = shutil.which("nginx", path="/usr/sbin:" + os.environ["PATH"])  # a new binary is started by its path


def load_tests(loader, standard, pattern):
    """The scenario is none by itself."""
    return unittest.TestSuite(tests for tests in standard if not any(type(test) in (Scenario, Program) for test in tests))


class Scenario(unittest.TestCase):
    """What each host does. A subclass says how it is started, told to reload and ended."""

    url = f"http://{stage.VIP}:{stage.PORT}/"  # a host that is no proxy: its clients go to the VIP
    client_options = ("-H", "Connection: close")
    requests = 10000

    @classmethod
    def setUpClass(cls):
        stage.set_up(cls)
        cls.backends = stage.Backends(cls.directory)
        cls.addClassCleanup(cls.backends.end)

    def setUp(self):
        self.configure(services(backend1=1, backend2=3))
        self.pid = self.start()
        self.addCleanup(self.end_if_it_runs)
        wait_for("the host serves", lambda: self.ask())

    def end_if_it_runs(self):
        if self.pid:
            self.stop()

    def configure(self, text):
        self.file = self.directory.write("services.toml", text)

    def ask(self, count=1):
        return ask(self.url, count, *self.client_options)

    def answers_come_from(self, *names):
        return wait_for(f"answers of {names} alone", lambda: set(self.ask(40) or ()) == set(names))

    def stop(self):
        self.end()
        self.pid = None

    def test_requests_go_to_backends_by_weight(self):
        answers = stage.Client(self.url, self.requests, *self.client_options).answers()
        self.assertEqual(set(answers), {"backend1", "backend2"})
        self.assertAlmostEqual(answers["backend1"] / self.requests, 0.25, delta=0.04)  # five standard deviations and more
        self.check_counters(answers)

    def check_counters(self, answers):
        pass

    def check_shown(self, shown, answers):
        """Counters as the hosts that are proxies show them."""
        self.assertRegex(shown, rf"service web vip {stage.VIP} port {stage.PORT} .*connects \d+ refused 0 ")
        counts = dict(re.findall(r"backend (\S+) .* connects (\d+) ", shown))
        for name, count in answers.items():  # one request of setUp() comes on top
            self.assertAlmostEqual(int(counts[stage.BACKENDS[name].split(":")[0]]), count, delta=1)

    def test_reload_under_load_fails_no_request(self):
        load = stage.Load(self.url, *self.client_options)
        self.addCleanup(load.thread.join)
        try:
            for weights in ({"backend2": 1, "backend3": 1}, {"backend1": 1, "backend3": 3}, {"backend3": 1}) * 2:
                self.configure(services(**weights))
                self.reload()
                self.answers_come_from(*weights)
        finally:
            answers = load.stop()
        self.assertEqual(set(answers), {"backend1", "backend2", "backend3"})

    def test_mistake_is_refused_with_line_and_column(self):
        self.configure(services(backend3=1) + 'polcy = "random"\n')
        self.assertRegex(self.refused_reload(), r'services\.toml:6:1: .*polcy.*did you mean "policy"')
        self.answers_come_from("backend1", "backend2")

    def test_odd_files_are_refused(self):
        self.file.unlink()
        self.reload_says("No such file")
        os.mkfifo(self.file)
        self.reload_says("expected a regular file")
        self.answers_come_from("backend1", "backend2")
        self.configure(services(backend3=1))
        self.reload()
        self.answers_come_from("backend3")

    def detach_behind_its_back(self):
        for kind, number in stage.bpf_ids(self.pid):
            if kind == "link":
                run("bpftool", "link", "detach", "id", number)
        self.assertEqual(self.cgroup.attached(), [])

    def test_reload_attaches_again_what_somebody_detached(self):
        self.detach_behind_its_back()
        self.reload_says("was not rewritten")
        wait_for("it is attached again", self.cgroup.attached)
        self.answers_come_from("backend1", "backend2")
        self.assertEqual(len([line for line in self.cgroup.attached() if "sock4_connect" in line]), 1)

    def test_end_leaves_nothing(self):
        self.assertIn("sock4_connect", "".join(self.cgroup.attached()))
        held = stage.bpf_ids(self.pid)
        self.assertEqual({kind for kind, _ in held}, {"map", "link", "prog"})
        self.stop()
        self.assertEqual(self.cgroup.attached(), [])
        self.assertEqual(stage.pins(), [])
        wait_for("the kernel frees what was there", lambda: not stage.still_there(held))
        self.assertIsNone(self.ask())

    def test_reloads_leak_nothing(self):
        kinds = lambda: sorted(kind for kind, _ in stage.bpf_ids(self.pid))
        self.reload()  # what is there once, such as the pages of lists that grow
        descriptors = stage.descriptors(self.pid)
        before = kinds(), stage.threads(self.pid), len(self.cgroup.attached())
        names = ("backend1", "backend2", "backend3")
        for turn in range(RELOADS):
            self.configure(services(**{names[turn % 3]: 1, names[(turn + 1) % 3]: 2}))
            self.reload()
        self.answers_come_from(names[(RELOADS - 1) % 3], names[RELOADS % 3])
        self.assertEqual(before, (kinds(), stage.threads(self.pid), len(self.cgroup.attached())))
        # A host may close a connection to a backend that it has kept for later.
        wait_for("no descriptor more than before", lambda: not stage.descriptors(self.pid) - descriptors)


class Nginx(Scenario):
    url = "http://127.0.0.1:8080/"
    client_options = ()
    plugin = stage.PLUGIN

    def write_conf(self, more=""):
        return self.directory.write("nginx.conf", f"""load_module {stage.BUILD}/plugin/hosts/nginx/ngx_clusterip_module.so;
            user www-data; worker_processes 1; pid {self.directory.path}/nginx.pid; error_log {self.directory.path}/error.log notice;
            clusterip_plugin {self.plugin};
            clusterip {self.file}; {more}
            events {{ worker_connections 4096; }}
            http {{ {stage.nginx_paths(self.directory.path)} keepalive_requests 100000; server {{ listen 127.0.0.1:8080;
              location / {{ proxy_pass http://{stage.VIP}:{stage.PORT}; }}
              location = /status {{ clusterip_status; }} }} }}""")

    def nginx(self, *options, check=True):
        return run(NGINX, "-c", self.directory.path / "nginx.conf", "-e", self.directory.path / "error.log", *options, check=check)

    def log(self):
        return (self.directory.path / "error.log").read_text()

    def start(self):
        (self.directory.path / "error.log").write_text("")
        self.write_conf()
        self.nginx()
        return int((self.directory.path / "nginx.pid").read_text())

    def end(self):
        os.kill(self.pid, signal.SIGQUIT)  # `nginx -s quit` reads the files, and a test may have broken one
        wait_for("nginx has ended", lambda: not pathlib.Path(f"/proc/{self.pid}").exists())

    def reload(self):
        workers = stage.children(self.pid)
        os.kill(self.pid, signal.SIGHUP)
        wait_for("nginx has another worker alone", lambda: len(now := stage.children(self.pid)) == 1 and not now & workers)

    def refused_reload(self):
        workers = stage.children(self.pid)
        tested = self.nginx("-t", check=False)
        self.assertNotEqual(tested.returncode, 0)
        os.kill(self.pid, signal.SIGHUP)
        wait_for("the master refuses", lambda: re.search(r"services\.toml:\d", self.log()))
        self.assertEqual(stage.children(self.pid), workers)
        return tested.stderr

    def reload_says(self, words):
        os.kill(self.pid, signal.SIGHUP)
        wait_for(words, lambda: words in self.log())

    def check_counters(self, answers):
        shown = lambda: run("curl", "-s", self.url + "status").stdout
        total = lambda: sum(map(int, re.findall(r"backend .* connects (\d+) ", shown())))
        wait_for("the counters are of now", lambda: total() > self.requests)
        self.check_shown(shown(), answers)

    def test_counters_that_do_not_fit_are_cut(self):
        shown = lambda: run("curl", "-s", self.url + "status").stdout
        self.configure(services(backend1=1) + stage.many_services(500))
        self.reload()
        text = wait_for("it is cut", lambda: (text := shown()).endswith("\n# cut\n") and text)
        self.assertLess(len(text), 65536)
        self.assertGreater(len(text), 65536 - 200)  # all that does fit is there
        for line in text.splitlines()[:-1]:
            self.assertRegex(line, r"^(service \S+ vip \S+ port \d+ protocol tcp connects|"
                                   r"  backend \S+ port 80 weight \d+ state active connects) \d+ (refused|failures) 0 live \d+$")
        self.configure(services(backend1=1))
        self.reload()
        wait_for("all of it is shown", lambda: "service web " in (text := shown()) and "# cut" not in text)

    def test_changed_plugin_takes_over(self):
        self.addCleanup(setattr, self, "plugin", stage.PLUGIN)
        self.plugin = self.directory.path / "nowhere.so"
        self.write_conf()
        self.reload_says(f'clusterip_plugin "{self.plugin}": {self.plugin}: cannot open')
        self.answers_come_from("backend1", "backend2")
        self.plugin = self.directory.path / "another.so"
        shutil.copy(stage.PLUGIN, self.plugin)
        self.write_conf()
        load = stage.Load(self.url, *self.client_options)
        self.addCleanup(load.thread.join)
        try:
            self.reload()
        finally:
            load.stop()
        maps = pathlib.Path(f"/proc/{self.pid}/maps").read_text()
        self.assertEqual((str(self.plugin) in maps, str(stage.PLUGIN.resolve()) in maps), (True, False))
        self.assertEqual(len([line for line in self.cgroup.attached() if "sock4_connect" in line]), 1)
        self.assertEqual(stage.threads(self.pid), 2)
        self.assertIn(f"by {self.plugin}, version ", self.log())

    def test_start_without_a_cgroup_is_refused(self):
        self.stop()
        for words, more, *before in (("clusterip_cgroup is missing: this process is in the root cgroup: name one", "", *IN_A_ROOT),
                                     ("opening the cgroup /nowhere: No such file", "clusterip_cgroup /nowhere;")):
            with self.subTest(words):
                conf = self.write_conf(more)
                done = run(*before, NGINX, "-c", conf, "-e", "stderr", check=False)
                self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done.stderr)
                self.assertIn(words, done.stderr)
                self.assertEqual(self.cgroup.attached(), [])

    def test_rejected_nginx_conf_leaves_the_services(self):
        """The services are good, and something else is not: nothing of the new configuration may be in force."""
        conf = self.directory.path / "nginx.conf"
        conf.write_text(conf.read_text().replace("listen 127.0.0.1:8080", "listen 192.0.2.1:8080"))
        self.configure(services(backend3=1))
        os.kill(self.pid, signal.SIGHUP)
        wait_for("the master refuses", lambda: "bind() to 192.0.2.1:8080 failed" in self.log())
        self.answers_come_from("backend1", "backend2")

    def test_services_the_kernel_cannot_carry_are_refused(self):
        self.configure(services(backend3=1) + 'engine = "userspace"\n')
        os.kill(self.pid, signal.SIGHUP)
        wait_for("the master refuses", lambda: re.search(r'\[emerg\] .*: load: .*"web"', self.log()))
        self.answers_come_from("backend1", "backend2")

    def test_directive_that_has_gone_ends_it(self):
        conf = self.directory.path / "nginx.conf"
        conf.write_text(re.sub(r"^ *clusterip /.*$", "", conf.read_text(), flags=re.M))
        self.reload()
        self.assertEqual((self.cgroup.attached(), stage.threads(self.pid)), ([], 1))
        self.assertEqual(run("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", self.url + "status").stdout, "503")
        self.write_conf()
        self.reload()
        self.answers_come_from("backend1", "backend2")

    def test_one_process_in_the_foreground(self):
        self.stop()
        conf = self.write_conf()
        conf.write_text("daemon off; master_process off;\n" + conf.read_text())
        process = subprocess.Popen([NGINX, "-c", conf, "-e", self.directory.path / "error.log"])
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        self.answers_come_from("backend1", "backend2")
        process.send_signal(signal.SIGQUIT)  # and no SIGHUP, after which nginx itself serves nothing in this mode
        self.assertEqual(process.wait(), 0)
        self.assertEqual(self.cgroup.attached(), [])

    def test_new_binary_takes_over(self):
        os.kill(self.pid, signal.SIGUSR2)
        pid_file = self.directory.path / "nginx.pid"
        old = self.directory.path / "nginx.pid.oldbin"
        wait_for("there is another master", lambda: old.exists() and pid_file.exists() and pid_file.read_text().strip())
        new = int(pid_file.read_text())
        wait_for("it has a worker", lambda: stage.children(new))
        self.assertEqual(len([line for line in self.cgroup.attached() if "sock4_connect" in line]), 2)
        os.kill(self.pid, signal.SIGQUIT)
        wait_for("the old one has ended", lambda: not pathlib.Path(f"/proc/{self.pid}").exists())
        self.pid = new
        self.answers_come_from("backend1", "backend2")

    def test_workers_hold_nothing_of_it(self):
        for worker in stage.children(self.pid):
            self.assertEqual(stage.bpf_ids(worker), set())
            self.assertNotIn("bpf", " ".join(stage.descriptors(worker)))
            self.assertNotIn("bpf-map", pathlib.Path(f"/proc/{worker}/maps").read_text())
        self.assertIn("bpf-map", pathlib.Path(f"/proc/{self.pid}/maps").read_text())

    def test_killed_master_ends_it(self):
        (worker,) = stage.children(self.pid)
        self.assertNotEqual(self.cgroup.attached(), [])
        os.kill(self.pid, signal.SIGKILL)
        self.pid = None
        try:
            wait_for("nothing is attached", lambda: not self.cgroup.attached())
            self.assertTrue(pathlib.Path(f"/proc/{worker}").exists())
            wait_for("the worker knows that its counters are old",
                     lambda: run("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", self.url + "status").stdout == "503")
        finally:
            os.kill(worker, signal.SIGKILL)
            wait_for("the worker has ended", lambda: not pathlib.Path(f"/proc/{worker}").exists())


class Haproxy(Scenario):
    url = "http://127.0.0.1:8080/"
    client_options = ()

    def start(self):
        directory = self.directory.path
        self.socket = directory / "admin.sock"
        self.conf = self.directory.write("haproxy.cfg", f"""global
    stats socket {self.socket} level admin
    setenv CLUSTERIP_FILE {self.file}
    setenv CLUSTERIP_PLUGIN {stage.PLUGIN}
    lua-prepend-path {stage.BUILD}/plugin/hosts/haproxy/?.so cpath
    lua-load {stage.SOURCE}/plugin/hosts/haproxy/clusterip.lua
    pidfile {directory}/haproxy.pid
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    option http-server-close
frontend front
    bind 127.0.0.1:8080
    http-request use-service lua.clusterip if {{ path /status }}
    default_backend back
backend back
    server vip {stage.VIP}:{stage.PORT}
""")
        run("haproxy", "-D", "-f", self.conf)  # the process that serves is a child of this one
        return int((directory / "haproxy.pid").read_text())

    def end(self):
        os.kill(self.pid, signal.SIGUSR1)  # as soon as it has no connections any more
        wait_for("haproxy has ended", lambda: not pathlib.Path(f"/proc/{self.pid}").exists())

    def command(self, line):
        with socket.socket(socket.AF_UNIX) as admin:
            admin.connect(str(self.socket))
            admin.sendall(line.encode() + b"\n")
            return b"".join(iter(lambda: admin.recv(65536), b"")).decode()

    def reload(self):
        self.assertIn("reloaded", self.command("clusterip reload"))

    def refused_reload(self):
        checked = run("haproxy", "-c", "-f", self.conf, check=False)
        self.assertNotEqual(checked.returncode, 0)
        self.assertRegex(checked.stderr, r"services\.toml:6:1: ")
        return self.command("clusterip reload")

    def reload_says(self, words):
        self.assertIn(words, self.command("clusterip reload"))

    def with_globals(self, *lines):
        self.conf.write_text(self.conf.read_text().replace("global\n", "".join(["global\n", *(f"    {line}\n" for line in lines)])))

    def start_again(self):
        run("haproxy", "-D", "-f", self.conf)
        self.pid = int((self.directory.path / "haproxy.pid").read_text())
        self.addCleanup(self.end_if_it_runs)

    def test_start_without_a_fast_path_is_refused(self):
        self.stop()
        conf = self.conf.read_text()
        for words, line, *before in (("clusterip: this process is in the root cgroup: name one", "", *IN_A_ROOT),
                                     ("clusterip: opening the cgroup /nowhere: No such file", "setenv CLUSTERIP_CGROUP /nowhere")):
            with self.subTest(words):
                self.conf.write_text(conf)
                self.with_globals(line)
                self.assertEqual(run(*before, "haproxy", "-c", "-f", self.conf, check=False).returncode, 0)  # as nginx -t
                done = run(*before, "haproxy", "-D", "-f", self.conf, check=False)
                self.assertEqual((done.returncode, done.stderr.count("[ALERT]")), (1, 1), done.stderr)
                self.assertIn(words, done.stderr)
                self.assertEqual(self.cgroup.attached(), [])
        self.conf.write_text(conf.replace("lua-load ", "lua-load-per-thread "))
        done = run("haproxy", "-c", "-f", self.conf, check=False)
        self.assertEqual(done.returncode, 1)
        self.assertIn("expected lua-load, got lua-load-per-thread", done.stderr)

    def test_privileges_that_are_given_up_are_missed(self):
        self.stop()
        self.with_globals("user nobody")
        self.start_again()
        said = wait_for("it says so", lambda: (said := self.command("show clusterip")) != "not attached yet\n\n" and said)
        self.assertRegex(said, r"CAP_BPF.*do `user`, `group` or `chroot` take that away")
        self.assertEqual(run("curl", "-s", self.url + "status", "-w", "%{http_code}").stdout, said.rstrip("\n") + "\n503")

    def test_reload_starts_what_could_not_start(self):
        """The cgroup is there when HAProxy tries, and not when the process that serves wants it."""
        self.stop()
        later = self.cgroup.path / "later"
        later.mkdir()
        remove = self.directory.write("remove.lua", f"core.register_init(function() assert(os.remove('{later}')) end)\n")
        self.with_globals(f"setenv CLUSTERIP_CGROUP {later}")
        self.conf.write_text(self.conf.read_text().replace("    pidfile", f"    lua-load {remove}\n    pidfile"))
        self.start_again()
        wait_for("it says so", lambda: str(later) in self.command("show clusterip"))
        self.reload_says(str(later))
        later.mkdir()
        self.addCleanup(later.rmdir)
        self.reload()
        self.assertIn("service web ", self.command("show clusterip"))
        self.assertIn("sock4_connect", run("bpftool", "cgroup", "show", later).stdout)
        self.stop()  # before the cgroup is removed

    def test_reload_of_haproxy_itself(self):
        """Another worker, with a handle of its own, which is attached beside that of the old one."""
        self.stop()
        self.said = self.directory.write("said", "")
        with self.said.open("a") as output:
            master = subprocess.Popen(["haproxy", "-W", "-f", self.conf, "-p", self.directory.path / "master.pid"], stderr=output)
        self.addCleanup(master.wait)
        self.addCleanup(master.terminate)
        self.answers_come_from("backend1", "backend2")
        self.assertEqual(stage.bpf_ids(master.pid), set())
        self.configure(services(backend3=1))
        self.replace_worker(master)
        self.answers_come_from("backend3")
        self.refused_reload_of_haproxy_itself(master)
        self.reload_with_another_plugin(master)

    def replace_worker(self, master):
        """By a signal, which the master took no notice of once, on a machine with four times as much to do as it has cores, when it
        had refused a reload just before."""
        workers = stage.children(master.pid)
        for last in (False, False, True):
            master.send_signal(signal.SIGUSR2)
            try:
                return wait_for("another worker alone", lambda: len(now := stage.children(master.pid)) == 1 and not now & workers)
            except AssertionError:
                if last:
                    raise

    def refused_reload_of_haproxy_itself(self, master):
        """There can be no fast path: the old worker serves on."""
        conf, workers = self.conf.read_text(), stage.children(master.pid)
        self.with_globals("setenv CLUSTERIP_CGROUP /nowhere")
        master.send_signal(signal.SIGUSR2)
        wait_for("the master refuses", lambda: "opening the cgroup /nowhere" in self.said.read_text())
        self.assertEqual(stage.children(master.pid), workers)
        self.answers_come_from("backend3")
        self.conf.write_text(conf)

    def reload_with_another_plugin(self, master):
        another = self.directory.path / "another.so"
        shutil.copy(stage.PLUGIN, another)
        self.conf.write_text(self.conf.read_text().replace(str(stage.PLUGIN), str(another)))
        self.with_globals(f"setenv CLUSTERIP_CGROUP {self.cgroup.path}")  # without it, the master has yet what was refused
        self.replace_worker(master)
        (worker,) = stage.children(master.pid)
        self.answers_come_from("backend3")
        maps = pathlib.Path(f"/proc/{worker}/maps").read_text()
        self.assertEqual((str(another) in maps, str(stage.PLUGIN.resolve()) in maps), (True, False))

    def check_counters(self, answers):
        for shown in (self.command("show clusterip"), run("curl", "-s", self.url + "status").stdout):
            self.check_shown(shown, answers)


class Program(Scenario):
    """A host that is no proxy: reload by SIGHUP, and words on stdout and stderr."""

    def start(self):
        self.said = self.directory.write("said", "")
        with self.said.open("a") as output:
            self.process = subprocess.Popen([*self.command(), stage.PLUGIN, self.file], stdout=output, stderr=output)
        self.hears("attached to")
        return self.process.pid

    def hears(self, words, times=1):
        wait_for(words, lambda: self.said.read_text().count(words) >= times)

    def end(self):
        self.process.terminate()
        self.assertEqual(self.process.wait(), 0)

    def reload(self):
        times = self.said.read_text().count("reloaded") + 1
        self.process.send_signal(signal.SIGHUP)
        self.hears("reloaded", times)

    def refused_reload(self):
        self.process.send_signal(signal.SIGHUP)
        self.hears("services.toml:")
        return self.said.read_text()

    def reload_says(self, words):
        self.process.send_signal(signal.SIGHUP)
        self.hears(words)

    def test_bad_start_is_one_line(self):
        for status, words, *command in ((2, "usage: ", *self.command()),
                                        (1, "cannot open", *self.command(), "/nowhere/libclusterip.so.1", self.file),
                                        (1, "clusterip_abi_version", *self.command(), "libm.so.6", self.file),
                                        (1, "No such file", *self.command(), stage.PLUGIN, "/nowhere/services.toml"),
                                        (1, "this process is in the root cgroup: name one",
                                         *IN_A_ROOT, *self.command(), stage.PLUGIN, self.file)):
            with self.subTest(words):
                done = run(*command, check=False)
                self.assertEqual((done.returncode, done.stdout, done.stderr.count("\n")), (status, "", 1), done.stderr)
                self.assertIn(words, done.stderr)


class C(Program):
    def command(self):
        return [stage.BUILD / "plugin/hosts/c/clusterip_host"]

    def check_counters(self, answers):
        self.hears(f"web pid {self.pids()[-1]}: rewritten", self.requests // 2)  # the buffer of events is bounded

    def pids(self):
        return re.findall(r"^web pid (\d+): rewritten$", self.said.read_text(), re.M)


class Python(Program):
    def command(self):
        return ["python3", "-B", stage.SOURCE / "plugin/hosts/python/host.py"]


if __name__ == "__main__":
    unittest.main()
