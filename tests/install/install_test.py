# SPDX-License-Identifier: BSD-2-Clause
"""What is installed, and whether it belongs together. ctest sets CLUSTERIP_SOURCE, CLUSTERIP_BUILD and CMAKE_COMMAND."""

import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import unittest

SOURCE = pathlib.Path(os.environ["CLUSTERIP_SOURCE"])
BUILD = pathlib.Path(os.environ["CLUSTERIP_BUILD"])
CMAKE = os.environ.get("CMAKE_COMMAND", "cmake")
HERE = SOURCE / "tests/install"
PROGRAMS = {"clusterip": BUILD / "cli/clusterip", "fallback_proxy": BUILD / "run/fallback_proxy"}
MANUALS = {"clusterip": "clusterip.1", "fallback_proxy": "fallback_proxy.8"}


def run(*command, check=True, **options):
    done = subprocess.run([str(word) for word in command], text=True, capture_output=True, check=False, **options)
    if check and done.returncode != 0:
        raise AssertionError(f"{' '.join(map(str, command))}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def cached(name):
    match = re.search(rf"^{name}:\w+=(.*)$", (BUILD / "CMakeCache.txt").read_text(), re.M)
    return match[1] if match else ""


def listed(name):
    lines = (HERE / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def multiarch():
    return run("dpkg-architecture", "-qDEB_HOST_MULTIARCH").stdout.strip()


def verbs():
    """Each verb of the command, with the options that its help shows."""
    text = run(PROGRAMS["clusterip"], "--help").stdout
    names = re.findall(r"^  ([a-z]+) ", text.split("Verbs:")[1].split("Options:")[0], re.M)
    return {name: options("clusterip", name) for name in names}


def options(program, *verb):
    return set(re.findall(r"^  (?:-h \[ )?(--[a-z-]+)", run(PROGRAMS[program], *verb, "--help").stdout, re.M))


@unittest.skipUnless(pathlib.Path("/etc/debian_version").exists(), "the layout is Debian's")
class Installed(unittest.TestCase):
    """A build for another prefix installs elsewhere, with the same files."""

    def setUp(self):
        if cached("CMAKE_INSTALL_PREFIX") != "/usr":
            if os.environ.get("CLUSTERIP_REQUIRE_PRIVILEGE") == "1":
                self.fail("this build is not for /usr: CMAKE_INSTALL_PREFIX")
            self.skipTest("this build is not for /usr")
        self.directory = tempfile.TemporaryDirectory()
        self.addCleanup(self.directory.cleanup)
        self.root = pathlib.Path(self.directory.name)


class Tree(Installed):
    def setUp(self):
        super().setUp()
        run(CMAKE, "--install", BUILD, env={**os.environ, "DESTDIR": str(self.root)})
        self.library = self.root / "usr/lib" / multiarch()

    def test_destdir_holds_the_listed_files(self):
        found = [str(path.relative_to(self.root)) for path in self.root.rglob("*") if not path.is_dir()]
        wanted = [line.replace("MULTIARCH", multiarch()) for line in listed("files.txt")]
        self.assertEqual(sorted(found), sorted(wanted))

    def test_plugin_has_its_soname_and_links(self):
        self.assertEqual(os.readlink(self.library / "libclusterip.so"), "libclusterip.so.1")
        self.assertEqual(os.readlink(self.library / "libclusterip.so.1"), "libclusterip.so.1.0")
        dynamic = run("objdump", "-p", self.library / "libclusterip.so.1.0").stdout
        self.assertRegex(dynamic, r"SONAME\s+libclusterip\.so\.1\n")

    def test_installed_command_finds_the_installed_plugin(self):
        said = run(self.root / "usr/bin/clusterip", "--version").stdout
        # Resolved, since the path goes by the directory of the command.
        shown = pathlib.Path(said.split(", ")[-1].strip()).resolve()
        self.assertEqual(shown, (self.library / "libclusterip.so.1").resolve())

    def test_installed_configuration_is_valid_and_serves_nothing(self):
        file = self.root / "etc/clusterip/clusterip.toml"
        run(self.root / "usr/bin/clusterip", "check", file)
        self.assertNotRegex(file.read_text(), re.compile(r"^\s*\[\[service", re.M))

    def test_tables_that_are_commented_out_are_valid(self):
        text = (self.root / "etc/clusterip/clusterip.toml").read_text()
        text = re.sub(r"^# (?=[\[a-z_]+\]*\s*(=|$|\]|#))", "", text, flags=re.M)
        self.assertRegex(text, re.compile(r"^\[\[service\]\]", re.M))
        self.assertRegex(text, re.compile(r"^drain_timeout", re.M))
        run(PROGRAMS["clusterip"], "check", "-", input=text)

    def test_unit_names_installed_paths(self):
        unit = (self.root / "lib/systemd/system/clusterip.service").read_text()
        for path in re.findall(r"^Exec\w+=-?(/usr/bin/clusterip)", unit, re.M):
            self.assertTrue((self.root / path[1:]).exists())
        self.assertIn("/etc/clusterip/clusterip.toml", unit)

    def consumer_runs(self, program):
        said = run(program, env={**os.environ, "LD_LIBRARY_PATH": str(self.library)}).stdout
        self.assertRegex(said, r"^\d+\.\d+\.\d+ 1\n$")

    def test_pkg_config_consumer_in_c99_links_and_runs(self):
        environment = {**os.environ, "PKG_CONFIG_PATH": str(self.library / "pkgconfig"),
                       "PKG_CONFIG_SYSROOT_DIR": str(self.root),
                       "PKG_CONFIG_ALLOW_SYSTEM_CFLAGS": "1", "PKG_CONFIG_ALLOW_SYSTEM_LIBS": "1"}
        flags = run("pkg-config", "--cflags", "--libs", "clusterip", env=environment).stdout.split()
        self.assertIn(f"-I{self.root}/usr/include", flags)
        program = self.root / "consumer"
        run("cc", "-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", HERE / "consumer/consumer.c", *flags, "-o", program)
        self.consumer_runs(program)

    def test_find_package_consumer_in_c99_links_and_runs(self):
        build = self.root / "build"
        run(CMAKE, "-S", HERE / "consumer", "-B", build, f"-DCMAKE_PREFIX_PATH={self.root}/usr")
        run(CMAKE, "--build", build)
        self.consumer_runs(build / "consumer")


class Hosts(Installed):
    """The hosts to copy from, as somebody has them who has the library and its header installed, and nothing else of clusterip."""

    @classmethod
    def setUpClass(cls):
        if cached("CMAKE_INSTALL_PREFIX") != "/usr":
            return
        cls.made = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.made.cleanup)
        root, cls.copy = pathlib.Path(cls.made.name) / "root", pathlib.Path(cls.made.name) / "hosts"
        for component in ("library", "development"):
            run(CMAKE, "--install", BUILD, "--component", component, env={**os.environ, "DESTDIR": str(root)})
        library = root / "usr/lib" / multiarch()
        cls.plugin = library / "libclusterip.so.1"
        config = library / "pkgconfig/clusterip.pc"  # as of an installation that is there
        config.write_text(config.read_text().replace("=/usr", f"={root}/usr"))
        text = (root / "usr/share/doc/libclusterip-dev/examples/hosts/README.md").read_text()
        commands = re.search(r"^```\n(.*?)^```$", text, re.M | re.S)[1].replace("/usr/share/doc", f"{root}/usr/share/doc")
        run("bash", "-ec", commands, cwd=cls.made.name, env={**os.environ, "PKG_CONFIG_PATH": str(config.parent)})
        cls.file = cls.copy / "services.toml"
        cls.file.write_text(re.search(r"^```toml\n(.*?)^```$", text, re.M | re.S)[1])

    def ends_for_want_of_a_cgroup(self, *command):
        """So the library is in use, and nothing else is wanting."""
        done = run(*command, self.plugin, self.file, "/nowhere", check=False)
        self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done.stderr)
        self.assertIn("opening the cgroup /nowhere", done.stderr)

    def test_host_in_c(self):
        self.ends_for_want_of_a_cgroup(self.copy / "host")

    def test_host_in_python(self):
        self.ends_for_want_of_a_cgroup("python3", "-B", self.copy / "python/host.py")

    def test_module_for_haproxy(self):
        conf = self.copy / "haproxy.cfg"
        conf.write_text(f"""global
    setenv CLUSTERIP_FILE {self.file}
    setenv CLUSTERIP_PLUGIN {self.plugin}
    lua-prepend-path {self.copy}/?.so cpath
    lua-load {self.copy}/haproxy/clusterip.lua
listen any
    mode tcp
    timeout client 1s
    timeout connect 1s
    timeout server 1s
    bind unix@{self.copy}/any.sock
""")
        # From where its Lua would find clusterip.lua as a module, too.
        self.assertIn("Configuration file is valid", run("haproxy", "-c", "-f", conf, cwd=self.copy / "haproxy").stdout)
        conf.write_text(conf.read_text().replace(str(self.plugin), "/nowhere.so"))
        self.assertIn("/nowhere.so: cannot open", run("haproxy", "-c", "-f", conf, check=False).stderr)

    def test_module_for_nginx(self):
        conf = self.copy / "nginx.conf"
        conf.write_text(f"load_module {self.copy}/ngx_clusterip_module.so; pid {self.copy}/nginx.pid; error_log stderr;\n"
                        f"clusterip_plugin {self.plugin}; clusterip {self.file}; events {{}}\n")
        nginx = shutil.which("nginx", path="/usr/sbin:" + os.environ["PATH"])
        self.assertIn("test is successful", run(nginx, "-t", "-c", conf, "-e", "stderr").stderr)
        conf.write_text(conf.read_text().replace(str(self.plugin), "/nowhere.so"))
        self.assertIn("/nowhere.so: cannot open", run(nginx, "-t", "-c", conf, "-e", "stderr", check=False).stderr)


