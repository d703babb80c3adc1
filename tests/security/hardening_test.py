# SPDX-License-Identifier: BSD-2-Clause
"""Programs and plugin are hardened: what readelf and objdump find in the files that were built. ctest sets CLUSTERIP_BUILD."""

import functools
import json
import os
import pathlib
import platform
import re
import subprocess
import unittest

BUILD = pathlib.Path(os.environ["CLUSTERIP_BUILD"])
PROGRAMS = [BUILD / "cli/clusterip", BUILD / "run/fallback_proxy"]
PLUGIN = BUILD / "plugin/libclusterip.so.1"


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

    def test_what_is_compiled_is_fortified_fully(self):
        commands = json.loads((BUILD / "compile_commands.json").read_text())
        product = [one for one in commands if re.search(r"/(balance|cli|config|fallback_proxy|health|kubernetes|plugin|run)/[\w/]+\.cpp$",
                                                        one["file"]) and " -o tests/" not in one["command"]]
        self.assertGreater(len(product), 80)
        self.assertEqual([one["file"] for one in product if "-D_FORTIFY_SOURCE=3" not in one["command"]], [])

    @unittest.skipUnless(platform.machine() == "x86_64", "x86 only")
    @each(*PROGRAMS, PLUGIN)
    def test_indirect_calls_land_on_marks_and_stacks_are_probed(self, path):
        code = show("objdump", "-d", "--no-show-raw-insn", path)
        if path == PLUGIN:
            functions = re.findall(r"<(clusterip_\w+?)(?:@@\w+)?>:\n.*?\t(\w+)", code)
            names = set(re.findall(r" (clusterip_\w+)@@", show("readelf", "--dyn-syms", "-W", path)))
            self.assertLessEqual(names, {name for name, _ in functions})
            self.assertEqual({first for name, first in functions if name in names}, {"endbr64"})
        else:
            self.assertRegex(code, r"<main>:\n.*?\tendbr64")
        self.assertRegex(code, r"\torq +\$0x0,\(%rsp\)", "no frame is probed page by page")

    @each(PLUGIN)
    def test_no_library_is_looked_for_where_others_write(self, path):
        self.assertNotRegex(show("readelf", "-dW", path), r"\((RPATH|RUNPATH)\)")


if __name__ == "__main__":
    unittest.main()
