# SPDX-License-Identifier: BSD-2-Clause
"""kubernetes/ beside an API server that does what real ones do on bad days. ctest sets CLUSTERIP_BUILD."""

import base64
import itertools
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
import time
import unittest

from api_server import ApiServer, encode, status

WATCH = pathlib.Path(os.environ["CLUSTERIP_BUILD"]) / "tests/kubernetes/kubernetes_watch"
PATIENCE = 60  # seconds; nothing here takes one on an idle machine


def service(name, number, namespace="default", **spec):
    return {"metadata": {"name": name, "namespace": namespace, "labels": {"app": name}},
            "spec": {"type": "ClusterIP", "clusterIP": f"10.96.{number // 250}.{1 + number % 250}",
                     "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": "web"}], **spec}}


def slice_of(name, pods, number=0, namespace="default"):
    return {"metadata": {"name": f"{name}-{number}", "namespace": namespace, "labels": {"kubernetes.io/service-name": name}},
            "addressType": "IPv4", "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
            "endpoints": [{"addresses": [f"10.1.{pod // 250}.{1 + pod % 250}"],
                           "conditions": {"ready": True, "serving": True, "terminating": False}} for pod in pods]}


def address(pod):
    return f"10.1.{pod // 250}.{1 + pod % 250}:8080"


class Watch:
    """The program, and what it has told so far."""

    def __init__(self, **options):
        preexec, wrap = options.pop("preexec", None), options.pop("wrap", [])
        words = [*wrap, str(WATCH)] + [f"{key}={one}" for key, value in options.items()
                                       for one in (value if isinstance(value, list) else [value])]
        self.process = subprocess.Popen(words, preexec_fn=preexec, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.news = threading.Condition()
        self.state, self.log, self.statuses, self.failure, self.batches = {}, [], [], None, 0
        self.listed, self.resolved, self.told = [], [], []
        self.repeated = []  # changes that changed nothing
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def read(self):
        for line in self.process.stdout:
            told = json.loads(line)
            with self.news:
                self.told.append(told)
                if "services" in told:
                    self.batches += 1
                    for name, services in told["services"].items():
                        if self.state.get(name, []) == services:
                            self.repeated.append(name)
                        self.state[name] = services
                        if not services:
                            del self.state[name]
                elif "listed" in told:
                    self.listed.append(told["listed"])
                elif "resolved" in told:
                    self.resolved.append(told["resolved"])
                elif "log" in told:
                    self.log.append(told["log"])
                elif "status" in told:
                    self.statuses.append(told["status"])
                else:
                    self.failure = told["failure"]
                self.news.notify_all()

    def wait(self, what, predicate):
        until = time.monotonic() + PATIENCE
        with self.news:
            while not (result := predicate()):
                left = until - time.monotonic()
                if left <= 0:
                    raise AssertionError(f"waited in vain for {what}; log: {self.log[-5:]}")
                self.news.wait(min(left, 0.1))
            return result

    def backends(self, name):
        return [backend for one in self.state.get(name, []) for backend in one["backends"]]

    def status(self):
        with self.news:
            count = len(self.statuses)
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.wait("the status", lambda: len(self.statuses) > count)
        return self.statuses[-1]

    def end(self):
        self.process.stdin.close()
        code = self.process.wait(PATIENCE)
        self.thread.join()
        self.process.stdout.close()
        return code


class Stage(unittest.TestCase):
    def setUp(self):
        self.directory = pathlib.Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.directory)

    def serve(self, **options):
        server = ApiServer(**options)
        self.addCleanup(server.end)
        return server

    def watch(self, **options):
        watch = Watch(**options)

        def end():
            self.assertEqual(watch.end(), 1 if watch.failure else 0)
        self.addCleanup(end)
        return watch

    def expect_state_of_a_fresh_list(self, watch, server):
        server.faults.cut_after, server.faults.shuffle, server.faults.expire = None, False, lambda: False
        server.put("services", service("last", 9999))  # behind all else
        watch.wait("the last service", lambda: "default/last" in watch.state)
        server.put("endpointslices", slice_of("last", [1]))
        watch.wait("the last endpoint", lambda: watch.backends("default/last") == [address(1)])
        fresh = self.watch(server=server.url)
        fresh.wait("a fresh list", lambda: fresh.batches)
        self.assertEqual(watch.state, fresh.state)
        seen, expected = watch.status(), fresh.status()
        self.assertEqual((seen["services"], seen["slices"]), (expected["services"], expected["slices"]))
        self.assertEqual(watch.repeated, [])