class Packages(Installed):
    @classmethod
    def setUpClass(cls):
        if cached("CMAKE_INSTALL_PREFIX") != "/usr":
            return
        cls.made = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.made.cleanup)
        run("cpack", "--config", BUILD / "CPackConfig.cmake", "-G", "DEB", "-B", cls.made.name, cwd=cls.made.name)
        cls.packages = {path.name.split("_")[0]: path for path in pathlib.Path(cls.made.name).glob("*.deb")}

    def field(self, package, name):
        return run("dpkg-deb", "-f", self.packages[package], name).stdout.strip()

    def control(self, package):
        run("dpkg-deb", "-e", self.packages[package], self.root)
        return self.root

    def test_packages_hold_the_listed_files(self):
        found = []
        for name, package in self.packages.items():
            for line in run("dpkg-deb", "-c", package).stdout.splitlines():
                mode, owner, _, _, _, path = line.split(maxsplit=5)
                self.assertEqual(owner, "root/root", path)
                if not mode.startswith("d"):
                    found.append(f"{name} {mode} {path.removeprefix('./')}")
        wanted = [line.replace("MULTIARCH", multiarch()) for line in listed("packages.txt")]
        self.assertEqual(sorted(found), sorted(wanted))

    def test_dependencies_are_the_libraries_used(self):
        depends = self.field("clusterip", "Depends")
        for name in ("libc6", "libmnl0", "libsystemd0", "libboost-program-options1", "libclusterip1 (= "):
            self.assertIn(name, depends)
        self.assertIn("libbpf1", self.field("libclusterip1", "Depends"))
        self.assertNotIn("libbpf", depends)
        self.assertRegex(self.field("libclusterip-dev", "Depends"), r"^libclusterip1 \(= ")

    def test_configuration_is_a_conffile(self):
        self.assertEqual((self.control("clusterip") / "conffiles").read_text(), "/etc/clusterip/clusterip.toml\n")

    def test_maintainer_scripts_parse(self):
        control = self.control("clusterip")
        for script in ("postinst", "prerm", "postrm"):
            run("sh", "-n", control / script)

    def test_upgrade_never_unloads(self):
        """prerm is called with `upgrade` then: it must do nothing. `clusterip` in PATH would tell on it."""
        tools = self.root / "tools"
        tools.mkdir()
        for name in ("clusterip", "deb-systemd-invoke", "systemctl"):
            (tools / name).write_text(f"#!/bin/sh\necho {name} \"$@\" >>{self.root}/called\n")
            (tools / name).chmod(0o755)
        control = self.control("clusterip")
        run("sh", control / "prerm", "upgrade", "9", env={"PATH": f"{tools}:/usr/bin:/bin"})
        self.assertFalse((self.root / "called").exists())


