# SPDX-License-Identifier: BSD-2-Clause
"""A year of a cluster in some seconds: rolling updates day by day, services that come, go and change, an API server that does
all that real ones do on bad days, and a daemon that is killed. Clients of services that do not change notice nothing, and what
is left in the maps is what a daemon has there that was given one list. ctest sets CLUSTERIP_SOURCE and CLUSTERIP_BUILD."""

import collections
import json
import os
import random
import signal
import struct
import subprocess
import time
import unittest

import daemon_test
from daemon_test import CLUSTERIP, ONE, THREE, TWO, stage, wait_for

PATIENCE = 90  # s: after many cuts the client waits for up to 30 s
SEED = int(os.environ.get("CLUSTERIP_SEED", "365"))
SERVICES = 60
PODS = 6  # of a service, at most; one more while it is rolled
STABLE = {"10.96.0.1": {ONE, TWO}, "10.96.0.2": {ONE, TWO, THREE}}
STICKY = "10.96.0.2"  # has affinity


class Changing:
    """A service whose pods are replaced one by one, as a Deployment does it."""

    def __init__(self, api, chance, number):
        self.api, self.chance, self.number = api, chance, number
        self.name = f"s{number}"
        self.port_name, self.vip, self.born = "http", 100 + number, 0
        self.is_there, self.is_foreign = False, False
        self.pods = []  # [address, conditions]
        self.steps = iter(())
        for _ in range(PODS + 1):
            self.pods.append([self.address(), {"ready": True}])
        self.come()

    def address(self):
        self.born += 1
        number = self.number * 1000 + self.born
        return f"10.{128 + number // 62500}.{number // 250 % 250}.{1 + number % 250}"

    def come(self):
        spec = {"ports": [{"name": self.port_name, "port": 80, "protocol": "TCP"}]}
        what = self.number % 6
        if what == 1:
            spec["ports"].append({"name": "dns", "port": 53, "protocol": "UDP"})
        if what == 2:
            spec["clusterIPs"] = [f"10.96.0.{100 + self.number}", f"fd00::{self.vip:x}"]
        if what == 3:
            spec["sessionAffinity"] = "ClientIP"
        if what == 4:
            spec["internalTrafficPolicy"] = "Local"
        value = daemon_test.service(self.name, self.vip, **spec)
        if "clusterIPs" in spec:
            value["spec"]["clusterIPs"][0] = value["spec"]["clusterIP"]
        if self.is_foreign:
            value["metadata"]["labels"] = {"service.kubernetes.io/service-proxy-name": "other"}
        self.is_there = True
        self.api.put("services", value)
        self.tell()

    def tell(self):
        """Its slices, of four endpoints each; those of the second family have one."""
        for number in range(2):
            pods = self.pods[4 * number:4 * number + 4]
            value = daemon_test.slice_of(self.name, [], number, 8080)
            value["ports"] = [{"name": self.port_name, "port": 8080, "protocol": "TCP"},
                              {"name": "dns", "port": 5353, "protocol": "UDP"}]
            value["endpoints"] = [{"addresses": [address], "conditions": conditions, "nodeName": "here" if index % 2 else "there"}
                                  for index, (address, conditions) in enumerate(pods)]
            self.change(value)
        if self.number % 6 == 2:
            value = daemon_test.slice_of(self.name, [], 6, 8080)
            value.update(addressType="IPv6", endpoints=[{"addresses": [f"fd01::{self.number:x}:{self.born:x}"]}])
            value["ports"][0]["name"] = self.port_name
            self.change(value)

    def change(self, value):
        stored = self.api.objects["endpointslices"].get(("default", value["metadata"]["name"]))
        if stored is None or stored.value["endpoints"] != value["endpoints"] or stored.value["ports"] != value["ports"]:
            self.api.put("endpointslices", value)

    def go(self):
        self.is_there = False
        self.api.delete("services", "default", self.name)
        for key in [key for key in self.api.objects["endpointslices"] if key[1].startswith(f"{self.name}-")]:
            self.api.delete("endpointslices", *key)

    def rollout(self):
        """Each pod: a new one comes, is ready, the old one terminates, and is gone."""
        for old in list(self.pods):
            new = [self.address(), {"ready": False, "serving": False, "terminating": False}]
            self.pods.append(new)
            yield self.tell()
            new[1] = {"ready": True, "serving": True, "terminating": False}
            yield self.tell()
            old[1] = {"ready": False, "serving": True, "terminating": True}
            yield self.tell()
            self.pods.remove(old)
            yield self.tell()

    def advance(self):
        if self.is_there and next(self.steps, self) is self:
            self.steps = self.rollout()

    def happen(self):
        """What is not of every day."""
        if not self.is_there:
            self.vip += SERVICES  # another address than it had before
            return self.come()
        self.steps = iter(())
        what = self.chance.randrange(5)
        if what == 0:
            return self.go()
        if what == 1:
            self.port_name = "web" if self.port_name == "http" else "http"  # the slices hear of it later
            self.api.put("services", self.renamed())
        elif what == 2:
            self.is_foreign = not self.is_foreign
            return self.come()
        elif what == 3:
            for pod in self.pods:
                pod[1] = {"ready": False, "serving": True, "terminating": True}  # the node is drained
        else:
            self.pods = [[self.address(), {"ready": True}] for _ in range(self.chance.randrange(PODS + 1))]
        return self.tell()

    def renamed(self):
        value = json.loads(json.dumps(self.api.objects["services"][("default", self.name)].value))
        value["spec"]["ports"][0]["name"] = self.port_name
        return value