class Following(Stage):
    def test_tells_all_at_once_and_then_what_changes(self):
        server = self.serve()
        for i in range(25):
            server.put("services", service(f"web{i}", i))
            server.put("endpointslices", slice_of(f"web{i}", [i, i + 1]))
        watch = self.watch(server=server.url, page=10)
        watch.wait("all services", lambda: watch.batches)
        self.assertEqual(len(watch.state), 25)
        self.assertEqual(watch.batches, 1)
        self.assertEqual(watch.state["default/web3"],
                         [{"name": "default/web3:80/tcp", "vip": "10.96.0.4:80", "protocol": "tcp",
                           "backends": [address(3), address(4)]}])
        self.assertEqual(server.count("list", "services"), 3)  # pages
        server.put("endpointslices", slice_of("web3", [3]))
        watch.wait("one endpoint less", lambda: watch.backends("default/web3") == [address(3)])
        server.delete("services", "default", "web4")
        watch.wait("a service less", lambda: "default/web4" not in watch.state)
        self.assertEqual(watch.log, [])
        self.assertTrue(watch.status()["is_current"])

    def test_an_empty_cluster_is_told_too(self):
        server = self.serve()
        watch = self.watch(server=server.url)
        watch.wait("nothing at all", lambda: watch.batches)
        self.assertEqual(watch.state, {})
        self.assertTrue(watch.status()["is_complete"])

    def test_asks_for_namespaces_and_labels(self):
        server = self.serve()
        for namespace in ("one", "two", "three"):
            for i, name in enumerate(("web", "db")):
                server.put("services", service(name, 10 * len(namespace) + i + ord(namespace[0]), namespace))
        watch = self.watch(server=server.url, namespace="one", selector="app=web")
        watch.wait("a list", lambda: watch.batches)
        self.assertEqual(set(watch.state), {"one/web"})
        self.assertIn("/api/v1/namespaces/one/services?", " ".join(target for _, _, target in server.requests))
        server.put("services", service("db", 77, "one"))
        server.put("services", service("web", 78, "one"))
        watch.wait("a change", lambda: watch.state["one/web"][0]["vip"] == "10.96.0.79:80")
        self.assertEqual(set(watch.state), {"one/web"})

    def test_goes_on_when_the_server_ends_a_watch_in_good_order(self):
        server = self.serve()
        server.put("services", service("web", 1))
        watch = self.watch(server=server.url, watch_time=1, first_pause=3600000)  # without one
        watch.wait("a list", lambda: watch.batches)
        watch.wait("three watches", lambda: server.count("watch", "services") >= 3)
        self.assertEqual(server.count("list", "services"), 1)
        self.assertEqual(watch.log, [])


    def test_what_was_not_asked_for_is_ignored_with_one_line(self):
        server = self.serve()
        server.faults.every_namespace = server.faults.every_label = True
        for namespace in ("one", "two", "three"):
            for name in ("web", "db"):
                server.put("services", service(name, len(namespace) + 10 * len(name), namespace))
                server.put("endpointslices", slice_of(name, [len(namespace)], namespace=namespace))
        watch = self.watch(server=server.url, namespace="one", selector="app in (web, api),!old")
        watch.wait("a list", lambda: watch.batches)
        server.put("endpointslices", slice_of("web", [7], namespace="two"))
        server.put("endpointslices", slice_of("web", [8], namespace="one"))
        watch.wait("a change", lambda: watch.backends("one/web") == [address(8)])
        self.assertEqual(set(watch.state), {"one/web"})
        self.assertEqual(watch.status()["services"], 1)
        told = [line.removeprefix(f"kubernetes: {server.url}: ") for line in watch.log]
        self.assertIn("endpointslice three/db-0: expected one of the namespace one, as was asked for: this and its like is ignored", told)
        self.assertEqual(len(told), 2, told)  # one for services
        relabelled = service("web", 33, "one")
        relabelled["metadata"]["labels"]["old"] = ""
        server.put("services", relabelled)
        watch.wait("its end", lambda: not watch.state)

    def test_addresses_are_told_before_each_connect(self):
        server = self.serve()
        watch = self.watch(server=server.url)
        watch.wait("a list", lambda: watch.batches)
        self.assertEqual(watch.told[0], {"resolved": [f"127.0.0.1:{server.port}"]})
        told = len(watch.resolved)
        server.cut()
        watch.wait("both again", lambda: len(watch.resolved) >= told + 2)
        named = self.watch(server=f"http://localhost:{server.port}")
        named.wait("a list", lambda: named.batches)
        self.assertIn(f"127.0.0.1:{server.port}", named.resolved[0])
        port = server.port
        server.end()
        deaf = self.watch(server=f"http://127.0.0.1:{port}")
        deaf.wait("addresses where nobody listens", lambda: [f"127.0.0.1:{port}"] in deaf.resolved)

    def test_a_namespace_is_listed_before_its_services_are_told(self):
        server = self.serve()
        for number, namespace in enumerate(("one", "two")):
            server.put("services", service("web", number, namespace))
        watch = self.watch(server=server.url, namespace=["one", "two"])
        watch.wait("all", lambda: len(watch.state) == 2)
        for namespace in ("one", "two"):
            first = next(i for i, told in enumerate(watch.told) if f"{namespace}/web" in told.get("services", {}))
            self.assertIn({"listed": namespace}, watch.told[:first])
        whole = self.watch(server=server.url)
        whole.wait("a list", lambda: whole.batches)
        self.assertEqual(whole.listed, [""])

    @unittest.skipUnless(os.geteuid() == 0 or os.environ.get("CLUSTERIP_REQUIRE_PRIVILEGE") == "1", "needs root")
    def test_name_servers_that_are_silent_are_told_and_waited_for_no_longer(self):
        (self.directory / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:30 attempts:5\n")
        keeps_silent = ("import os, socket, sys; one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); one.bind(('127.0.0.1', 53)); "
                        "one.set_inheritable(True); os.execv(sys.argv[1], sys.argv[1:])")
        script = (f"set -e; ip link set lo up; mount --bind {self.directory}/resolv.conf /etc/resolv.conf; "
                  f'exec python3 -c "{keeps_silent}" "$@"')
        watch = self.watch(server="https://api.test:6443", patience=1, wrap=["unshare", "--net", "--mount", "sh", "-c", script, "sh"])
        watch.wait("a line", lambda: any("services: api.test: no name server answers in time" in line for line in watch.log))
        watch.wait("more attempts", lambda: watch.status()["failures"] >= 4)


class BadDays(Stage):
    def test_a_cut_connection_goes_on_from_where_it_was(self):
        server = self.serve()
        server.put("services", service("web", 1))
        watch = self.watch(server=server.url)
        watch.wait("a list", lambda: watch.batches)
        for pod in range(20):
            watched = server.count("watch", "endpointslices")
            server.cut()
            server.put("endpointslices", slice_of("web", [pod]))
            watch.wait("the change behind the cut", lambda: watch.backends("default/web") == [address(pod)])
            watch.wait("a new watch", lambda: server.count("watch", "endpointslices") > watched)
        self.assertEqual(server.count("list", "services"), 1)
        self.assertEqual(server.count("list", "endpointslices"), 1)

    def test_410_lists_again_and_misses_nothing(self):
        server = self.serve()
        server.put("services", service("web", 1))
        server.put("services", service("gone", 2))
        watch = self.watch(server=server.url)
        watch.wait("a list", lambda: watch.batches)
        with server.lock:  # what happens meanwhile is forgotten before anybody hears of it
            server.put("endpointslices", slice_of("web", [7]))
            server.delete("services", "default", "gone")
            server.compact()
            server.cut()
        watch.wait("the change", lambda: watch.backends("default/web") == [address(7)])
        watch.wait("the deletion", lambda: "default/gone" not in watch.state)
        self.assertEqual(server.count("list", "services"), 2)

    def test_data_that_was_restored_is_taken_as_it_is(self):
        server = self.serve()
        server.put("services", service("web", 1))
        server.put("services", service("gone", 2))
        server.put("endpointslices", slice_of("web", [1]))
        taken = server.backup()
        watch = self.watch(server=server.url)
        watch.wait("a list", lambda: watch.batches)
        server.delete("services", "default", "gone")
        server.put("services", service("late", 3))
        for pod in range(2, 10):
            server.put("endpointslices", slice_of("web", [pod]))
        watch.wait("the changes", lambda: watch.backends("default/web") == [address(9)] and set(watch.state) == {"default/web", "default/late"})
        with server.lock:
            server.restore(taken)
            server.cut()
        watch.wait("the old state", lambda: watch.backends("default/web") == [address(1)] and set(watch.state) == {"default/web", "default/gone"})
        watch.wait("a line", lambda: any("its data is older than before" in line for line in watch.log))
        self.expect_state_of_a_fresh_list(watch, server)

    def test_versions_that_go_back_while_all_is_watched_are_noticed(self):
        server = self.serve()
        server.put("services", service("web", 1))
        taken = server.backup()
        watch = self.watch(server=server.url, page=50)
        watch.wait("a list", lambda: watch.batches)
        for number in range(2, 10):
            server.put("services", service("web", number))
        watch.wait("the changes", lambda: watch.state["default/web"][0]["vip"] == "10.96.0.10:80")
        server.restore(taken, is_told=True)
        server.put("services", service("web", 100))
        watch.wait("the change", lambda: watch.state["default/web"][0]["vip"] == "10.96.0.101:80")
        self.expect_state_of_a_fresh_list(watch, server)

    def test_a_server_with_lower_versions_in_its_place_is_noticed(self):
        server = self.serve()
        server.version = 5000
        server.put("services", service("web", 1))
        watch = self.watch(server=server.url)
        watch.wait("a list", lambda: watch.batches)
        port = server.port
        server.end()
        again = self.serve(port=port)
        again.put("services", service("other", 2))
        watch.wait("the new server's", lambda: set(watch.state) == {"default/other"})

    def test_a_version_that_is_refused_each_time_leads_to_a_fresh_list(self):
        error = status(500, "InternalError", "no such revision")
        begin = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"
        for form, answer in (("an event, and no end", begin + encode({"type": "ERROR", "object": error})),
                             ("an event, late", begin + encode({"type": "ERROR", "object": error})),
                             ("a status, and no end", begin + encode(error)),
                             ("an unknown event, and no end", begin + encode({"type": "NEWS", "object": service("web", 1)})),
                             ("another status, and an end", b"HTTP/1.1 500 X\r\nContent-Length: 0\r\n\r\n")):
            with self.subTest(form):
                server = self.serve()
                server.put("services", service("web", 1))
                watch = self.watch(server=server.url, proof=0 if "late" in form else 500)
                watch.wait("a list", lambda: watch.batches)
                watch.wait("a watch", lambda: server.count("watch", "services") and server.count("watch", "endpointslices"))
                with server.lock:
                    bad = server.version
                    server.faults.refuse = lambda version: answer if version <= bad else None
                    server.cut()
                    server.put("services", service("web", 2))
                watch.wait("the change", lambda: watch.state["default/web"][0]["vip"] == "10.96.0.3:80")
                watch.wait("word that all is well", lambda: sum("watched again" in line for line in watch.log) == 2)

    def expect_pauses_that_grow(self, server, watch, verb):
        """From 20 ms on, each up to twice as long as the one before; no pause is too long on a machine that is busy."""
        watch.wait("some attempts", lambda: len(server.pauses(verb, "services")) >= 7)
        self.assertGreater(server.pauses(verb, "services")[6], 0.3)

    def test_watches_that_are_cut_at_once_are_failures(self):
        for form, end in (("cut", b""), ("ended", b"0\r\n\r\n")):
            with self.subTest(form):
                server = self.serve()
                server.put("services", service("web", 1))
                head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n" + end
                server.faults.refuse, server.faults.hold = lambda version: head, False
                watch = self.watch(server=server.url, max_pause=5000, proof=60000)
                self.expect_pauses_that_grow(server, watch, "watch")
                lines = [line for line in watch.log if ": services: " in line]
                self.assertEqual(len(lines), 1, watch.log)
                self.assertIn("services: a watch ends as soon as it has begun", lines[0])
                self.assertIn("a watch ends as soon as it has begun", watch.status()["problem"])
                server.faults.refuse = lambda version: None
                server.put("services", service("web", 2))
                watch.wait("the change", lambda: watch.state["default/web"][0]["vip"] == "10.96.0.3:80")
                watch.wait("word that all is well", lambda: any("services: watched again" in line for line in watch.log))

    def test_410_each_time_is_no_reason_to_hurry(self):
        server = self.serve()
        server.put("services", service("web", 1))
        server.faults.expire = lambda: True
        watch = self.watch(server=server.url, max_pause=5000, proof=60000)
        self.expect_pauses_that_grow(server, watch, "list")
        self.assertEqual(sum("services: 410: what was listed is forgotten before it is watched" in line for line in watch.log), 1)
        server.faults.expire = lambda: False
        server.put("services", service("web", 2))
        watch.wait("the change", lambda: watch.state["default/web"][0]["vip"] == "10.96.0.3:80")

    def test_a_list_that_does_not_end_is_left(self):
        numbers = itertools.count()

        def same_page(metadata, items):
            return {**metadata, "continue": "bm90aGluZw"}, items

        def pages_of_nothing(metadata, _):
            return {**metadata, "continue": f"page{next(numbers)}"}, []

        def new_objects(metadata, _):
            return {**metadata, "continue": f"page{next(numbers)}"}, [
                encode({"kind": "Service", **service(f"x{next(numbers)}", 7)}) for _ in range(5)]

        def one_page(metadata, _):
            return metadata, [encode({"kind": "Service", **service(f"x{next(numbers)}", 7)}) for _ in range(100)]
        for form, expected in ((same_page, "it names the same page twice"), (pages_of_nothing, "more than 36 pages"),
                               (new_objects, "more than 50 objects"), (one_page, "more than 50 objects")):
            with self.subTest(form.__name__):
                server = self.serve()
                server.put("services", service("web", 1))
                server.faults.unlisted = form
                watch = self.watch(server=server.url, page=5, max_objects=50, max_pause=100)
                watch.wait("a line", lambda: any(": services: the list does not end: " + expected in line for line in watch.log))
                failures = watch.status()["failures"]
                watch.wait("more attempts", lambda: watch.status()["failures"] > failures + 4)
                self.assertEqual(sum(": services: " in line for line in watch.log), 1, watch.log)
                self.assertLessEqual(watch.status()["services"], 50)
                server.faults.unlisted = None
                watch.wait("the service", lambda: set(watch.state) == {"default/web"})
                self.assertEqual(watch.status()["services"], 1)

    def test_events_without_end_are_left(self):
        server = self.serve()
        server.put("services", service("web", 1))
        watch = self.watch(server=server.url, max_objects=20)
        watch.wait("a list", lambda: watch.batches)
        for number in range(2, 30):
            server.put("services", service(f"web{number}", number))
        watch.wait("a line", lambda: any(": services: more than 20 objects" in line for line in watch.log))
        self.assertLessEqual(watch.status()["services"], 21)
        for number in range(2, 30):
            server.delete("services", "default", f"web{number}")
        watch.wait("the rest", lambda: set(watch.state) == {"default/web"})

    def test_a_page_that_expires_begins_the_list_again(self):
        server = self.serve()
        for i in range(30):
            server.put("services", service(f"web{i}", i))
        begun = []

        def forget_once():
            if server.count("list", "services") == 2 and not begun:
                begun.append(True)
                server.compact()
            return None
        server.faults.cut_after = forget_once
        watch = self.watch(server=server.url, page=7)
        watch.wait("all services", lambda: len(watch.state) == 30)

    def churn(self, server, chance, count, names=12):
        """Changes by chance, of a cluster that is full of rollouts."""
        for _ in range(count):
            name = f"s{chance.randrange(names)}"
            what = chance.random()
            with server.lock:
                if what < 0.1:
                    server.put("services", service(name, chance.randrange(200)))
                elif what < 0.15 and ("default", name) in server.objects["services"]:
                    server.delete("services", "default", name)
                elif what < 0.25:
                    slices = [key for key in server.objects["endpointslices"] if not key[1].startswith("stable")]
                    if slices:
                        server.delete("endpointslices", *chance.choice(slices))
                else:
                    pods = chance.sample(range(500), chance.randrange(6))
                    server.put("endpointslices", slice_of(name, pods, chance.randrange(3)))
            if chance.random() < 0.1:
                time.sleep(0.001)  # no more than a pace: nothing depends on it

    def test_cuts_at_any_byte(self):
        server = self.serve()
        server.put("services", service("stable", 240))
        server.put("endpointslices", slice_of("stable", [1, 2, 3]))
        chance = random.Random(5)
        server.faults.cut_after = lambda: chance.randrange(1, 20000)
        watch = self.watch(server=server.url, page=5)
        watch.wait("a list", lambda: watch.batches)
        self.churn(server, chance, 3000)
        self.expect_state_of_a_fresh_list(watch, server)
        self.assertEqual(watch.backends("default/stable"), [address(1), address(2), address(3)])

    def test_410_at_any_time_and_events_out_of_order_and_twice(self):
        server = self.serve()
        chance = random.Random(6)
        watch = self.watch(server=server.url, page=5)
        watch.wait("a list", lambda: watch.batches)
        server.faults.shuffle = True
        server.faults.expire = lambda: chance.random() < 0.02
        self.churn(server, chance, 3000)
        self.expect_state_of_a_fresh_list(watch, server)

    def test_a_slow_stream_is_read_as_it_comes(self):
        server = self.serve()
        server.put("services", service("web", 1))
        watch = self.watch(server=server.url)
        watch.wait("a list", lambda: watch.batches)
        server.faults.slow = 0.002
        server.put("endpointslices", slice_of("web", [1, 2]))
        watch.wait("the change", lambda: watch.backends("default/web") == [address(1), address(2)])

    def test_a_server_that_does_not_answer_is_told_and_left(self):
        server = self.serve()
        server.put("services", service("web", 1))
        server.faults.silent = True
        watch = self.watch(server=server.url, patience=1)
        watch.wait("a line", lambda: any("it does not answer in time" in line for line in watch.log))
        self.assertFalse(watch.status()["is_complete"])
        server.faults.silent = False
        watch.wait("a list", lambda: watch.batches)

    def test_a_stream_that_has_gone_silent_is_left(self):
        server = self.serve()
        server.put("services", service("web", 1))
        watch = self.watch(server=server.url, max_silence=2000)
        watch.wait("a list", lambda: watch.batches)
        watch.wait("bookmarks of both", lambda: watch.status()["events"] >= 10)
        with server.lock:
            server.faults.muted = len(server.requests)
            server.put("endpointslices", slice_of("web", [7]))
        watch.wait("the change", lambda: watch.backends("default/web") == [address(7)])
        self.assertEqual(server.count("list", "endpointslices"), 1)

    def test_a_stream_without_bookmarks_may_be_silent(self):
        server = self.serve()
        server.faults.bookmarks = False
        watch = self.watch(server=server.url, max_silence=100, watch_time=1)
        watch.wait("the next watch", lambda: server.count("watch", "services") >= 2)
        self.assertGreater(server.pauses("watch", "services")[0], 0.9)

    def host_with(self, *addresses):
        """What runs a command for which localhost has these addresses."""
        (self.directory / "hosts").write_text("".join(f"{one} localhost\n" for one in addresses))
        return ["unshare", "--mount", "sh", "-c", f'set -e; mount --bind {self.directory}/hosts /etc/hosts; exec "$@"', "sh"]

    @unittest.skipUnless(os.geteuid() == 0 or os.environ.get("CLUSTERIP_REQUIRE_PRIVILEGE") == "1", "needs root")
    def test_an_address_that_is_silent_does_not_hide_the_others(self):
        server = self.serve(host="127.0.0.3")
        server.put("services", service("web", 1))
        silent = socket.socket()
        self.addCleanup(silent.close)
        silent.bind(("127.0.0.2", server.port))
        silent.listen(0)
        for _ in range(100):  # until there is no room for one more
            other = socket.socket()
            self.addCleanup(other.close)
            other.settimeout(0.5)
            try:
                other.connect(silent.getsockname())
            except TimeoutError:
                break
        else:
            self.fail("all connects were answered")
        watch = self.watch(server=f"http://localhost:{server.port}", connect_time=200, patience=3600,
                           wrap=self.host_with("127.0.0.2", "127.0.0.3"))
        watch.wait("a list", lambda: watch.batches)
        self.assertEqual(watch.resolved[0], [f"127.0.0.{end}:{server.port}" for end in (2, 3)])

    @unittest.skipUnless(os.geteuid() == 0 or os.environ.get("CLUSTERIP_REQUIRE_PRIVILEGE") == "1", "needs root")
    def test_an_address_that_connects_and_says_nothing_is_not_the_only_one_that_is_tried(self):
        server = self.serve(host="127.0.0.3")
        server.put("services", service("web", 1))
        silent = self.serve(host="127.0.0.2", port=server.port)
        silent.faults.silent = True
        watch = self.watch(server=f"http://localhost:{server.port}", patience=1,
                           wrap=self.host_with("127.0.0.2", "127.0.0.3"))
        watch.wait("a list", lambda: watch.batches)
        self.assertEqual(silent.requests, [])
        self.assertGreater(silent.accepted, 0)

    def test_a_server_that_is_gone_leaves_the_last_state_and_no_line_twice(self):
        server = self.serve()
        server.put("services", service("web", 1))
        watch = self.watch(server=server.url)
        watch.wait("a list", lambda: watch.batches)
        port = server.port
        server.end()
        # It may be seen to go (reset) and to be gone (refused): those are two.
        watch.wait("lines of both", lambda: {line.split(": ")[2] for line in watch.log} == {"endpointslices", "services"})
        self.assertFalse(watch.status()["is_current"])
        self.assertEqual(len(watch.log), len(set(watch.log)), watch.log)
        self.assertEqual(set(watch.state), {"default/web"})
        again = self.serve(port=port)
        again.version = server.version + 100
        again.put("services", service("other", 2))
        again.compact()
        watch.wait("the new server's", lambda: set(watch.state) == {"default/other"})
        watch.wait("word that all is well", lambda: sum("watched again" in line for line in watch.log) == 2)


class BadObjects(Stage):
    def test_are_skipped_with_a_line_that_names_them(self):
        server = self.serve()
        server.put("services", service("web", 1))
        server.put("services", {"metadata": {"name": "bad", "namespace": "default"}})
        server.put("endpointslices", slice_of("web", [1]))
        watch = self.watch(server=server.url)
        watch.wait("a list", lambda: watch.batches)
        watch.wait("a line", lambda: "kubernetes: service default/bad: spec: expected an object, got nothing: skipped" in watch.log)
        server.put("services", service("sctp", 3, ports=[{"port": 9, "protocol": "SCTP"}]))
        watch.wait("a line", lambda: any("service default/sctp: spec.ports[0].protocol: expected TCP or UDP" in line
                                         for line in watch.log))
        good = json.dumps({"kind": "Service", **service("web", 5)}).encode()
        # A list tells of objects that are no JSON as an event does; in a list, the whole page would be none.
        named = b'{"type":"MODIFIED","object":{"kind":"Service","metadata":{"name":"web","namespace":"default","resourceVersion":"9"},'
        server.send("services", named + b'"spec":nonsense}}\n')
        watch.wait("a line", lambda: any("service default/web: expected JSON" in line for line in watch.log))
        watch.wait("it is gone", lambda: "default/web" not in watch.state)
        server.put("services", service("web", 2))
        watch.wait("it is back", lambda: watch.backends("default/web") == [address(1)])
        server.send("services", too_large("web"))
        watch.wait("a line", lambda: "kubernetes: service default/web: expected at most 8 MiB: skipped" in watch.log)
        server.put("services", service("web", 3))
        watch.wait("it is back", lambda: watch.backends("default/web") == [address(1)])
        foreign = json.loads(good)
        foreign["metadata"] = {"name": "foreign", "namespace": "default", "annotations": {"note": "NOTE"},
                               "resourceVersion": "RESOURCE_VERSION"}
        server.put("services", service("foreign", 5), json.dumps(foreign).encode().replace(b"NOTE", b"\xff\xfe"))
        watch.wait("foreign bytes in a note", lambda: "default/foreign" in watch.state)
        self.assertTrue(watch.status()["is_current"])

    def test_an_answer_that_is_something_else_is_told(self):
        server = self.serve()
        server.put("services", service("web", 1))
        watch = self.watch(server=server.url)
        watch.wait("a watch", lambda: server.begun["services"])
        server.send("services", b"<html>a proxy speaks</html>\n")
        watch.wait("the next watch", lambda: server.count("watch", "services") >= 2)
        server.put("services", service("web", 2))
        watch.wait("the change", lambda: watch.state["default/web"][0]["vip"] == "10.96.0.3:80")


def is_alive(pid):
    """Zombies are not."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def too_large(name):
    """An event with an object of 9 MiB."""
    event = {"type": "MODIFIED", "object": {"kind": "Service", **service(name, 9), "spec": {"x": "x" * (9 << 20)}}}
    return json.dumps(event, separators=(",", ":")).encode() + b"\n"


class Memory(Stage):
    def test_of_the_largest_object_is_given_back(self):
        server = self.serve()
        server.put("services", service("web", 1))
        server.put("endpointslices", slice_of("web", [1]))
        watch = self.watch(server=server.url)
        watch.wait("a list", lambda: watch.backends("default/web") == [address(1)])
        before = resident(watch.process.pid)
        for _ in range(3):
            server.send("services", too_large("web"))
            watch.wait("it is gone", lambda: "default/web" not in watch.state)
            server.put("services", service("web", 3))
            watch.wait("it is back", lambda: watch.backends("default/web") == [address(1)])
        self.assertLess(resident(watch.process.pid), before + (4 << 20))


def resident(pid):
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no VmRSS")


class Authorities(Stage):
    """TLS, tokens and permissions."""

    def openssl(self, *words):
        subprocess.run(["openssl", *words], cwd=self.directory, check=True, capture_output=True)

    def make_authority(self, name):
        self.openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
                     "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.crt")

    def make_certificate(self, name, authority, alternatives):
        self.openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", f"/CN={name}",
                     "-keyout", f"{name}.key", "-out", f"{name}.csr")
        (self.directory / "extensions").write_text(f"subjectAltName={alternatives}\n")
        self.openssl("x509", "-req", "-in", f"{name}.csr", "-CA", f"{authority}.crt", "-CAkey", f"{authority}.key",
                     "-CAcreateserial", "-days", "2", "-extfile", "extensions", "-out", f"{name}.crt")

    def tls(self, name, client_authority=None):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.directory / f"{name}.crt", self.directory / f"{name}.key")
        if client_authority:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self.directory / f"{client_authority}.crt")
        return context

    def setUp(self):
        super().setUp()
        self.make_authority("authority")
        self.make_certificate("server", "authority", "IP:127.0.0.1,DNS:api.test")
        self.token = self.directory / "token"
        self.token.write_text("first\n")

    def file(self, name):
        return self.directory / name

    def test_a_file_of_authorities_without_one_is_refused(self):
        server = self.serve(tls=self.tls("server"))
        for content in ("", "junk"):
            self.file("empty.crt").write_text(content)
            watch = self.watch(server=server.url, ca_file=self.file("empty.crt"))
            watch.wait("a refusal", lambda: watch.failure)
            self.assertIn("empty.crt: expected certificates in PEM form", watch.failure)

    def test_tokens_are_read_again_when_they_are_rotated(self):
        server = self.serve(tls=self.tls("server"), tokens={"first"})
        server.put("services", service("web", 1))
        watch = self.watch(server=server.url, ca_file=self.file("authority.crt"), token_file=self.token)
        watch.wait("a list", lambda: watch.batches)
        server.tokens = {"second"}
        server.cut()
        watch.wait("a line", lambda: any(f"401: it does not accept the credentials (Unauthorized): the token in {self.token} has "
                                         "expired" in line for line in watch.log))
        self.token.write_text("second\n")
        server.put("services", service("web", 2))
        watch.wait("the change", lambda: watch.state["default/web"][0]["vip"] == "10.96.0.3:80")

    def test_another_authority_is_not_trusted(self):
        self.make_authority("stranger")
        server = self.serve(tls=self.tls("server"))
        watch = self.watch(server=server.url, ca_file=self.file("stranger.crt"))
        watch.wait("a line", lambda: any("its certificate is not trusted: unable to get local issuer certificate (authorities: "
                                         f"{self.file('stranger.crt')})" in line for line in watch.log))
        self.assertEqual(server.requests, [])

    def test_a_certificate_for_another_name_is_not_trusted(self):
        self.make_certificate("elsewhere", "authority", "IP:127.0.0.9,DNS:elsewhere.test")
        server = self.serve(tls=self.tls("elsewhere"))
        watch = self.watch(server=server.url, ca_file=self.file("authority.crt"))
        watch.wait("a line", lambda: any("its certificate is not for 127.0.0.1" in line for line in watch.log))
        self.assertEqual(server.requests, [])

    def test_a_missing_permission_is_named(self):
        server = self.serve()
        server.faults.forbidden = {("list", "services"), ("watch", "endpointslices")}
        watch = self.watch(server=server.url)
        for verb, what, group in (("list", "services", ""), ("watch", "endpointslices", "discovery.k8s.io")):
            watch.wait("a line", lambda: any(f'403: missing permission: verb {verb} on {what} of the API group "{group}" in all '
                                             "namespaces" in line for line in watch.log))
        server.faults.forbidden = set()
        watch.wait("a list", lambda: watch.batches)

    def test_a_namespace_without_permission_keeps_no_other_from_being_served(self):
        server = self.serve()
        for number, namespace in enumerate(("one", "two", "three")):
            server.put("services", service("web", number, namespace))
        server.faults.forbidden = {("list", "endpointslices", "two")}
        watch = self.watch(server=server.url, namespace=["one", "two", "three"])
        watch.wait("two of them", lambda: set(watch.state) == {"one/web", "three/web"})
        watch.wait("a line", lambda: any("403: missing permission: verb list on endpointslices" in line and
                                         "in the namespace two" in line for line in watch.log))
        self.assertEqual(sorted(watch.listed), ["one", "three"])
        self.assertFalse(watch.status()["is_complete"])
        server.put("endpointslices", slice_of("web", [3], namespace="three"))
        watch.wait("a change", lambda: watch.backends("three/web") == [address(3)])
        server.faults.forbidden = set()
        watch.wait("the third", lambda: set(watch.state) == {"one/web", "two/web", "three/web"})
        self.assertEqual(sorted(watch.listed), ["one", "three", "two"])
        self.assertTrue(watch.status()["is_complete"])

    def write_kubeconfig(self, server, user, **cluster):
        data = {"apiVersion": "v1", "kind": "Config", "current-context": "test",
                "clusters": [{"name": "c", "cluster": {"server": server.url, "certificate-authority": "authority.crt", **cluster}}],
                "users": [{"name": "u", "user": user}],
                "contexts": [{"name": "test", "context": {"cluster": "c", "user": "u"}},
                             {"name": "broken", "context": {"cluster": "c", "user": "nobody"}}]}
        self.file("kubeconfig").write_text(json.dumps(data))  # JSON is YAML
        return self.file("kubeconfig")

    def expect_list(self, **options):
        watch = self.watch(**options)
        watch.wait("a list", lambda: watch.batches)

    def test_kubeconfig_with_a_client_certificate_in_base64(self):
        self.make_certificate("client", "authority", "DNS:client.test")
        server = self.serve(tls=self.tls("server", "authority"))
        user = {f"client-{what}-data": base64.b64encode(self.file(f"client.{end}").read_bytes()).decode()
                for what, end in (("certificate", "crt"), ("key", "key"))}
        self.expect_list(kubeconfig=self.write_kubeconfig(server, user))

    def test_kubeconfig_with_tokens(self):
        server = self.serve(tls=self.tls("server"), tokens={"first"})
        self.expect_list(kubeconfig=self.write_kubeconfig(server, {"token": "first"}))
        self.expect_list(kubeconfig=self.write_kubeconfig(server, {"tokenFile": "token"}))
        self.expect_list(kubeconfig=self.write_kubeconfig(server, {"token": "first"}, **{"tls-server-name": "api.test"}))

    def test_kubeconfig_with_a_command(self):
        server = self.serve(tls=self.tls("server"), tokens={"printed"})
        credentials = {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": {"token": "printed"}}
        self.file("credentials").write_text(json.dumps(credentials))
        command = {"apiVersion": "client.authentication.k8s.io/v1", "command": "/bin/sh",
                   "args": ["-c", 'test -n "$KUBERNETES_EXEC_INFO" && cat "$WHERE"'],
                   "env": [{"name": "WHERE", "value": str(self.file("credentials"))}]}
        self.expect_list(kubeconfig=self.write_kubeconfig(server, {"exec": command}))
        watch = self.watch(kubeconfig=self.write_kubeconfig(server, {"exec": {**command, "args": ["-c", "exit 3"]}}))
        watch.wait("a line", lambda: any("/bin/sh failed: exit 3" in line for line in watch.log))

    def plugin(self, script, server, **more):
        """A kubeconfig whose command is this script, with what it may print in the file "credentials"."""
        self.file("credentials").write_text(json.dumps(
            {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": {"token": "printed", **more}}))
        return self.write_kubeconfig(server, {"exec": {
            "apiVersion": "client.authentication.k8s.io/v1", "command": "/bin/sh", "args": ["-c", f"cd {self.directory}; {script}"]}})

    def wait_until_gone(self, watch, file):
        pid = int(watch.wait("a pid", lambda: self.file(file).exists() and self.file(file).read_text().strip()))
        watch.wait("its end", lambda: not is_alive(pid))

    def test_a_command_inherits_nothing_that_is_not_meant_for_it(self):
        server = self.serve(tls=self.tls("server"), tokens={"printed"})
        config = self.plugin("cat /proc/$$/environ > environment; cat credentials", server)
        told = json.loads(config.read_text())
        told["users"][0]["user"]["exec"]["env"] = [{"name": "KUBERNETES_EXEC_INFO", "value": "{}"}, {"name": "MINE", "value": "1"}]
        config.write_text(json.dumps(told))
        watch = self.watch(kubeconfig=config, wrap=["env", "KUBERNETES_EXEC_INFO={}", "NOTIFY_SOCKET=/run/none", "WATCHDOG_PID=1",
                                                    "WATCHDOG_USEC=1000", "THEIRS=1"])
        watch.wait("a list", lambda: watch.batches)
        given = [line.split("=", 1) for line in self.file("environment").read_text().split("\0") if line]
        names = [name for name, _ in given]
        self.assertEqual(names.count("KUBERNETES_EXEC_INFO"), 1)
        self.assertEqual(json.loads(dict(given)["KUBERNETES_EXEC_INFO"])["kind"], "ExecCredential")
        self.assertEqual(set(names) & {"NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "THEIRS", "MINE"}, {"THEIRS", "MINE"})

    def test_a_child_that_keeps_a_commands_output_open_ends_with_it(self):
        server = self.serve(tls=self.tls("server"), tokens={"printed"})
        watch = self.watch(kubeconfig=self.plugin("sleep 600 & echo $! > child; cat credentials", server))
        watch.wait("a list", lambda: watch.batches)
        self.wait_until_gone(watch, "child")

    def test_what_leaves_a_commands_group_does_not_hold_up_anything(self):
        server = self.serve(tls=self.tls("server"), tokens={"printed"})
        watch = self.watch(kubeconfig=self.plugin("setsid sleep 600 & echo $! > child; cat credentials", server))
        try:
            watch.wait("a list", lambda: watch.batches)
        finally:
            os.kill(int(self.file("child").read_text()), signal.SIGKILL)

    def test_a_command_that_does_not_end_is_ended_with_its_children(self):
        server = self.serve(tls=self.tls("server"), tokens={"printed"})
        config = self.plugin("sleep 600 & echo $! > child; sleep 600", server)
        watch = self.watch(kubeconfig=config, exec_time=1)
        watch.wait("a line", lambda: any("/bin/sh took more than 1 s" in line for line in watch.log))
        self.wait_until_gone(watch, "child")
        self.plugin("cat credentials", server)  # is not read again
        self.assertFalse(watch.status()["is_complete"])

    def test_a_command_ends_with_who_has_started_it(self):
        server = self.serve(tls=self.tls("server"), tokens={"printed"})
        watch = Watch(kubeconfig=self.plugin("sleep 600 & echo $! > child; echo $$ > leader; sleep 600", server))
        pids = [int(watch.wait("a pid", lambda: self.file(name).exists() and self.file(name).read_text().strip()))
                for name in ("child", "leader")]
        self.assertEqual(watch.end(), 0)
        watch.wait("their end", lambda: not any(is_alive(pid) for pid in pids))

    def test_a_command_that_prints_without_end_is_ended(self):
        server = self.serve(tls=self.tls("server"), tokens={"printed"})
        watch = self.watch(kubeconfig=self.plugin("exec cat /dev/zero", server))
        watch.wait("a line", lambda: any("/bin/sh prints more than 1048576 bytes" in line for line in watch.log))

    def test_a_command_is_run_once_for_all_who_wait_for_it(self):
        server = self.serve(tls=self.tls("server"), tokens={"printed"})
        config = self.plugin("echo run >> runs; cat credentials", server)
        watch = self.watch(kubeconfig=config, namespace=["one", "two", "three"])
        watch.wait("all lists", lambda: len(watch.listed) == 3)
        self.assertEqual(self.file("runs").read_text(), "run\n")
        self.plugin("", server, token="another")
        watched = server.count("watch", "services") + server.count("watch", "endpointslices")
        server.tokens = {"another"}
        server.cut()
        watch.wait("new watches", lambda: server.count("watch", "services") + server.count("watch", "endpointslices") >= watched + 6)
        self.assertEqual(self.file("runs").read_text(), "run\n" * 2)

    def test_a_command_without_file_descriptors_is_told_and_tried_again(self):
        server = self.serve(tls=self.tls("server"), tokens={"printed"})
        config = self.plugin("cat credentials", server)
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        told = set()
        for limit in range(7, 12):  # 7 are for its input, output and loop
            watch = self.watch(kubeconfig=config, preexec=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard)))
            watch.wait("a line or a list", lambda: watch.log or watch.batches)
            told.update(what for what in ("pipe", "pidfd_open") for line in watch.log
                        if f"/bin/sh: {what}: Too many open files (LimitNOFILE=, ulimit -n)" in line)
            resource.prlimit(watch.process.pid, resource.RLIMIT_NOFILE, (64, hard))
            watch.wait("a list", lambda: watch.batches)
        self.assertEqual(told, {"pipe", "pidfd_open"})

    def test_kubeconfig_mistakes_are_told(self):
        server = self.serve()

        def failure(text=None, **options):
            if text is not None:
                self.file("kubeconfig").write_text(text)
            watch = self.watch(kubeconfig=self.file("kubeconfig"), **options)
            return watch.wait("a failure", lambda: watch.failure)
        self.write_kubeconfig(server, {"token": "first"})
        self.assertIn('contexts: expected one with the name "none", got none', failure(context="none"))
        self.assertIn('users: expected one with the name "nobody", got none', failure(context="broken"))
        self.write_kubeconfig(server, {"token": "first"}, **{"insecure-skip-tls-verify": True})
        self.assertIn("insecure-skip-tls-verify: expected false", failure())
        self.assertIn("line 1: ", failure("a: ["))
        self.assertIn("expected a kubeconfig", failure("[]"))
        self.write_kubeconfig(server, {"username": "a", "password": "b"})
        self.assertIn("username: expected a token, a client certificate or exec", failure())


@unittest.skipUnless(shutil.which("kubectl") or os.environ.get("CLUSTERIP_REQUIRE_PRIVILEGE") == "1", "there is no kubectl")
class Kubectl(Stage):
    """An independent client takes the test's server for what it plays."""

    def kubectl(self, server, *words):
        environment = {**os.environ, "HOME": str(self.directory), "KUBECONFIG": "/dev/null"}
        process = subprocess.Popen(["kubectl", "--server", server.url, *words], env=environment, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True)

        def end():
            process.terminate()
            process.wait()
            process.stdout.close()
        self.addCleanup(end)
        return process

    def test_lists_services_and_slices(self):
        server = self.serve()
        for i in range(3):
            server.put("services", service(f"web{i}", i))
            server.put("endpointslices", slice_of(f"web{i}", [i]))
        listed = self.kubectl(server, "get", "services,endpointslices", "--all-namespaces", "--chunk-size=2", "-o", "json")
        items = json.loads(listed.stdout.read())["items"]
        self.assertEqual(sorted((item["kind"], item["metadata"]["name"]) for item in items),
                         [("EndpointSlice", f"web{i}-0") for i in range(3)] + [("Service", f"web{i}") for i in range(3)])
        self.assertEqual(listed.wait(PATIENCE), 0)

    def test_watches_services_and_slices(self):
        server = self.serve()
        server.put("services", service("web", 1))
        for plural, make in (("services", lambda n: service("web", n)), ("endpointslices", lambda n: slice_of("web", [n]))):
            process = self.kubectl(server, "get", plural, "--all-namespaces", "-w", "-o", "json", "--output-watch-events")
            until = time.monotonic() + PATIENCE
            while server.count("watch", plural) == 0:
                self.assertLess(time.monotonic(), until)
                self.assertIsNone(process.poll(), "kubectl ended")
                time.sleep(0.01)
            number = 40
            server.put(plural, make(number))
            text = ""
            while f"10.96.0.{number + 1}" not in text and f"10.1.0.{number + 1}" not in text:
                line = process.stdout.readline()
                self.assertNotEqual(line, "", text)
                text += line
            self.assertRegex(text, '"type": *"(ADDED|MODIFIED)"')


if __name__ == "__main__":
    unittest.main()