class Unit(unittest.TestCase):
    UNIT = SOURCE / "systemd/clusterip.service"

    def settings(self):
        pairs = re.findall(r"^(\w+)=(.*)$", self.UNIT.read_text(), re.M)
        return {key: [value for name, value in pairs if name == key] for key, _ in pairs}

    def test_exposure_is_three_or_better(self):
        run("systemd-analyze", "security", "--offline=yes", "--no-pager", "--threshold=30", self.UNIT)

    def test_threshold_can_fail(self):
        self.assertNotEqual(run("systemd-analyze", "security", "--offline=yes", "--no-pager", "--threshold=10", self.UNIT,
                                check=False).returncode, 0)

    def test_exit_codes_that_no_restart_helps_are_those_of_the_command(self):
        said = run(PROGRAMS["clusterip"], "--help").stdout
        self.assertRegex(said, r"2 usage, 3 configuration,\s+4 ")
        self.assertEqual(self.settings()["RestartPreventExitStatus"], ["2 3 4"])

    def test_command_has_the_verbs_and_options_that_the_unit_uses(self):
        known = verbs()
        used = 0
        for name in ("ExecStart", "ExecReload", "ExecStopPost"):
            for line in self.settings()[name]:
                words = line.lstrip("-").split()
                if words[0] != "/usr/bin/clusterip":
                    continue
                self.assertIn(words[1], known)
                self.assertLessEqual({word for word in words if word.startswith("--")}, known[words[1]])
                used += 1
        self.assertEqual(used, 3)


