# SPDX-License-Identifier: BSD-2-Clause
"""Programs and plugin are hardened: how each file was compiled, and what readelf and objdump find in what was built. ctest sets
CLUSTERIP_BUILD."""

import functools
import json
import os
import pathlib
import platform
import re
import shlex
import subprocess
import unittest

BUILD = pathlib.Path(os.environ["CLUSTERIP_BUILD"])
PROGRAMS = [BUILD / "cli/clusterip", BUILD / "run/fallback_proxy"]
PLUGIN = BUILD / "plugin/libclusterip.so.1"

# As cmake/hardening.cmake has them, and what would undo them further right.
FLAGS = ["-D_FORTIFY_SOURCE=3", "-fstack-protector-strong", "-fstack-clash-protection"]
FLAGS += {"x86_64": ["-fcf-protection=full"], "aarch64": ["-mbranch-protection=standard"]}.get(platform.machine(), [])
FAMILIES = ["-[DU]_FORTIFY_SOURCE", "-f(no-)?stack-protector", "-f(no-)?stack-clash-protection", "-f(no-)?cf-protection",
            "-mbranch-protection"]
PARTS = "balance|cli|config|fallback_proxy|health|kubernetes|plugin|run"
NAMESPACES = "balance|cli|config|health|kubernetes|plugin|run|userspace"


def show(*command):
    return subprocess.run([str(word) for word in command], text=True, capture_output=True, check=True).stdout


def flags(path):
    return " ".join(re.findall(r"\((?:FLAGS|FLAGS_1)\) +(.*)", show("readelf", "-dW", path)))


def each(*paths):
    """Runs a test for each of these files."""

    def repeat(test):
        @functools.wraps(test)
        def run(self):
            for path in paths:
                with self.subTest(path.name):
                    test(self, path)

        return run

    return repeat


class Hardening(unittest.TestCase):
    maxDiff = None

    @each(*PROGRAMS)
    def test_programs_are_position_independent(self, path):
        self.assertRegex(show("readelf", "-hW", path), r"Type: +DYN")
        self.assertRegex(flags(path), r"\bPIE\b")

    @each(*PROGRAMS, PLUGIN)
    def test_relocations_are_read_only_after_start(self, path):
        self.assertIn("GNU_RELRO", show("readelf", "-lW", path))
        self.assertRegex(flags(path), r"\bNOW\b")

    @each(*PROGRAMS, PLUGIN)
    def test_nothing_is_both_writable_and_executable(self, path):
        segments = re.findall(r"^  (\w+) .* ([R ][W ][E ]) +0x", show("readelf", "-lW", path), re.M)
        self.assertIn("GNU_STACK", dict(segments))
        self.assertEqual([name for name, rights in segments if "W" in rights and "E" in rights], [])
        self.assertNotIn("TEXTREL", show("readelf", "-dW", path))

    @each(*PROGRAMS, PLUGIN)
    def test_stack_and_buffers_are_guarded(self, path):
        imported = set(re.findall(r" UND (\w+)@", show("readelf", "--dyn-syms", "-W", path)))
        self.assertIn("__stack_chk_fail", imported)
        self.assertTrue([name for name in imported if re.fullmatch(r"__\w+_chk", name)], "nothing is fortified")

    def test_each_file_is_compiled_with_all_flags(self):
        commands = json.loads((BUILD / "compile_commands.json").read_text())
        product = [one for one in commands if re.search(rf"/({PARTS})/[\w/]+\.cpp$", one["file"]) and "/tests/" not in one["file"]
                   and " -o tests/" not in one["command"]]
        self.assertGreater(len(product), 80)
        wrong = {}
        for one in product:
            words = shlex.split(one["command"])
            last = [[word for word in words if re.match(family, word)][-1:] for family in FAMILIES]
            if sorted(sum(last, [])) != sorted(FLAGS):
                wrong[one["file"]] = last
        self.assertEqual(wrong, {})

    @unittest.skipUnless(platform.machine() == "x86_64", "x86 only")
    @each(*PROGRAMS, PLUGIN)
    def test_indirect_calls_land_on_marks_and_stacks_are_probed(self, path):
        code = show("objdump", "-d", "--no-show-raw-insn", path)
        functions = re.findall(r"^[0-9a-f]+ <([\w@]+)>:\n.*?\t(\w+)", code, re.M)
        # Of our own ones those that another file may call: a local function that is never called indirectly needs no mark.
        ours = {name: first for name, first in functions
                if re.match(rf"_ZNK?({'|'.join(f'{len(one)}{one}' for one in NAMESPACES.split('|'))})(?!L)", name)
                and "_GLOBAL__N_1" not in name}
        if path == PLUGIN:
            exported = set(re.findall(r" (clusterip_\w+)@@", show("readelf", "--dyn-syms", "-W", path)))
            ours |= {plain: first for name, first in functions if (plain := name.partition("@@")[0]) in exported}
            self.assertLessEqual(exported, set(ours))
        else:
            self.assertIn("main", dict(functions))
            ours["main"] = dict(functions)["main"]
        self.assertGreater(len(ours), 100)
        self.assertEqual({name: first for name, first in ours.items() if first != "endbr64"}, {})
        self.assertRegex(code, r"\torq +\$0x0,\(%rsp\)", "no frame is probed page by page")
        steps = {int(step, 16) for step in re.findall(r"\tsub +\$(0x[0-9a-f]+),%rsp", code)}
        self.assertEqual({step for step in steps if 4096 < step < 1 << 31}, set(), "a frame of more than a page at once")

    @each(PLUGIN)
    def test_no_library_is_looked_for_where_others_write(self, path):
        self.assertNotRegex(show("readelf", "-dW", path), r"\((RPATH|RUNPATH)\)")


if __name__ == "__main__":
    unittest.main()
