# SPDX-License-Identifier: BSD-2-Clause
"""A Kubernetes API server for tests: what clusterip and kubectl ask of one, in the real wire form, and what goes wrong with
real ones. It runs in threads of the test. It knows Services and EndpointSlices, lists page by page, and watches with
bookmarks; nobody reconciles anything."""

import base64
import collections
import http.server
import json
import random
import socket
import socketserver
import ssl
import threading
import time
import urllib.parse

KINDS = {
    # plural: (group, kind)
    "services": ("", "Service"),
    "endpointslices": ("discovery.k8s.io", "EndpointSlice"),
}
# What can be made, and is only remembered: all that deploy/kubernetes has.
MADE = {
    # plural: (group and version, kind, whether it is in a namespace)
    "serviceaccounts": ("v1", "ServiceAccount", True),
    "configmaps": ("v1", "ConfigMap", True),
    "clusterroles": ("rbac.authorization.k8s.io/v1", "ClusterRole", False),
    "clusterrolebindings": ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding", False),
    "daemonsets": ("apps/v1", "DaemonSet", True),
}


def api_version(plural):
    return "v1" if plural == "services" else "discovery.k8s.io/v1"


def encode(value):
    return json.dumps(value, separators=(",", ":")).encode()


def status(code, reason, message):
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message,
            "reason": reason, "code": code}


class Stored:
    """A version of an object, and its text."""

    def __init__(self, value, raw=None):
        self.value = value
        self.raw = raw or encode(value)


class Event:
    def __init__(self, version, kind, stored, raw=None):
        self.version, self.kind, self.stored = version, kind, stored
        self.raw = raw

    def text(self, kind=None):
        return self.raw or b'{"type":"%s","object":%s}\n' % ((kind or self.kind).encode(), self.stored.raw)


class Faults:
    """What goes wrong. A test sets them."""

    def __init__(self):
        self.every_namespace = False  # whichever was asked for
        self.every_label = False
        self.bookmarks = True  # for who asks for them
        self.refuse = lambda version: None  # asked at the begin of a watch from a version: bytes of its answer instead
        self.hold = True  # what was answered so does not end by itself
        self.unlisted = None  # a function: metadata of a list, and its items, to what is sent instead
        self.cut_after = None  # a function: bytes until a connection is cut, or None
        self.expire = lambda: False  # asked before each batch of events: does the watch end with 410?
        self.shuffle = False  # events come twice, and in another order
        self.again = 0  # how likely an old event comes once more behind new ones
        self.muted = 0  # watches among the first so many requests say nothing more, and do not end
        self.silent = False  # connections are taken, and nothing is answered
        self.slow = 0  # seconds between bytes of events
        self.forbidden = set()  # (verb, plural), or (verb, plural, namespace)
        self.chance = random.Random(1)


