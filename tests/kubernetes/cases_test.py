# SPDX-License-Identifier: BSD-2-Clause
"""kube-proxy's documented behaviour as a table of cases, on both engines: objects of the cluster, and whom connections reach.
tests/unit/kubernetes_translate_test.cpp has what becomes of each object; here is what comes of that. ctest sets
CLUSTERIP_SOURCE and CLUSTERIP_BUILD."""

import dataclasses
import errno
import selectors
import socket
import threading
import unittest

import daemon_test
from daemon_test import stage, wait_for

# Backends by name: each listens at both addresses, for TCP and UDP, and answers with its name and the port.
NAMES = "ABCD"
PORTS = (8080, 9090)
V4 = {name: f"10.89.2.{index}" for index, name in enumerate(NAMES, 1)}
V6 = {name: f"fd01::{index}" for index, name in enumerate(NAMES, 1)}
HTTP = {"name": "http", "port": 8080}
REFUSED, UNSERVED = "refused", "not served"  # the latter is sent on into a network that leads nowhere
DRAWS = 25  # at least; one of four backends that is not wanted is missed once in a thousand times


def pod(name, conditions="R", node="there", zones=(), nodes=(), addresses=V4):
    """An endpoint; its conditions as letters: R ready, r not ready, S serving, s not serving, T terminating."""
    words = {"R": ("ready", True), "r": ("ready", False), "S": ("serving", True), "s": ("serving", False), "T": ("terminating", True)}
    hints = {key: [{"name": one} for one in names] for key, names in (("forZones", zones), ("forNodes", nodes)) if names}
    return {"addresses": [addresses[name]], "conditions": dict(words[letter] for letter in conditions), "nodeName": node,
            **({"hints": hints} if hints else {})}


def pod6(name, *more):
    return pod(name, *more, addresses=V6)


def pods(*endpoints, ports=(HTTP,)):
    """A slice."""
    return {"addressType": "IPv6" if any(":" in one["addresses"][0] for one in endpoints) else "IPv4", "ports": list(ports),
            "endpoints": list(endpoints)}


@dataclasses.dataclass
class Case:
    """`expected`: by "tcp 80", or "tcp 80 ADDRESS" for another address than the first, who answers."""
    fact: str
    spec: dict
    slices: list
    expected: dict
    labels: dict = dataclasses.field(default_factory=dict)
    status: dict = dataclasses.field(default_factory=dict)
    choices: str = ""
    is_one_client: bool = False  # of those expected, one answers all


DNS = {"ports": [{"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns-tcp", "port": 53, "protocol": "TCP"},
                 {"name": "metrics", "port": 9153}]}
DUAL = {"clusterIPs": ["fd00::VIP"], "ports": [{"name": "http", "port": 80}, {"name": "dns", "port": 53, "protocol": "UDP"}]}
DUAL_PORTS = (HTTP, {"name": "dns", "port": 9090, "protocol": "UDP"})
LOCAL = {"internalTrafficPolicy": "Local"}
EXTERNAL = 'external_ips = true\nload_balancer_ips = true'
OURS = {"service.kubernetes.io/service-proxy-name": "clusterip"}