def dump(pin, name):
    """(key, value) of each element, as bytes."""
    shown = json.loads(stage.run("bpftool", "-j", "map", "dump", "pinned", f"{pin}/{name}").stdout)
    return [tuple(bytes(int(byte, 16) for byte in element[part]) for part in ("key", "value")) for element in shown]


def vip_hash(address):
    """As map_layout.h has it."""
    first, second, third, fourth = struct.unpack("<4I", address)
    high, low = first << 32 | second, third << 32 | fourth
    return (high * 0x9e3779b97f4a7c15 + low * 0xbf58476d1ce4e5b9 & (1 << 64) - 1) >> 32


def used(pin):
    """What the maps at `pin` are used for, in a form that does not depend on which index something has."""
    records = {struct.unpack("<I", index)[0]: (value[32:].split(b"\0")[0].decode(), struct.unpack("<Q", value[24:32])[0] >> 32)
               for index, value in dump(pin, "Record_Map") if value[24:32] != bytes(8)}
    keys = dump(pin, "Service_Map")
    backends = collections.Counter()
    live = []  # connections that still count: at which backend of which service, and how many
    for _, value in dump(pin, "Backend_Map"):
        state, record, count = value[18], *struct.unpack("<2I", value[24:32])
        owner = records.get(record, ("of no service",))[0]
        if count:
            live.append((owner, state, value[:18].hex(), count))
        if state:
            backends[(owner, state, value[:18])] += 1
    words = [struct.unpack("<Q", value)[0] for _, value in dump(pin, "Filter_Map")]
    bits = {64 * place + bit for place, word in enumerate(words) for bit in range(64) if word >> bit & 1}
    stale = bits - {vip_hash(key[:16]) % (64 * len(words)) for key, _ in keys}
    return {"slots of each record": sorted(records.values()), "keys": sorted(key for key, _ in keys),
            "backends": backends, "live": live, "stale bits of the filter": stale}


def maps(pin):
    """By name, (id, size)."""
    shown = {path.name: json.loads(stage.run("bpftool", "-j", "map", "show", "pinned", path).stdout) for path in pin.glob("*_Map")}
    return {name: (one["id"], one["max_entries"]) for name, one in shown.items()}


def served(status):
    """The services as `status` shows them, without what was counted."""
    counted = {"connects", "refused", "live", "reversed", "failures", "connects_per_second", "backends"}
    return {one["name"]: [{key: value for key, value in one.items() if key not in counted},
                          sorted((backend["address"], backend["port"], backend["weight"], backend["state"])
                                 for backend in one["backends"])] for one in status["services"]}