class ApiServer:
    def __init__(self, tls=None, tokens=None, port=0, host="127.0.0.1", bookmark_every=0.2):
        self.lock = threading.Condition()
        self.version = 1000
        self.objects = {plural: {} for plural in KINDS}  # (namespace, name): Stored
        self.log = {plural: [] for plural in KINDS}
        self.log_floor = {plural: 1000 for plural in KINDS}  # versions up to this one are forgotten
        self.snapshots = collections.OrderedDict()
        self.tokens = tokens  # None: anybody may ask
        self.faults = Faults()
        self.bookmark_every = bookmark_every
        self.made = []  # objects of MADE
        self.requests = []  # (verb, plural, target); the verb "check" is a list of one
        self.begun = dict.fromkeys(KINDS, 0)  # watches to which all comes that is sent from now on
        self.times = []  # of them
        self.connections = set()
        self.accepted = 0
        self.is_ending = self.is_restored = False
        server = self

        class Handler(RequestHandler):
            api = server

        class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
            daemon_threads = True
            allow_reuse_address = True
            request_queue_size = 64

            def get_request(self):
                connection, peer = super().get_request()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with server.lock:
                    server.connections.add(connection)
                    server.accepted += 1
                return connection, peer

            def finish_request(self, request, client_address):
                if tls is not None:  # in the connection's thread: a handshake may hang
                    plain, request = request, tls.wrap_socket(request, server_side=True)
                    with server.lock:
                        server.connections.discard(plain)
                        server.connections.add(request)
                try:
                    super().finish_request(request, client_address)
                finally:
                    with server.lock:
                        server.connections.discard(request)
                    if tls is not None:
                        request.close()

            def handle_error(self, request, client_address):
                pass  # clients that end are a part of the tests

        self.server = Server((host, port), Handler)
        self.port = self.server.server_address[1]
        self.url = f"http{'s' if tls else ''}://{host}:{self.port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    def end(self):
        with self.lock:
            self.is_ending = True
            self.lock.notify_all()
        self.server.shutdown()
        self.server.server_close()
        self.cut()
        self.thread.join()

    # What a cluster does

    def put(self, plural, value, raw=None):
        """Adds an object or changes it. `raw` is sent in its place."""
        with self.lock:
            metadata = value["metadata"]
            key = (metadata["namespace"], metadata["name"])
            self.version += 1
            metadata = {**metadata, "resourceVersion": str(self.version), "uid": metadata.get("uid", f"uid-{key[0]}-{key[1]}")}
            value = {"kind": KINDS[plural][1], "apiVersion": api_version(plural), **value, "metadata": metadata}
            stored = Stored(value, raw.replace(b"RESOURCE_VERSION", str(self.version).encode()) if raw else None)
            kind = "MODIFIED" if key in self.objects[plural] else "ADDED"
            self.objects[plural][key] = stored
            self.log[plural].append(Event(self.version, kind, stored))
            self.lock.notify_all()
            return self.version

    def delete(self, plural, namespace, name):
        with self.lock:
            stored = self.objects[plural].pop((namespace, name))
            self.version += 1
            value = {**stored.value, "metadata": {**stored.value["metadata"], "resourceVersion": str(self.version)}}
            self.log[plural].append(Event(self.version, "DELETED", Stored(value)))
            self.lock.notify_all()

    def send(self, plural, raw):
        """Bytes that are no event of any object."""
        with self.lock:
            self.log[plural].append(Event(self.version, "RAW", None, raw))
            self.lock.notify_all()

    def compact(self):
        """Forgets the past, as etcd does: who watches from there gets 410."""
        with self.lock:
            for plural in KINDS:
                self.log_floor[plural] = self.version
                self.log[plural] = []
            self.snapshots.clear()
            self.lock.notify_all()

    def backup(self):
        with self.lock:
            return self.version, {plural: dict(objects) for plural, objects in self.objects.items()}

    def restore(self, taken, is_told=False):
        """What has happened since then has not, and its versions are given once more. A real one tells watches that stand
        nothing of it."""
        with self.lock:
            self.is_restored = is_told
            self.version, self.objects = taken[0], {plural: dict(objects) for plural, objects in taken[1].items()}
            self.compact()

    def cut(self):
        """Ends all connections."""
        with self.lock:
            for connection in list(self.connections):
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass

    def count(self, verb, plural):
        with self.lock:
            return sum(1 for request in self.requests if request[:2] == (verb, plural))

    def pauses(self, verb, plural):
        """Seconds from one to the next."""
        with self.lock:
            times = [time for request, time in zip(self.requests, self.times) if request[:2] == (verb, plural)]
        return [after - before for before, after in zip(times, times[1:])]


def matches(selector, value):
    """Equality-based selectors."""
    labels = value["metadata"].get("labels", {})
    for term in filter(None, selector.split(",")):
        if "!=" in term:
            key, expected = term.split("!=")
            if labels.get(key) == expected:
                return False
        elif "=" in term:
            key, expected = term.replace("==", "=").split("=")
            if labels.get(key) != expected:
                return False
        elif term.startswith("!"):
            if term[1:] in labels:
                return False
        elif term not in labels:
            return False
    return True


class Cut(Exception):
    pass


