#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-2-Clause
"""How soon services of a large cluster are in the data path, how soon a change is, and what that costs.

    sudo CLUSTERIP_SOURCE=. CLUSTERIP_BUILD=build/release tests/bench/kubernetes.py [SERVICES ENDPOINTS SECONDS]

An API server of the tests, in a process of its own, has 10,000 services with 100,000 endpoints; `clusterip run` is started beside it,
in a network namespace and a cgroup of their own. Then one endpoint of other services changes 500 times a second, and the only endpoint
of one service now and then: until a connect() to its VIP reaches the new one is what is measured, from the moment before the API server
is told. The API server is Python's and its time is a part of that."""

import json
import multiprocessing
import os
import pathlib
import random
import signal
import socket
import struct
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "hosts"), str(ROOT / "kubernetes")]
import stage  # noqa: E402
from api_server import ApiServer  # noqa: E402

RATE = 500  # changes a second
PROBES = ("10.89.1.1", "10.89.1.2")  # of stage.PODS
PORT = 9000


def service(name, number):
    return {"metadata": {"name": name, "namespace": "default", "labels": {"app": name}, "creationTimestamp": "2026-01-01T00:00:00Z",
                         "annotations": {"meta.helm.sh/release-name": name, "meta.helm.sh/release-namespace": "default"},
                         "managedFields": [{"manager": "helm", "operation": "Update", "apiVersion": "v1", "fieldsType": "FieldsV1",
                                            "fieldsV1": {"f:spec": {"f:ports": {".": {}}, "f:selector": {}, "f:type": {}}}}]},
            "spec": {"type": "ClusterIP", "clusterIP": f"10.{96 + number // 62500}.{number // 250 % 250}.{1 + number % 250}",
                     "selector": {"app": name}, "sessionAffinity": "None", "ipFamilies": ["IPv4"],
                     "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": "http"}]}}


def slice_of(name, addresses, port=8080):
    return {"metadata": {"name": f"{name}-x7k2p", "generateName": f"{name}-", "namespace": "default", "generation": 7,
                         "labels": {"kubernetes.io/service-name": name, "app": name,
                                    "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io"},
                         "ownerReferences": [{"apiVersion": "v1", "kind": "Service", "name": name, "controller": True}]},
            "addressType": "IPv4", "ports": [{"name": "http", "port": port, "protocol": "TCP"}],
            "endpoints": [{"addresses": [address], "conditions": {"ready": True, "serving": True, "terminating": False},
                           "nodeName": f"node-{index}", "zone": "east",
                           "targetRef": {"kind": "Pod", "namespace": "default", "name": f"{name}-{index}", "uid": f"{index:036}"}}
                          for index, address in enumerate(addresses)]}


def pod(number):
    return f"10.{128 + number // 62500 % 64}.{number // 250 % 250}.{1 + number % 250}"


def serve(services, endpoints, pipe):
    """The cluster's process."""
    api = ApiServer(bookmark_every=1)
    each = endpoints // services
    pods = {}
    for number in range(services):
        pods[number] = [pod(number * each + index) for index in range(each)]
        api.put("services", service(f"s{number}", number))
        api.put("endpointslices", slice_of(f"s{number}", pods[number]))
    api.put("services", service("probe", services))
    api.put("endpointslices", slice_of("probe", PROBES[:1], PORT))
    api.compact()
    pipe.send(api.url)
    chance = random.Random(1)
    fresh = endpoints
    while (order := pipe.recv()) != "end":
        if order == "state":
            pipe.send({stored.value["metadata"]["labels"]["kubernetes.io/service-name"]:
                       sorted(one["addresses"][0] for one in stored.value["endpoints"])
                       for stored in api.objects["endpointslices"].values()})
            continue
        begun, changes, probes, target, is_awaited = time.monotonic(), 0, 0, 0, False
        while (now := time.monotonic() - begun) < order or is_awaited:
            if is_awaited and pipe.poll():
                is_awaited = pipe.recv() != "seen"
            if not is_awaited and probes < now * 10 and now < order:
                probes, target, is_awaited = probes + 1, 1 - target, True
                pipe.send((time.monotonic(), PROBES[target]))
                api.put("endpointslices", slice_of("probe", [PROBES[target]], PORT))
            while changes < now * RATE:
                changes, fresh = changes + 1, fresh + 1
                number = chance.randrange(services)
                pods[number][chance.randrange(each)] = pod(fresh)
                api.put("endpointslices", slice_of(f"s{number}", pods[number]))
            time.sleep(0.0005)
        pipe.send(("done", changes))
    api.end()