class Year(daemon_test.Stage):
    engine = "bpf"

    def fresh(self):
        """What a daemon has that begins now, in the maps and to tell."""
        cgroup = self.cgroup.path / "fresh"
        cgroup.mkdir()
        pin, control = self.pin.with_name("fresh"), self.directory.path / "fresh.sock"
        file = self.directory.write("fresh.toml", self.file.read_text().replace(str(self.cgroup.path), str(cgroup))
                                    .replace("control.sock", "fresh.sock").replace("[engine]", f'[engine]\npin = "{pin}"'))
        log = self.directory.path / "fresh.log"
        with log.open("w") as out:
            daemon = subprocess.Popen([CLUSTERIP, "run", "--config", file, "--engine", "bpf", "--plugin", stage.PLUGIN],
                                      stderr=out, stdout=out)
        try:
            wait_for("the fresh daemon serves", lambda: "serving" in log.read_text() or daemon.poll() is not None)

            def status():
                shown = stage.run(CLUSTERIP, "status", "--json", "--control", control, "--plugin", stage.PLUGIN, check=False)
                return json.loads(shown.stdout)  # also of one that has not listed yet
            wait_for("all is listed and merged", lambda: status()["kubernetes"]["complete"] and
                     len(status()["services"]) > 1)
            return served(status()), used(pin)
        finally:
            daemon.terminate()
            daemon.wait()
            stage.run(CLUSTERIP, "unload", "--pin", pin, "--plugin", stage.PLUGIN)
            cgroup.rmdir()

    def expect_what_a_fresh_daemon_has(self):
        expected, expected_use = self.fresh()
        wait_for("the state of a fresh daemon", lambda: served(self.status()) == expected, PATIENCE)
        return expected_use

    def replace_everything(self, generation):
        """As many services and backends as the maps are made for, in one list, and none that was there."""
        sizes = maps(self.pin)
        services, backends = sizes["Record_Map"][1] // 2 - 8, sizes["Backend_Map"][1] // 2 - 16
        with self.api.lock:
            for plural in ("services", "endpointslices"):
                for _, name in list(self.api.objects[plural]):
                    if not name.startswith("stable"):
                        self.api.delete(plural, "default", name)
            for number in range(services):
                first, last = (one * backends // services for one in (number, number + 1))
                name = f"g{generation}-{number}"
                self.api.put("services", daemon_test.service(name, 10000 * generation + number))
                self.api.put("endpointslices", daemon_test.slice_of(name, [
                    f"10.{200 + generation}.{pod // 250}.{1 + pod % 250}" for pod in range(first, last)]))
            self.api.compact()
            self.api.cut()
        wait_for("all is replaced", lambda: sum(one["name"].startswith(f"default/g{generation}-") and len(one["backends"]) > 0
                                                for one in self.status()["services"]) == services, PATIENCE)

    def test_a_year_of_rolling_updates_leaves_nothing_behind(self):
        print(f"seed {SEED}", flush=True)
        chance = random.Random(SEED)
        faults = self.api.faults
        faults.chance = random.Random(SEED + 1)
        self.pin = stage.pathlib.Path("/sys/fs/bpf/clusterip")
        for number, (vip, addresses) in enumerate(STABLE.items()):
            more = {"sessionAffinity": "ClientIP"} if vip == STICKY else {}
            self.api.put("services", daemon_test.service(f"stable{number}", number, **more))
            self.api.put("endpointslices", daemon_test.slice_of(f"stable{number}", sorted(addresses)))
        cluster = [Changing(self.api, chance, number) for number in range(SERVICES)]
        self.start()
        for vip, addresses in STABLE.items():
            wait_for("answers", lambda: stage.ask(f"http://{vip}/"))
        wait_for("all services", lambda: len(self.status()["services"]) == 1 + len(STABLE) + SERVICES + 2 * (SERVICES // 6))
        maps_before = maps(self.pin)
        loads = {vip: stage.Load(f"http://{vip}/", "-H", "Connection: close") for vip in STABLE}
        begun, version, events = time.monotonic(), self.api.version, 0

        def cut():
            return chance.choice((chance.randrange(1, 1000), chance.randrange(1, 400000), chance.randrange(1, 400000)))
        for quarter in range(4):
            # Events that overtake each other are lost with the connection: only a server that is beside itself does both.
            faults.cut_after = None if quarter == 1 else cut
            faults.shuffle = quarter == 1
            faults.again = 0 if quarter == 1 else 0.5
            faults.expire = (lambda: chance.random() < 0.01) if quarter in (1, 3) else lambda: False
            for day in range(91):
                for _ in range(14):
                    one = chance.choice(cluster)
                    one.happen() if chance.random() < 0.05 else one.advance()
                if day % 30 == 17 and quarter >= 2:
                    self.api.compact()
                if day == 45 and quarter == 2:
                    events = self.status()["kubernetes"]["events"]
                    self.end(signal.SIGKILL)
                    self.start()
                time.sleep(0.02)  # no more than a pace: nothing depends on it
            faults.cut_after, faults.shuffle, faults.again, faults.expire = None, False, 0, lambda: False
            use = self.expect_what_a_fresh_daemon_has()
        took = time.monotonic() - begun
        answered = {vip: load.stop() for vip, load in loads.items()}
        counts = self.status()["kubernetes"]
        print(f"{self.api.version - version} changes in {took:.1f} s, {events} events and {counts}; answers: {answered}", flush=True)
        self.assertGreater(self.api.version - version, 3000)
        for vip, addresses in STABLE.items():
            self.assertGreater(sum(answered[vip].values()), 300)
            names = {name for name, address in stage.PODS.items() if address.split(":")[0] in addresses}
            self.assertLessEqual(set(answered[vip]), names)
        self.assertEqual(len(answered[STICKY]), 1)
        try:
            wait_for("no connection counts", lambda: not used(self.pin)["live"])
        except AssertionError as failure:
            raise AssertionError(f"{failure}: {used(self.pin)['live']}") from None
        self.assertEqual(used(self.pin), {**use, "live": []})
        # What the maps still have room for shows what was lost of it.
        for generation in range(1, 3):
            self.replace_everything(generation)
        self.assertEqual(maps(self.pin), maps_before)


if __name__ == "__main__":
    unittest.main()