class RequestHandler(http.server.BaseHTTPRequestHandler):
    api = None
    protocol_version = "HTTP/1.1"
    wbufsize = 0

    def log_message(self, *arguments):
        pass

    def setup(self):
        super().setup()
        self.left = self.api.faults.cut_after() if self.api.faults.cut_after else None

    def write(self, data):
        if self.left is not None and len(data) > self.left:
            self.wfile.write(data[:self.left])
            self.request.shutdown(socket.SHUT_RDWR)
            raise Cut
        if self.left is not None:
            self.left -= len(data)
        self.wfile.write(data)

    def answer(self, value, code=200, raw=None):
        body = raw if raw is not None else encode(value)
        self.write(b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (code, len(body)))
        self.write(body)

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (Cut, OSError, ssl.SSLError):
            self.close_connection = True

    def do_GET(self):
        api = self.api
        while api.faults.silent and not api.is_ending:
            time.sleep(0.02)
        if api.tokens is not None:
            given = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if given not in api.tokens:
                return self.answer(status(401, "Unauthorized", "Unauthorized"), 401)
        url = urllib.parse.urlsplit(self.path)
        query = {key: values[-1] for key, values in urllib.parse.parse_qs(url.query, keep_blank_values=True).items()}
        parts = url.path.strip("/").split("/")
        if discovery := self.discover(parts):
            return self.answer(discovery)
        base = 2 if parts[0] == "api" else 3
        namespace = None
        if len(parts) > base + 1 and parts[base] == "namespaces":
            namespace, base = parts[base + 1], base + 2
        plural = parts[base] if len(parts) > base else ""
        if plural not in KINDS:
            return self.answer(status(404, "NotFound", "the server could not find the requested resource"), 404)
        name = parts[base + 1] if len(parts) > base + 1 else None
        verb = "get" if name else "watch" if query.get("watch") in ("1", "true") else "list"
        with api.lock:
            is_check = verb == "list" and query.get("limit") == "1" and "continue" not in query
            api.requests.append(("check" if is_check else verb, plural, self.path))
            api.times.append(time.monotonic())
        if {(verb, plural), (verb, plural, namespace)} & api.faults.forbidden:
            group = KINDS[plural][0]
            message = (f'{plural} is forbidden: User "system:serviceaccount:kube-system:clusterip" cannot {verb} resource '
                       f'"{plural}" in API group "{group}" at the cluster scope')
            return self.answer(status(403, "Forbidden", message), 403)
        selector = query.get("labelSelector", "")

        def wanted(key, value):
            return (namespace is None or api.faults.every_namespace or key[0] == namespace) and (
                not selector or api.faults.every_label or matches(selector, value))

        if verb == "get":
            with api.lock:
                stored = api.objects[plural].get((namespace, name))
            if stored is None:
                return self.answer(status(404, "NotFound", f'{plural} "{name}" not found'), 404)
            return self.answer(None, raw=stored.raw)
        if verb == "list":
            return self.list(plural, query, wanted)
        self.watch(plural, query, wanted)

    def do_POST(self):
        made = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        version, kind, is_namespaced = MADE[urllib.parse.urlsplit(self.path).path.split("/")[-1]]
        if (made["apiVersion"], made["kind"], "namespace" in made["metadata"]) != (version, kind, is_namespaced):
            return self.answer(status(400, "BadRequest", "another kind was expected"), 400)
        with self.api.lock:
            self.api.made.append(made)
        self.answer(made, 201)

    @staticmethod
    def discover(parts):
        if parts == ["version"]:
            return {"major": "1", "minor": "32", "gitVersion": "v1.32.0", "platform": "linux/amd64"}
        if parts == ["api"]:
            return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}
        resources = {}
        for plural, (_, kind) in KINDS.items():
            resources.setdefault(api_version(plural), []).append((plural, kind, True, ["get", "list", "watch"]))
        for plural, (version, kind, is_namespaced) in MADE.items():
            resources.setdefault(version, []).append((plural, kind, is_namespaced, ["get", "create"]))
        if parts == ["apis"]:
            versions = [{"groupVersion": one, "version": "v1"} for one in resources if one != "v1"]
            return {"kind": "APIGroupList", "apiVersion": "v1",
                    "groups": [{"name": one["groupVersion"].removesuffix("/v1"), "versions": [one], "preferredVersion": one}
                               for one in versions]}
        version = "/".join(parts[1:])
        if version in resources and parts[0] == ("api" if version == "v1" else "apis"):
            return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version,
                    "resources": [{"name": plural, "singularName": kind.lower(), "namespaced": is_namespaced, "kind": kind,
                                   "verbs": verbs, "shortNames": ["svc"] if kind == "Service" else []}
                                  for plural, kind, is_namespaced, verbs in resources[version]]}
        return None

    def list(self, plural, query, wanted):
        api = self.api
        limit = int(query.get("limit") or 0)
        with api.lock:
            if token := query.get("continue"):
                held = json.loads(base64.urlsafe_b64decode(token)) if api.faults.unlisted is None else {"rv": api.version, "start": 0}
                snapshot = api.snapshots.get((plural, held["rv"]))
                if snapshot is None:
                    expired = status(410, "Expired", "The provided continue parameter is too old")
                    return self.answer(expired, 410)
                version, start = held["rv"], held["start"]
            else:
                version, start = api.version, 0
                snapshot = [stored for key, stored in sorted(api.objects[plural].items()) if wanted(key, stored.value)]
                api.snapshots[(plural, version)] = snapshot
                while len(api.snapshots) > 8:
                    api.snapshots.popitem(last=False)
        end = start + limit if limit else len(snapshot)
        metadata = {"resourceVersion": str(version)}
        if end < len(snapshot):
            metadata["continue"] = base64.urlsafe_b64encode(encode({"rv": version, "start": end})).decode()
            metadata["remainingItemCount"] = len(snapshot) - end
        raw_items = [stored.raw for stored in snapshot[start:end]]
        if api.faults.unlisted and query.get("limit") != "1":
            metadata, raw_items = api.faults.unlisted(metadata, raw_items)
        head = encode({"kind": KINDS[plural][1] + "List", "apiVersion": api_version(plural), "metadata": metadata})
        items = b",".join(raw_items)
        self.answer(None, raw=head[:-1] + b',"items":[' + items + b"]}\n")

    def chunk(self, data):
        if self.api.faults.slow:
            for i in range(0, len(data), 7):
                piece = data[i:i + 7]
                self.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                time.sleep(self.api.faults.slow)
        else:
            self.write(b"%x\r\n%s\r\n" % (len(data), data))

    def watch(self, plural, query, wanted):
        api = self.api
        faults = api.faults
        version = int(query.get("resourceVersion") or 0)
        until = time.monotonic() + int(query.get("timeoutSeconds") or 1800)
        has_bookmarks = faults.bookmarks and query.get("allowWatchBookmarks") in ("1", "true")
        if refusal := faults.refuse(version):
            self.write(refusal)
            with api.lock:
                while faults.hold and faults.refuse(version) and not api.is_ending:
                    api.lock.wait(0.1)
            raise Cut
        began = version
        self.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
        expired = {"type": "ERROR", "object": status(410, "Expired", f"too old resource version: {version}")}
        initial = version == 0
        late = []
        with api.lock:
            number = len(api.requests)
        held = {}  # what this watcher has been told of, for selectors
        while True:
            with api.lock:
                if not initial and version < api.log_floor[plural]:
                    self.chunk(encode(expired) + b"\n")
                    self.write(b"0\r\n\r\n")
                    return
                if initial:
                    events = [Event(int(stored.value["metadata"]["resourceVersion"]), "ADDED", stored)
                              for stored in api.objects[plural].values()]
                    position, log = len(api.log[plural]), api.log[plural]
                else:
                    log = api.log[plural]
                    if version is not None and held.get("log") is not log:
                        position = 0 if api.is_restored and held else next(
                            (i for i, event in enumerate(log) if event.version > version), len(log))
                        held["log"] = log
                        api.begun[plural] += 1
                    events = log[position:]
                    if not events and not late:
                        left = min(until - time.monotonic(), api.bookmark_every)
                        if left > 0 and not api.is_ending:
                            api.lock.wait(left)
                        log = api.log[plural]
                        events = log[position:] if held.get("log") is log else []
                    position += len(events)
                while number <= faults.muted and not api.is_ending:
                    api.lock.wait(0.1)
                now = api.version
            initial = False
            if faults.expire():
                self.chunk(encode(expired) + b"\n")
                self.write(b"0\r\n\r\n")
                return
            texts = []
            # Whoever asks for what is to come hears nothing until versions are there.
            events = [event for event in events if event.stored is None or event.version > began or api.is_restored]
            for event in events:
                version = max(version, event.version)
                if event.stored is None:
                    texts.append(event.raw)
                    continue
                metadata = event.stored.value["metadata"]
                key = (metadata["namespace"], metadata["name"])
                if wanted(key, event.stored.value):
                    texts.append(event.text())
                elif event.kind == "MODIFIED":  # it was, perhaps; the real one knows
                    texts.append(event.text("DELETED"))
            texts, late = texts + late, []
            if faults.shuffle:
                # Some come twice, some come late; none is lost.
                for text in list(texts):
                    if faults.chance.random() < 0.2:
                        texts.append(text)
                    elif faults.chance.random() < 0.2:
                        late.append(text)
                        texts.remove(text)
                faults.chance.shuffle(texts)
            while events and faults.chance.random() < faults.again:
                old = log[faults.chance.randrange(max(0, position - 500), position)]
                if old.stored is not None and wanted(key, old.stored.value):
                    texts.append(old.text())
            if texts:
                self.chunk(b"".join(texts))
            elif has_bookmarks and not late and not events and version <= now:
                with api.lock:
                    is_all = held.get("log") is api.log[plural] and position == len(api.log[plural])
                    now = api.version
                if is_all:
                    version = now
                    self.chunk(encode({"type": "BOOKMARK", "object": {
                        "kind": KINDS[plural][1], "apiVersion": api_version(plural),
                        "metadata": {"resourceVersion": str(now), "creationTimestamp": None}}}) + b"\n")
            if time.monotonic() >= until or api.is_ending:
                self.write(b"0\r\n\r\n")
                return