class Completions(unittest.TestCase):
    FILES = {"clusterip": ("clusterip.bash", "_clusterip", "clusterip.fish"),
             "fallback_proxy": ("fallback_proxy.bash", "_fallback_proxy", "fallback_proxy.fish")}

    def bash_offers(self, program, *words):
        """What bash would offer behind these words."""
        script = (f'. "{SOURCE}/completions/{program}.bash"; compopt() {{ :; }}; COMP_WORDS=("$@"); '
                  f'COMP_CWORD=$(($# - 1)); _{program}; printf "%s\\n" "${{COMPREPLY[@]}}"')
        return set(run("bash", "-c", script, "bash", program, *words).stdout.split())

    def test_files_parse(self):
        for shell in ("bash", "zsh", "fish"):
            self.assertTrue(shutil.which(shell), f"{shell} is missing: scripts/install-packages --tests")
        for files in self.FILES.values():
            for shell, name in zip(("bash", "zsh", "fish"), files):
                run(shell, "-n", SOURCE / "completions" / name)

    def test_bash_offers_the_verbs_and_the_options_of_each(self):
        known = verbs()
        self.assertEqual(self.bash_offers("clusterip", ""), set(known) | {"--plugin", "--help", "--version"})
        for verb, wanted in known.items():
            self.assertEqual(self.bash_offers("clusterip", verb, "--"), wanted, verb)
        self.assertEqual(self.bash_offers("fallback_proxy", "--"), options("fallback_proxy"))

    def test_zsh_offers_the_verbs_and_the_options_of_each(self):
        text = (SOURCE / "completions/_clusterip").read_text()
        common = set(re.findall(r"--[a-z-]+(?=\[)", re.search(r"common=\(.*\)", text)[0]))
        places = re.search(r"places=\((.*?)^ *\)$", text, re.M | re.S)[1]
        for verb, wanted in verbs().items():
            self.assertIn(f"'{verb}:", text)
            case = re.search(rf"^ *{verb}\)(.*?);;", text, re.M | re.S)[1].replace("$places", places)
            self.assertEqual(set(re.findall(r"--[a-z-]+(?=\[)", case)) | common, wanted, verb)
        text = (SOURCE / "completions/_fallback_proxy").read_text()
        self.assertEqual(set(re.findall(r"--[a-z-]+(?=\[)", text)), options("fallback_proxy"))

    def test_fish_offers_the_verbs_and_the_options_of_each(self):
        lines = (SOURCE / "completions/clusterip.fish").read_text().splitlines()
        known = verbs()
        for verb in known:
            self.assertTrue(any(f"-a {verb} " in line for line in lines), verb)
        offered = {verb: set() for verb in known}
        for line in lines:
            option = re.search(r" -l ([a-z-]+)", line)
            if option and line.startswith("complete") and "not __fish_seen" not in line:
                seen = re.search(r"__fish_seen_subcommand_from ([a-z ]+)'", line)
                for verb in seen[1].split() if seen else known:
                    offered[verb].add("--" + option[1])
        self.assertEqual(offered, known)
        text = (SOURCE / "completions/fallback_proxy.fish").read_text()
        self.assertEqual({"--" + name for name in re.findall(r" -l ([a-z-]+)", text)}, options("fallback_proxy"))