def vip(number):
    return service("x", number)["spec"]["clusterIP"]


def reached(address):
    """The backend that a connect() to this VIP reaches; peer_names are off."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.settimeout(2)
        try:
            client.connect((address, 80))
            return client.getpeername()[0]
        except OSError as error:
            return error.strerror


def cpu(pid):
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(pid):
    text = pathlib.Path(f"/proc/{pid}/status").read_text()
    values = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith(("VmHWM", "VmRSS"))}
    return f"{values['VmRSS']:.0f} MiB, at most {values['VmHWM']:.0f} MiB"


def main():
    services, endpoints, seconds = (int(word) for word in (sys.argv[1:] + ["10000", "100000", "20"][len(sys.argv) - 1:]))
    cgroup = stage.Cgroup()
    stage.enter_private_environment()
    directory = stage.Directory()
    listeners = []
    for address in PROBES:
        listener = socket.socket()
        listener.bind((address, PORT))
        listener.listen(4096)
        listener.setblocking(False)
        listeners.append(listener)
    ours, theirs = multiprocessing.Pipe()
    cluster = multiprocessing.Process(target=serve, args=(services, endpoints, theirs))
    cluster.start()
    url = ours.recv()
    file = directory.write("clusterip.toml", f"""[engine]
cgroup = "{cgroup.path}"
control = "{directory.path}/control.sock"
on_exit = "detach"
peer_names = false
[kubernetes]
server = "{url}"
""")
    log = (directory.path / "log").open("w")
    begun = time.monotonic()
    daemon = subprocess.Popen([stage.BUILD / "cli/clusterip", "run", "--config", file, "--engine", "bpf", "--plugin", stage.PLUGIN],
                              stdout=log, stderr=log)
    try:
        while reached(vip(services)) != PROBES[0]:
            if daemon.poll() is not None or time.monotonic() - begun > 120:
                raise SystemExit((directory.path / "log").read_text())
            time.sleep(0.005)
        print(f"{services} services, {endpoints} endpoints: in the data path {time.monotonic() - begun:.2f} s after the start; "
              f"{cpu(daemon.pid):.2f} s of CPU, {memory(daemon.pid)}")
        before, started = cpu(daemon.pid), time.monotonic()
        ours.send(seconds)
        times = []
        while (told := ours.recv())[0] != "done":
            told_at, expected = told
            while reached(vip(services)) != expected:
                for listener in listeners:
                    try:
                        while True:
                            listener.accept()[0].close()
                    except BlockingIOError:
                        pass
            times.append((time.monotonic() - told_at) * 1000)
            ours.send("seen")
        used = cpu(daemon.pid) - before
        took = time.monotonic() - started
        times.sort()
        print(f"{told[1] / took:.0f} changes a second for {took:.0f} s: a change is in the data path after {times[len(times) // 2]:.1f} ms "
              f"(median), {times[(len(times) * 99 + 99) // 100 - 1]:.1f} ms (p99), {times[-1]:.1f} ms (at most), of {len(times)}; "
              f"{100 * used / took:.0f} % of a CPU, {memory(daemon.pid)}")
        ours.send("state")
        expected = ours.recv()
        stage.wait_for("the state of the API server", lambda: seen(directory) == expected)
        print("the final state is the API server's")
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait()
        ours.send("end")
        cluster.join(10)
        cluster.kill()
        for listener in listeners:
            listener.close()
        directory.remove()
        cgroup.remove()




def seen(directory):
    shown = stage.run(stage.BUILD / "cli/clusterip", "status", "--json", "--control", directory.path / "control.sock", "--plugin",
                      stage.PLUGIN)
    return {one["name"].split("/")[1].split(":")[0]: sorted(backend["address"] for backend in one["backends"])
            for one in json.loads(shown.stdout)["services"]}


if __name__ == "__main__":
    main()
