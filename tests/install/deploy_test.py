# SPDX-License-Identifier: BSD-2-Clause
"""deploy/kubernetes: what the manifests ask of a cluster, and that clusterip serves with no more than they give it. ctest sets
CLUSTERIP_SOURCE and CLUSTERIP_BUILD."""

import json
import os
import pathlib
import shutil
import ssl
import subprocess
import sys
import tempfile
import unittest

import yaml

SOURCE = pathlib.Path(os.environ["CLUSTERIP_SOURCE"])
sys.path[:0] = [str(SOURCE / "tests/hosts"), str(SOURCE / "tests/kubernetes")]
import stage  # noqa: E402
from api_server import ApiServer  # noqa: E402
from daemon_test import ONE, TWO, service, slice_of  # noqa: E402

CLUSTERIP = stage.BUILD / "cli/clusterip"
MANIFESTS = SOURCE / "deploy/kubernetes/clusterip.yaml"
OBJECTS = list(yaml.safe_load_all(MANIFESTS.read_text()))
ACCOUNT = "/run/secrets/kubernetes.io/serviceaccount"


def missing(wanted, found, path=""):
    """Where `found` has not what is wanted."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key, value in wanted.items():
            yield from missing(value, found.get(key), f"{path}.{key}")
    elif isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        for index, value in enumerate(wanted):
            yield from missing(value, found[index], f"{path}[{index}]")
    elif wanted != found:
        yield path


def the(kind):
    found, = (one for one in OBJECTS if one["kind"] == kind)
    return found


POD = the("DaemonSet")["spec"]["template"]["spec"]
CONTAINER, = POD["containers"]
TOML = the("ConfigMap")["data"]["clusterip.toml"]


class Manifests(unittest.TestCase):
    def test_objects_belong_together(self):
        self.assertEqual([one["kind"] for one in OBJECTS],
                         ["ServiceAccount", "ClusterRole", "ClusterRoleBinding", "ConfigMap", "DaemonSet"])
        self.assertEqual({one["metadata"]["name"] for one in OBJECTS}, {"clusterip"})
        namespaced = {one["kind"]: one["metadata"].get("namespace") for one in OBJECTS}
        self.assertEqual(namespaced, {"ServiceAccount": "kube-system", "ClusterRole": None, "ClusterRoleBinding": None,
                                      "ConfigMap": "kube-system", "DaemonSet": "kube-system"})
        binding = the("ClusterRoleBinding")
        self.assertEqual(binding["roleRef"], {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "clusterip"})
        self.assertEqual(binding["subjects"], [{"kind": "ServiceAccount", "name": "clusterip", "namespace": "kube-system"}])
        self.assertEqual(POD["serviceAccountName"], "clusterip")
        labels = the("DaemonSet")["spec"]["template"]["metadata"]["labels"]
        self.assertEqual(the("DaemonSet")["spec"]["selector"]["matchLabels"], labels)
        self.assertEqual(labels, {"app": "clusterip"})  # by which docs/kubernetes.md finds the pods

    def test_permissions_are_to_list_and_to_watch_two_kinds(self):
        self.assertEqual(the("ClusterRole")["rules"],
                         [{"apiGroups": [""], "resources": ["services"], "verbs": ["list", "watch"]},
                          {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]}])

    def test_configuration_is_valid(self):
        with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
            file.write(TOML)
            file.flush()
            stage.run(CLUSTERIP, "check", file.name)
        self.assertIn("\n[kubernetes]\n", TOML)

    def test_container_has_the_capabilities_of_the_documents_and_no_more(self):
        security = CONTAINER["securityContext"]
        self.assertEqual(security["capabilities"], {"drop": ["ALL"], "add": ["BPF", "PERFMON", "NET_ADMIN"]})
        self.assertIs(security["readOnlyRootFilesystem"], True)
        self.assertIs(security["allowPrivilegeEscalation"], False)
        self.assertNotIn("privileged", security)
        self.assertEqual({key: POD[key] for key in ("hostNetwork", "hostPID", "hostIPC") if key in POD}, {"hostNetwork": True})
        said = (SOURCE / "docs/security.md").read_text()
        for name in security["capabilities"]["add"]:
            self.assertIn(f"CAP_{name}", said)

    def test_mounts_are_what_the_configuration_names(self):
        mounts = {one["name"]: (one["mountPath"], one.get("readOnly", False)) for one in CONTAINER["volumeMounts"]}
        self.assertEqual(mounts, {"config": ("/etc/clusterip", True), "bpf": ("/sys/fs/bpf", False),
                                  "cgroup": ("/host/cgroup", True), "run": ("/run/clusterip", False)})
        volumes = {one.pop("name"): one for one in json.loads(json.dumps(POD["volumes"]))}
        self.assertEqual(volumes, {"config": {"configMap": {"name": "clusterip"}},
                                   "bpf": {"hostPath": {"path": "/sys/fs/bpf", "type": "Directory"}},
                                   "cgroup": {"hostPath": {"path": "/sys/fs/cgroup", "type": "Directory"}},
                                   "run": {"emptyDir": {"medium": "Memory"}}})
        self.assertIn('cgroup  = "/host/cgroup"', TOML)
        self.assertEqual(CONTAINER["args"], ["run", "--config", "/etc/clusterip/clusterip.toml"])

    @unittest.skipUnless(shutil.which("kubectl") or os.environ.get("CLUSTERIP_REQUIRE_PRIVILEGE") == "1", "there is no kubectl")
    def test_kubectl_applies_all_and_knows_each_field(self):
        api = ApiServer()
        self.addCleanup(api.end)
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        environment = {**os.environ, "HOME": directory.name, "KUBECONFIG": "/dev/null"}
        applied = stage.run("kubectl", "--server", api.url, "apply", "--validate=false", "-f", MANIFESTS, env=environment)
        self.assertEqual(applied.stdout.count(" created"), len(OBJECTS), applied.stdout)
        self.assertEqual([(one["kind"], one["metadata"]["name"]) for one in api.made],
                         [(one["kind"], one["metadata"]["name"]) for one in OBJECTS])
        # What kubectl reads into an object and writes again has only the fields that such an object has.
        file = pathlib.Path(directory.name) / "daemonset.json"
        file.write_text(json.dumps(the("DaemonSet")))
        known = json.loads(stage.run("kubectl", "set", "image", "--local", "-f", file, "clusterip=other", "--dry-run=client", "-o",
                                     "json", env=environment).stdout)
        self.assertEqual(list(missing(the("DaemonSet"), known)), [".spec.template.spec.containers[0].image"])

    def test_image_is_the_one_that_the_containerfile_is_built_to(self):
        lines = (SOURCE / "deploy/kubernetes/Containerfile").read_text()
        self.assertIn(f"-t {CONTAINER['image']} .", lines)
        version = stage.run(CLUSTERIP, "--version").stdout.split()[1]
        self.assertEqual(CONTAINER["image"], f"clusterip:{version}")


class Pod(unittest.TestCase):
    """The container, as far as namespaces and capabilities make one: root without others than its capabilities, read-only
    files, the service account where Kubernetes puts it, and the node's cgroups, of which it is below, read-only."""

    @classmethod
    def setUpClass(cls):
        stage.set_up(cls)
        cls.backends = stage.Backends(cls.directory)
        cls.addClassCleanup(cls.backends.end)
        path = cls.directory.path
        stage.run("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
                  "-subj", "/CN=api", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", path / "key", "-out", path / "ca.crt")

    def mounted(self):
        """Shell words that give it what it would have, in a mount namespace of its own. The cgroup is this test's alone."""
        lines = ["set -e", "mount --make-rprivate /"]
        for name in ("container", "config", "account", "run"):
            (self.directory.path / name).mkdir()
        (self.directory.path / "config/clusterip.toml").write_text(TOML.replace("/host/cgroup", f"{self.directory.path}/container"))
        (self.directory.path / "account/ca.crt").write_text((self.directory.path / "ca.crt").read_text())
        (self.directory.path / "account/token").write_text("secret")
        lines += [f"mount --bind -o ro {self.cgroup.path} {self.directory.path}/container",
                  f"mount -o remount,bind,ro {self.directory.path}/container",
                  "mount -t tmpfs tmpfs /run", f"mkdir -p {ACCOUNT} /run/clusterip", "mount -t tmpfs tmpfs /run/clusterip",
                  f"mount --bind {self.directory.path}/account {ACCOUNT}", "mount -o remount,ro /run", "mount -o remount,bind,ro /"]
        return "\n".join(lines)

    def test_serves_with_what_the_manifest_gives_it(self):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.directory.path / "ca.crt", self.directory.path / "key")
        api = ApiServer(tls=context, tokens={"secret"})
        self.addCleanup(api.end)
        api.put("services", service("web", 0, internalTrafficPolicy="Local"))
        api.put("endpointslices", slice_of("web", [ONE, TWO]))  # ONE is on the node "here"
        capabilities = CONTAINER["securityContext"]["capabilities"]
        self.assertEqual(capabilities["drop"], ["ALL"])
        config = self.directory.path / "config/clusterip.toml"
        words = ["setpriv", "--bounding-set=-all," + ",".join("+" + name.lower() for name in capabilities["add"]), "--inh-caps=-all",
                 "--no-new-privs", CLUSTERIP, *(config if word == "/etc/clusterip/clusterip.toml" else word
                                                for word in CONTAINER["args"]), "--plugin", stage.PLUGIN]
        script = self.mounted() + '\nexec "$@"'
        environment = {**os.environ, "NODE_NAME": "here", "KUBERNETES_SERVICE_HOST": "127.0.0.1",
                       "KUBERNETES_SERVICE_PORT": str(api.port)}
        log = self.directory.path / "log"
        with log.open("w") as out:
            pod = subprocess.Popen(["unshare", "--mount", "--cgroup", "sh", "-c", script, "pod", *map(str, words)], env=environment,
                                   stdout=out, stderr=out)

        def end():
            pod.terminate()
            pod.wait()
            stage.run(CLUSTERIP, "unload", "--plugin", stage.PLUGIN)
        self.addCleanup(end)
        try:
            stage.wait_for("it serves", lambda: pod.poll() is not None or stage.ask("http://10.96.0.1/", 20) == {"backend1": 20})
        except AssertionError as failure:
            raise AssertionError(f"{failure}\n{log.read_text()}") from None
        self.assertIsNone(pod.poll(), log.read_text())
        probe = CONTAINER["readinessProbe"]["exec"]["command"]
        self.assertEqual(probe, ["clusterip", "status", "--config", "/etc/clusterip/clusterip.toml"])
        said = stage.run("nsenter", f"--mount=/proc/{pod.pid}/ns/mnt", CLUSTERIP, "status", "--config", config, "--json", "--plugin",
                         stage.PLUGIN, check=False)
        self.assertEqual(said.returncode, 0, said.stdout + said.stderr)
        told = json.loads(said.stdout)
        self.assertEqual(told["canary"]["message"], "")
        self.assertTrue(told["canary"]["passed"])
        self.assertTrue(told["kubernetes"]["current"])
        # Going back: the node's copy of the ConfigMap says so, and the pod ends.
        config.write_text(config.read_text().replace('on_exit = "keep"', 'on_exit = "detach"'))
        stage.wait_for("it has read that", lambda: "reloaded" in log.read_text())
        pod.terminate()
        self.assertEqual(pod.wait(30), 0, log.read_text())
        self.assertEqual(stage.pins(), [])


if __name__ == "__main__":
    unittest.main()
