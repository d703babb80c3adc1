# SPDX-License-Identifier: BSD-2-Clause
"""`clusterip run` fed by an API server: from an object of the cluster to the connect() of an application, on both engines.
ctest sets CLUSTERIP_SOURCE and CLUSTERIP_BUILD."""

import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "hosts"))
import stage  # noqa: E402
from api_server import ApiServer  # noqa: E402
from stage import ask, run, wait_for  # noqa: E402

CLUSTERIP = stage.BUILD / "cli/clusterip"
STATIC = "10.96.200.1"


def service(name, number, namespace="default", **spec):
    return {"metadata": {"name": name, "namespace": namespace},
            "spec": {"type": "ClusterIP", "clusterIP": f"10.96.{number // 250}.{1 + number % 250}",
                     "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": 80}], **spec}}


def slice_of(name, addresses, number=0, port=80, conditions=None):
    return {"metadata": {"name": f"{name}-{number}", "namespace": "default", "labels": {"kubernetes.io/service-name": name}},
            "addressType": "IPv4", "ports": [{"name": "http", "port": port, "protocol": "TCP"}],
            "endpoints": [{"addresses": [address], "nodeName": "here" if address.endswith("1") else "there",
                           "conditions": conditions or {"ready": True}} for address in addresses]}


ONE, TWO, THREE = (address.split(":")[0] for address in stage.PODS.values())


def load_tests(loader, standard, pattern):
    """The scenario is none by itself."""
    return unittest.TestSuite(tests for tests in standard if not any(type(test) is Scenario for test in tests))


class Stage(unittest.TestCase):
    """An API server, and a daemon that a test starts beside it."""
    engine = ""

    @classmethod
    def setUpClass(cls):
        stage.set_up(cls)
        cls.backends = stage.Backends(cls.directory)
        cls.addClassCleanup(cls.backends.end)

    def setUp(self):
        self.api = ApiServer()
        self.addCleanup(lambda: self.api.end())
        self.process = None
        self.log = self.directory.path / "log"
        self.log.write_text("")
        self.configure()
        self.addCleanup(self.remove)

    def configure(self, more=""):
        self.file = self.directory.write("clusterip.toml", f"""
            [engine]
            cgroup = "{self.cgroup.path}"
            control = "{self.directory.path}/control.sock"
            [kubernetes]
            server = "{self.api.url}"
            node = "here"
            [[service]]
            name = "fixed"
            vip = "{STATIC}"
            port = 80
            backends = ["{THREE}:80"]
            {more}""")

    def start(self):
        before = len(self.log.read_text()) if self.log.exists() else 0  # of an earlier process
        with self.log.open("a") as log:
            self.process = subprocess.Popen([CLUSTERIP, "run", "--config", self.file, "--engine", self.engine, "--plugin",
                                             stage.PLUGIN], stderr=log, stdout=log)
        wait_for("the daemon serves", lambda: "serving" in self.log.read_text()[before:] or
                 self.process.poll() is not None)
        self.assertIsNone(self.process.poll(), self.log.read_text())

    def end(self, how=signal.SIGTERM):
        self.process.send_signal(how)
        self.assertEqual(self.process.wait(), 0 if how == signal.SIGTERM else -how, self.log.read_text())
        self.process = None

    def remove(self):
        if self.process:
            self.end()
        run(CLUSTERIP, "unload", "--plugin", stage.PLUGIN, check=False)
        run(stage.BUILD / "run/fallback_proxy", "--cleanup", check=False)

    def status(self, exit_code=None):
        shown = run(CLUSTERIP, "status", "--json", "--control", self.directory.path / "control.sock", "--plugin", stage.PLUGIN,
                    check=False)
        if exit_code is not None:
            self.assertEqual(shown.returncode, exit_code, shown.stdout)
        return json.loads(shown.stdout)

    def come_from(self, vip, *names):
        try:
            wait_for(f"answers of {names} at {vip}",
                     lambda: set(ask(f"http://{vip}/", 20, "-H", "Connection: close") or ()) == set(names))
        except AssertionError as failure:
            raise AssertionError(f"{failure}\n{self.log.read_text()}") from None

    def refused(self, vip):
        with socket.socket() as client:
            client.settimeout(5)
            return client.connect_ex((vip, 80)) in (111, 101)  # userspace: the address may be no longer local