CASES = [
    Case("without endpoints it is refused", {}, [], {"tcp 80": REFUSED}),
    Case("ready endpoints answer, unknown is ready", {}, [pods(pod("A"), pod("B", ""))], {"tcp 80": {"A8080", "B8080"}}),
    Case("the slice has the port of a name", {"ports": [{"name": "http", "port": 80, "targetPort": "web"}]},
         [pods(pod("A"), ports=[{"name": "http", "port": 9090}])], {"tcp 80": {"A9090"}}),
    Case("one name, two ports", {}, [pods(pod("A")), pods(pod("B"), ports=[{"name": "http", "port": 9090}])],
         {"tcp 80": {"A8080", "B9090"}}),
    Case("name and protocol of ports have to agree", DNS,
         [pods(pod("A"), ports=[{"name": "dns", "port": 8080, "protocol": "UDP"}, {"name": "dns-tcp", "port": 9090}])],
         {"udp 53": {"A8080"}, "tcp 53": {"A9090"}, "tcp 9153": REFUSED}),
    Case("the slice's port is of another protocol", {}, [pods(pod("A"), ports=[{**HTTP, "protocol": "UDP"}])], {"tcp 80": REFUSED}),
    Case("a port of the address that no service has is refused", {}, [pods(pod("A"))], {"tcp 80": {"A8080"}, "tcp 81": REFUSED}),
    Case("both families, TCP and UDP, each by slices of its own", DUAL,
         [pods(pod("A"), ports=DUAL_PORTS), pods(pod6("B"), pod6("C"), ports=DUAL_PORTS)],
         {"tcp 80": {"A8080"}, "udp 53": {"A9090"}, "tcp 80 fd00::VIP": {"B8080", "C8080"}, "udp 53 fd00::VIP": {"B9090", "C9090"}}),
    Case("the other family has no endpoint", DUAL, [pods(pod("A"), ports=DUAL_PORTS)],
         {"tcp 80": {"A8080"}, "tcp 80 fd00::VIP": REFUSED}),
    Case("SCTP is left out, TCP beside it is not",
         {"ports": [{"name": "http", "port": 80}, {"name": "s", "port": 81, "protocol": "SCTP"}]}, [pods(pod("A"))],
         {"tcp 80": {"A8080"}}),
    Case("headless", {"clusterIP": "None"}, [pods(pod("A"))], {"tcp 80": UNSERVED}),
    Case("ExternalName", {"type": "ExternalName", "externalName": "example.org", "clusterIP": ""}, [], {"tcp 80": UNSERVED}),
    Case("NodePort has its cluster address", {"type": "NodePort", "ports": [{"name": "http", "port": 80, "nodePort": 30080}]},
         [pods(pod("A"))], {"tcp 80": {"A8080"}}),
    Case("another proxy's", {}, [pods(pod("A"))], {"tcp 80": UNSERVED}, labels=OURS),
    Case("proxy_name serves those of the name", {}, [pods(pod("A"))], {"tcp 80": {"A8080"}}, labels=OURS,
         choices='proxy_name = "clusterip"'),
    Case("proxy_name leaves those without a name", {}, [pods(pod("A"))], {"tcp 80": UNSERVED}, choices='proxy_name = "clusterip"'),

    Case("not ready", {}, [pods(pod("A"), pod("B", "rS"))], {"tcp 80": {"A8080"}}),
    Case("none is ready, none terminates", {}, [pods(pod("B", "rS"))], {"tcp 80": REFUSED}),
    Case("what terminates gets nothing new", {}, [pods(pod("A"), pod("B", "rST"))], {"tcp 80": {"A8080"}}),
    Case("all terminate: those that serve", {}, [pods(pod("A", "rST"), pod("B", "rsT"), pod("C", "rS"))], {"tcp 80": {"A8080"}}),
    Case("all terminate and none serves", {}, [pods(pod("A", "rsT"))], {"tcp 80": REFUSED}),
    Case("publishNotReadyAddresses: ready, says the controller", {"publishNotReadyAddresses": True},
         [pods(pod("A", "RsT"), pod("B"))], {"tcp 80": {"A8080", "B8080"}}),
    Case("in two slices, ready in one", {}, [pods(pod("A", "rsT")), pods(pod("A"))], {"tcp 80": {"A8080"}}),

    Case("Local", LOCAL, [pods(pod("A", node="here"), pod("B"))], {"tcp 80": {"A8080"}}),
    Case("Local without one here", LOCAL, [pods(pod("B"))], {"tcp 80": REFUSED}),
    Case("Local: what terminates here goes before another node", LOCAL, [pods(pod("A", "rST", node="here"), pod("B"))],
         {"tcp 80": {"A8080"}}),
    Case("hints for this zone", {}, [pods(pod("A", zones=["east"]), pod("B", zones=["west"]))], {"tcp 80": {"A8080"}}),
    Case("hints count when all have them", {}, [pods(pod("A", zones=["east"]), pod("B"))], {"tcp 80": {"A8080", "B8080"}}),
    Case("hints for other zones alone", {}, [pods(pod("A", zones=["west"]), pod("B", zones=["west"]))],
         {"tcp 80": {"A8080", "B8080"}}),
    Case("hints for this node go before the zone's", {},
         [pods(pod("A", zones=["east"], nodes=["here"]), pod("B", zones=["east"], nodes=["there"]))], {"tcp 80": {"A8080"}}),
    Case("all terminate: hints do not matter", {}, [pods(pod("A", "rST", zones=["west"]), pod("B", "rST", zones=["east"]))],
         {"tcp 80": {"A8080", "B8080"}}),

    Case("affinity", {"sessionAffinity": "ClientIP"}, [pods(pod("A"), pod("B"), pod("C"))], {"tcp 80": {"A8080", "B8080", "C8080"}},
         is_one_client=True),
    Case("affinity of UDP", {**DNS, "sessionAffinity": "ClientIP"},
         [pods(pod("A"), pod("B"), pod("C"), ports=[{"name": "dns", "port": 8080, "protocol": "UDP"}])],
         {"udp 53": {"A8080", "B8080", "C8080"}}, is_one_client=True),

    Case("external addresses are a choice", {"externalIPs": ["192.0.2.VIP"]}, [pods(pod("A"))],
         {"tcp 80": {"A8080"}, "tcp 80 192.0.2.VIP": UNSERVED}),
    Case("externalIPs, whatever the policy", {**LOCAL, "externalIPs": ["192.0.2.VIP"]}, [pods(pod("B"))],
         {"tcp 80": REFUSED, "tcp 80 192.0.2.VIP": {"B8080"}}, choices=EXTERNAL),
    Case("a load balancer's", {"type": "LoadBalancer"}, [pods(pod("A"))], {"tcp 80 198.51.100.VIP": {"A8080"}}, choices=EXTERNAL,
         status={"loadBalancer": {"ingress": [{"ip": "198.51.100.VIP"}]}}),
    Case("a load balancer that proxies", {"type": "LoadBalancer"}, [pods(pod("A"))],
         {"tcp 80": {"A8080"}, "tcp 80 198.51.100.VIP": UNSERVED}, choices=EXTERNAL,
         status={"loadBalancer": {"ingress": [{"ip": "198.51.100.VIP", "ipMode": "Proxy"}]}}),
]


