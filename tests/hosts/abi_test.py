# SPDX-License-Identifier: BSD-2-Clause
"""The ABI of the plugin is what was recorded: functions, structs, members, sizes. abi_test.py --record DIRECTORY writes it anew,
which a compatible addition needs together with a higher CLUSTERIP_ABI_MINOR. 1.2 is the first minor version that was recorded."""

import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import unittest

SOURCE = pathlib.Path(os.environ["CLUSTERIP_SOURCE"])
BUILD = pathlib.Path(os.environ["CLUSTERIP_BUILD"])
HEADERS = SOURCE / "plugin/include"
LIBRARY = BUILD / "plugin/libclusterip.so.1"


def run(*command):
    return subprocess.run([str(word) for word in command], text=True, capture_output=True, check=False)


def minor():
    return re.search(r"#define CLUSTERIP_ABI_MINOR (\d+)u", (HEADERS / "clusterip.h").read_text())[1]


def recorded():
    return SOURCE / f"tests/hosts/libclusterip-1.{minor()}.{platform.machine()}.abi"


def record(path):
    """What the header declares, without what is the library's own and what depends on the machine that built it."""
    said = run("abidw", "--headers-dir", HEADERS, "--drop-private-types", "--exported-interfaces-only", "--drop-undefined-syms",
               "--no-corpus-path", "--no-comp-dir-path", "--no-show-locs", "--no-elf-needed", "--out-file", path, LIBRARY)
    if said.returncode != 0:
        raise AssertionError(said.stderr)
    path.write_text(path.read_text().replace(f"{SOURCE}/", ""))


def differences(before, after):
    """abidiff's exit code and report: 0 and nothing when the two are the same."""
    said = run("abidiff", "--no-show-locs", before, after)
    return said.returncode, said.stdout + said.stderr


class Abi(unittest.TestCase):
    maxDiff = None  # what abidiff says, all of it

    @classmethod
    def setUpClass(cls):
        if platform.machine() != "x86_64":
            raise unittest.SkipTest("the ABI was recorded on x86_64")
        cls.directory = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.directory.cleanup)
        cls.now = pathlib.Path(cls.directory.name) / "now.abi"
        record(cls.now)

    def test_is_what_was_recorded(self):
        code, said = differences(recorded(), self.now)
        self.assertEqual((code, said), (0, ""))

    def changed(self, pattern, replacement):
        text, count = re.subn(pattern, replacement, self.now.read_text(), count=1, flags=re.S)
        self.assertEqual(count, 1, pattern)
        path = pathlib.Path(self.directory.name) / "changed.abi"
        path.write_text(text)
        return differences(recorded(), path)

    def test_function_that_has_gone_is_seen(self):
        code, said = self.changed(r"<elf-symbol name='clusterip_canary'[^>]*/>", "")
        self.assertNotEqual(code & 8, 0, said)
        self.assertIn("clusterip_canary", said)

    def test_member_of_another_type_is_seen(self):
        wide = re.search(r"<typedef-decl name='uint64_t'[^>]* id='([^']+)'", self.now.read_text())[1]
        code, said = self.changed(r"(<var-decl name='column' type-id=')[^']+", rf"\g<1>{wide}")
        self.assertNotEqual(code & 4, 0, said)
        self.assertIn("column", said)

    def test_member_that_has_moved_is_seen(self):
        code, said = self.changed(r"(layout-offset-in-bits=')\d+('>\s*<var-decl name='refuse_errno')", r"\g<1>128\g<2>")
        self.assertNotEqual(code & 4, 0, said)
        self.assertIn("refuse_errno", said)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--record"]:
        record(pathlib.Path(sys.argv[2]) / recorded().name)
    else:
        unittest.main()