class Manuals(unittest.TestCase):
    def source(self, page):
        return (SOURCE / "docs/man" / f"{page}.md").read_text()

    def test_pages_are_clean(self):
        for page in ("clusterip.1", "clusterip.toml.5", "clusterip.h.3", "fallback_proxy.8"):
            path = BUILD / "docs/man" / page
            self.assertEqual(run("mandoc", "-T", "lint", "-W", "warning", path, check=False).stdout, "", page)
            shown = run("man", "--warnings", "-E", "UTF-8", "-l", path, env={**os.environ, "MANPAGER": "cat"})
            self.assertEqual(shown.stderr, "", page)
            self.assertIn("NAME", shown.stdout)

    def test_command_page_has_every_verb_and_option(self):
        text = self.source("clusterip.1")
        for verb, wanted in verbs().items():
            self.assertRegex(text, re.compile(rf"^\*\*{verb}\*\*", re.M))
            synopsis = re.search(rf"^\*\*{verb}\*\*.*$", text, re.M)[0]
            for option in wanted:
                self.assertRegex(text, re.compile(rf"^(\*\*.*, )?\*\*{option}\*\*", re.M))
                if option not in ("--plugin", "--help"):
                    self.assertIn(f"**{option}**", synopsis, verb)

    def test_proxy_page_has_every_option(self):
        for option in options("fallback_proxy"):
            self.assertIn(f"**{option}**", self.source("fallback_proxy.8"))

    def test_pages_have_every_exit_code(self):
        for page in MANUALS.values():
            status = self.source(page).split("# EXIT STATUS")[1]
            for code in "01234":
                self.assertIn(f"**{code}**", status)

    def test_configuration_page_has_every_key(self):
        reader = (SOURCE / "config/read_config.cpp").read_text()
        text = self.source("clusterip.toml.5")
        keys = 0
        for table, fields in re.findall(r"constexpr Field<\w+> (\w+)_fields\[\] = \{\n(.*?)\n\};", reader, re.S):
            for key in re.findall(r'^ {4}\{"(\w+)"', fields, re.M):
                keys += 1
                if table == "config":
                    self.assertIn(rf"\[\[{key}\]\]" if key == "service" else rf"\[{key}\]", text)
                else:
                    self.assertIn(f"**{key}** =", text, table)
        self.assertGreater(keys, 40)

    def test_library_page_has_every_symbol(self):
        exported = re.findall(r"^\s+(clusterip_\w+);", (SOURCE / "plugin/clusterip.map").read_text(), re.M)
        self.assertGreater(len(exported), 10)
        for symbol in exported:
            self.assertIn(f"**{symbol}**(", self.source("clusterip.h.3"))


if __name__ == "__main__":
    unittest.main()