class Answering(threading.Thread):
    """The backends. Each answers a connection, what comes on it, and a datagram with its name and port."""

    def __init__(self):
        super().__init__(daemon=True)
        self.selector = selectors.DefaultSelector()
        self.is_ending = False
        for addresses in (V4, V6):
            for name, address in addresses.items():
                for port in PORTS:
                    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                        one = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
                        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                        one.bind((address, port))
                        if kind == socket.SOCK_STREAM:
                            one.listen(128)
                        self.selector.register(one, selectors.EVENT_READ, (kind, f"{name}{port}".encode()))
        self.start()

    def run(self):
        while not self.is_ending:
            for key, _ in self.selector.select(0.1):
                kind, name = key.data
                if kind == socket.SOCK_STREAM:
                    connection = key.fileobj.accept()[0]
                    connection.sendall(name)
                    self.selector.register(connection, selectors.EVENT_READ, (None, name))
                elif kind == socket.SOCK_DGRAM:
                    key.fileobj.sendto(name, key.fileobj.recvfrom(100)[1])
                else:
                    self.answer(key.fileobj, name)

    def answer(self, connection, name):
        try:
            if connection.recv(100):
                return connection.sendall(name)
        except OSError:
            pass
        self.selector.unregister(connection)
        connection.close()

    def end(self):
        self.is_ending = True
        self.join()
        for key in list(self.selector.get_map().values()):
            key.fileobj.close()
        self.selector.close()