class Scenario(Stage):
    def test_services_come_change_and_go_beside_those_of_the_file(self):
        self.api.put("services", service("web", 0))
        self.api.put("endpointslices", slice_of("web", [ONE, TWO]))
        self.start()
        self.come_from("10.96.0.1", "backend1", "backend2")
        self.come_from(STATIC, "backend3")
        self.api.put("endpointslices", slice_of("web", [TWO]))
        self.come_from("10.96.0.1", "backend2")
        self.api.put("endpointslices", slice_of("web", [TWO], conditions={"ready": False, "serving": True, "terminating": True}))
        self.api.put("services", service("local", 1, internalTrafficPolicy="Local"))
        self.api.put("endpointslices", slice_of("local", [ONE, TWO]))
        self.come_from("10.96.0.2", "backend1")
        self.come_from("10.96.0.1", "backend2")  # all terminate: it serves
        self.api.put("endpointslices", slice_of("web", []))
        wait_for("refusal", lambda: self.refused("10.96.0.1"))
        self.api.delete("services", "default", "local")
        wait_for("one service less", lambda: len(self.status()["services"]) == 2)
        wait_for("refusal", lambda: self.refused("10.96.0.2") if self.engine == "userspace" else True)
        self.configure(f"""[[service]]
            name = "more"
            vip = "10.96.200.2"
            port = 80
            backends = ["{ONE}:80"]""")
        self.process.send_signal(signal.SIGHUP)
        self.come_from("10.96.200.2", "backend1")
        self.assertEqual(sorted(one["name"] for one in self.status()["services"]), ["default/web:80/tcp", "fixed", "more"])

    def test_who_follows_no_cluster_says_so(self):
        refused = run(stage.BUILD / "run/fallback_proxy", "--config", self.file, check=False)
        self.assertEqual(refused.returncode, 3, refused.stderr)
        self.assertIn("kubernetes: only `clusterip run` follows a cluster", refused.stderr)
        loaded = run(CLUSTERIP, "load", "--config", self.file, "--plugin", stage.PLUGIN)
        self.assertIn("services of Kubernetes are served only while a daemon runs", loaded.stderr)
        self.assertEqual(self.api.requests, [])

    def test_a_collision_names_both_and_the_file_wins(self):
        self.api.put("services", service("thief", 200 * 250))  # the file's VIP
        self.api.put("services", service("web", 0))
        self.api.put("endpointslices", slice_of("thief", [ONE]))
        self.start()
        wait_for("a line", lambda: "service default/thief:80/tcp of Kubernetes: its vip 10.96.200.1:80/tcp is that of service fixed "
                 "of the file, line 8: it is not served" in self.log.read_text())
        self.come_from(STATIC, "backend3")

    def test_the_service_by_which_the_api_server_is_reached_is_left_alone(self):
        for url in (self.api.url, f"http://localhost:{self.api.port}"):
            with self.subTest(url):
                self.file.write_text(self.file.read_text().replace(self.api.url, url))
                self.log.write_text("")
                self.api.put("services", service("web", 0))
                self.api.put("services", {**service("kubernetes", 1), "spec": {
                    **service("kubernetes", 1)["spec"], "clusterIP": "127.0.0.1", "ports": [{"port": self.api.port, "protocol": "TCP"}]}})
                self.api.put("endpointslices", slice_of("web", [ONE]))
                self.api.put("endpointslices", slice_of("kubernetes", [TWO]))
                self.start()
                self.come_from("10.96.0.1", "backend1")
                self.assertEqual(sorted(one["name"] for one in self.status()["services"]), ["default/web:80/tcp", "fixed"])
                self.assertIn(f"kubernetes: service default/kubernetes:{self.api.port}/tcp is how {url} is reached: it is not served",
                              self.log.read_text())
                self.remove()

    def test_a_server_that_sends_what_was_not_asked_for_does_no_harm(self):
        self.file.write_text(self.file.read_text().replace('node = "here"', 'node = "here"\nnamespaces = ["default", "other"]'))
        self.api.faults.every_namespace = True
        self.api.put("services", service("web", 0))
        self.api.put("endpointslices", slice_of("web", [ONE]))
        self.start()
        self.come_from("10.96.0.1", "backend1")
        for pods in ([TWO], [ONE, TWO], [ONE]):
            self.api.put("endpointslices", slice_of("web", pods))
            self.come_from("10.96.0.1", *(f"backend{(ONE, TWO).index(pod) + 1}" for pod in pods))

    def test_the_file_serves_and_its_kubeconfig_may_come_later(self):
        kubeconfig = self.directory.path / "kubeconfig"
        kubeconfig.unlink(missing_ok=True)
        self.file.write_text(self.file.read_text().replace(f'server = "{self.api.url}"', f'kubeconfig = "{kubeconfig}"'))
        self.api.put("services", service("web", 0))
        self.api.put("endpointslices", slice_of("web", [ONE]))
        self.start()
        self.come_from(STATIC, "backend3")
        said = f"{kubeconfig}: No such file or directory"
        self.assertIn(f"kubernetes: {said}: no service of the cluster comes or goes until that is mended", self.log.read_text())
        self.assertEqual(self.status(exit_code=1)["kubernetes"]["problem"], said)
        kubeconfig.write_text("no: config")
        wait_for("what else is wrong with it", lambda: f"kubernetes: {kubeconfig}: " in self.log.read_text().replace(said, ""))
        kubeconfig.write_text(json.dumps({"current-context": "here", "contexts": [{"name": "here", "context": {"cluster": "here"}}],
                                          "clusters": [{"name": "here", "cluster": {"server": self.api.url}}]}))
        self.come_from("10.96.0.1", "backend1")
        self.assertTrue(self.status(exit_code=0)["kubernetes"]["complete"])
        self.assertEqual(self.log.read_text().count(said), 1)

    def test_what_is_left_out_is_told_once(self):
        self.api.put("services", service("thief", 200 * 250))  # the file's VIP
        self.start()
        for number in range(1, 6):
            self.api.put("services", service("web", number))
            wait_for("a merge", lambda: self.status()["services"][-1]["vip"] == service("web", number)["spec"]["clusterIP"])
        self.assertEqual(self.log.read_text().count("service default/thief:80/tcp of Kubernetes"), 1)
        self.assertEqual(self.status(exit_code=0)["kubernetes"]["left_out"], 1)

    def test_what_had_no_room_is_served_when_there_is_some(self):
        self.configure("[limits]\nbackends = 4")  # one is the file's
        names = lambda: [one["name"] for one in self.status()["services"]]
        self.api.put("services", service("a", 0))
        self.api.put("endpointslices", slice_of("a", [ONE, TWO]))
        self.api.put("services", service("c", 1))
        self.api.put("endpointslices", slice_of("c", [ONE, TWO]))
        self.start()
        self.come_from("10.96.0.1", "backend1", "backend2")
        wait_for("it is left out", lambda: self.status()["kubernetes"]["left_out"] == 1)
        self.assertNotIn("default/c:80/tcp", names())
        self.api.put("endpointslices", slice_of("a", [ONE]))
        self.come_from("10.96.0.2", "backend1", "backend2")
        self.assertEqual(self.status()["kubernetes"]["left_out"], 0)
        self.api.put("endpointslices", slice_of("a", [ONE, TWO, THREE]))  # there is room for one
        wait_for("what serves goes on", lambda: "default/a:80/tcp of Kubernetes: there would be more than 4 backends "
                 "(limits.backends): 2 of its 3 are left out" in self.log.read_text())
        self.come_from("10.96.0.1", "backend1")
        self.come_from("10.96.0.2", "backend1", "backend2")

    def test_without_the_api_server_the_last_state_serves_on_and_a_restart_keeps_it(self):
        self.api.put("services", service("web", 0))
        self.api.put("services", service("gone", 1))
        self.api.put("endpointslices", slice_of("web", [ONE]))
        self.api.put("endpointslices", slice_of("gone", [TWO]))
        self.start()
        self.come_from("10.96.0.1", "backend1")
        port, version = self.api.port, self.api.version
        self.api.end()
        wait_for("the status tells", lambda: self.status()["kubernetes"]["current"] is False)
        self.come_from("10.96.0.1", "backend1")
        wait_for("the age grows", lambda: self.status()["kubernetes"]["age_s"] > 0)
        wait_for("the status says why", lambda: self.status()["kubernetes"]["problem"])
        if self.engine == "bpf":
            self.end(signal.SIGKILL)
            self.start()
            for _ in range(3):
                self.come_from("10.96.0.1", "backend1")
                self.come_from("10.96.0.2", "backend2")
            self.assertFalse(self.status(exit_code=1)["kubernetes"]["complete"])
        self.api = ApiServer(port=port)
        self.api.version = version + 100
        self.api.put("services", service("web", 0))
        self.api.put("endpointslices", slice_of("web", [TWO]))
        self.api.compact()
        self.come_from("10.96.0.1", "backend2")
        wait_for("what is gone goes", lambda: len(self.status()["services"]) == 2)
        self.assertTrue(self.status()["kubernetes"]["current"])

    def test_no_connect_to_a_stable_service_fails_whatever_happens_to_the_stream(self):
        self.api.put("services", service("stable", 0))
        self.api.put("endpointslices", slice_of("stable", [ONE, TWO]))
        for number in range(1, 20):
            self.api.put("services", service(f"s{number}", number))
        self.start()
        self.come_from("10.96.0.1", "backend1", "backend2")
        load = stage.Load("http://10.96.0.1/", "-H", "Connection: close")
        chance = random.Random(3)
        self.api.faults.cut_after = lambda: chance.randrange(1, 30000)
        for round in range(300):
            number = chance.randrange(1, 20)
            self.api.put("endpointslices", slice_of(f"s{number}", chance.sample([ONE, TWO, THREE], chance.randrange(4)), 0))
            if round % 30 == 0:
                self.api.put("services", service(f"new{round}", 300 + round))
            if round % 70 == 0:
                self.api.compact()
                self.api.cut()
        self.api.faults.cut_after = None
        self.api.put("services", service("last", 999))
        self.api.put("endpointslices", slice_of("last", [THREE]))
        self.come_from("10.96.3.250", "backend3")
        answers = load.stop()
        self.assertEqual(set(answers), {"backend1", "backend2"})
        # The final state is that of the API server.
        expected = {}
        for (_, name), stored in self.api.objects["services"].items():
            slices = [one.value for one in self.api.objects["endpointslices"].values()
                      if one.value["metadata"]["labels"]["kubernetes.io/service-name"] == name]
            expected[f"default/{name}:80/tcp"] = sorted({endpoint["addresses"][0] for one in slices
                                                         for endpoint in one["endpoints"]})

        def seen():
            return {one["name"]: sorted(backend["address"] for backend in one["backends"])
                    for one in self.status()["services"] if one["name"] != "fixed"}
        wait_for("the state of the API server", lambda: seen() == expected)

    def test_from_an_application_in_one_namespace_to_a_backend_in_another(self):
        name = f"clusterip-test-{os.getpid()}"
        pod = subprocess.Popen(["unshare", "--net", "sh", "-c", "ip link set lo up && echo ready && read line && exec python3 -c '"
                                "import http.server as h\n"
                                "class H(h.BaseHTTPRequestHandler):\n"
                                "  def do_GET(s): s.send_response(200); s.send_header(\"Content-Length\", 4); s.end_headers(); "
                                "s.wfile.write(b\"pod\\n\")\n"
                                "h.HTTPServer((\"10.244.1.2\", 8080), H).serve_forever()'"],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

        def end():
            pod.kill()
            pod.wait()
            pod.stdin.close()
            pod.stdout.close()
            run("ip", "link", "del", "pod0", check=False)
        self.addCleanup(end)
        self.assertEqual(pod.stdout.readline(), b"ready\n", name)
        run("ip", "link", "add", "pod0", "type", "veth", "peer", "name", "eth0", "netns", pod.pid)
        run("ip", "addr", "add", "10.244.1.1/24", "dev", "pod0")
        run("ip", "link", "set", "pod0", "up")
        run("nsenter", f"--net=/proc/{pod.pid}/ns/net", "ip", "addr", "add", "10.244.1.2/24", "dev", "eth0")
        run("nsenter", f"--net=/proc/{pod.pid}/ns/net", "ip", "link", "set", "eth0", "up")
        pod.stdin.write(b"\n")
        pod.stdin.flush()
        self.api.put("services", service("web", 0))
        self.api.put("endpointslices", slice_of("web", ["10.244.1.2"], port=8080))
        self.start()
        self.come_from("10.96.0.1", "pod")


class Bpf(Scenario):
    engine = "bpf"


class Userspace(Scenario):
    engine = "userspace"


if __name__ == "__main__":
    unittest.main()