def reach(protocol, address, port):
    """Who answers, or what becomes of it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM) as client:
        client.settimeout(10)
        try:
            client.connect((address, port))
            if protocol == "udp":
                client.send(b"who")
            return client.recv(100).decode()
        except OSError as failure:
            return {errno.ECONNREFUSED: REFUSED, errno.ENETUNREACH: UNSERVED}.get(failure.errno, str(failure))


class Scenario(daemon_test.Stage):
    @classmethod
    def setUpClass(cls):
        stage.set_up(cls)
        for address in V4.values():
            stage.run("ip", "addr", "add", f"{address}/32", "dev", "lo")
        for address in V6.values():
            stage.run("ip", "addr", "add", f"{address}/128", "dev", "lo", "nodad")
        cls.answering = Answering()
        cls.addClassCleanup(cls.answering.end)

    def put(self, name, case, number):
        vip = f"10.96.0.{number}"
        spec = daemon_test.service(name, 0, **case.spec)["spec"]
        if "clusterIP" not in case.spec:
            spec["clusterIP"] = vip
            spec["clusterIPs"] = [vip] + [one.replace("VIP", str(number)) for one in case.spec.get("clusterIPs", [])]
        spec["externalIPs"] = [one.replace("VIP", str(number)) for one in spec.get("externalIPs", [])]
        ingress = [{**one, "ip": one["ip"].replace("VIP", str(number))}
                   for one in case.status.get("loadBalancer", {}).get("ingress", [])]
        self.api.put("services", {"metadata": {"name": name, "namespace": "default", "labels": case.labels}, "spec": spec,
                                  "status": {"loadBalancer": {"ingress": ingress}}})
        self.put_slices(name, case.slices)

    def put_slices(self, name, slices):
        for index, one in enumerate(slices):
            metadata = {"name": f"{name}-{index}", "namespace": "default", "labels": {"kubernetes.io/service-name": name}}
            self.api.put("endpointslices", {"metadata": metadata, **one})

    def begin(self, choices):
        self.file.write_text(self.file.read_text().replace('node = "here"', f'node = "here"\nzone = "east"\n{choices}'))
        self.api.put("services", daemon_test.service("last", 250, ports=[{"port": 80}]))
        if "proxy_name" in choices:
            self.api.put("services", {"metadata": {"name": "last", "namespace": "default", "labels": OURS},
                                      "spec": daemon_test.service("last", 250)["spec"]})
        self.start()
        wait_for("all is merged", lambda: "default/last:80/tcp" in {one["name"] for one in self.status()["services"]})

    def expect(self, fact, protocol, address, port, expected, is_one_client=False):
        with self.subTest(fact, at=f"{protocol} {address}:{port}"):
            if isinstance(expected, str):
                return self.assertEqual(reach(protocol, address, port), expected)
            seen, count = set(), 0
            while count < DRAWS or (not is_one_client and seen < expected and count < 20 * DRAWS):
                seen.add(reach(protocol, address, port))
                count += 1
            self.assertLessEqual(seen, expected)
            self.assertEqual(len(seen), 1 if is_one_client else len(expected), seen)

    def run_cases(self, choices):
        cases = [case for case in CASES if case.choices == choices]
        self.assertTrue(cases)
        for number, case in enumerate(cases, 1):
            self.put(f"case{number}", case, number)
        self.begin(choices)
        for number, case in enumerate(cases, 1):
            for where, expected in case.expected.items():
                protocol, port, *other = where.split()
                address = other[0].replace("VIP", str(number)) if other else f"10.96.0.{number}"
                self.expect(case.fact, protocol, address, int(port), expected, case.is_one_client)

    def test_who_answers(self):
        self.run_cases("")

    def test_who_answers_with_external_addresses(self):
        self.run_cases(EXTERNAL)

    def test_who_answers_with_a_proxy_name(self):
        self.run_cases('proxy_name = "clusterip"')

    def test_what_lives_goes_on_while_its_backend_terminates_and_is_gone(self):
        self.put("web", Case("", {}, [pods(pod("A"))], {}), 1)
        self.begin("")
        with socket.create_connection(("10.96.0.1", 80), 10) as old:
            def lives():
                old.sendall(b"who")
                return old.recv(100)
            self.assertEqual(old.recv(100), b"A8080")
            for slices, expected in (([pods(pod("A", "rST"), pod("B"))], "B8080"), ([pods(pod("A", "rST"))], "A8080"),
                                     ([pods(pod("A", "rsT"), pod("C"))], "C8080"), ([pods()], REFUSED)):
                self.put_slices("web", slices)
                wait_for(expected, lambda: reach("tcp", "10.96.0.1", 80) == expected)
                self.expect("new connections", "tcp", "10.96.0.1", 80, expected if expected == REFUSED else {expected})
                self.assertEqual(lives(), b"A8080")


class Bpf(Scenario):
    engine = "bpf"


class Userspace(Scenario):
    engine = "userspace"


def load_tests(loader, standard, pattern):
    return unittest.TestSuite(tests for tests in standard if not any(type(test) is Scenario for test in tests))


if __name__ == "__main__":
    unittest.main()
