# SPDX-License-Identifier: BSD-2-Clause
"""What documents say of messages and of tests. Messages: every call of fail(), fail_errno(), spdlog::error() and warn() has a piece
of its text in one, with what is to be done. Claims: what docs/testing.md quotes stands where it is claimed, and the tests are there.
ctest sets CLUSTERIP_SOURCE."""

import os
import pathlib
import re
import unittest

SOURCE = pathlib.Path(os.environ["CLUSTERIP_SOURCE"])
DOCUMENTS = ["troubleshooting", "kubernetes", "cli", "service", "fallback_proxy", "embedding", "security", "configuration"]
PARTS = ["cli", "config", "fallback_proxy", "health", "kubernetes", "plugin", "run"]
CALL = re.compile(r"\b(?:fail|fail_errno|spdlog::error|spdlog::warn)\(")
TEXT = re.compile(r'"((?:[^"\\]|\\.)*)"')
SHORTEST = 10  # characters of a piece between two values: shorter ones are found anywhere
ENOUGH = 24  # of them: documents end long ones by "..."


def calls(source):
    """The line and the arguments of each."""
    for begin in CALL.finditer(source):
        depth, at = 1, begin.end()
        while depth:
            literal = TEXT.match(source, at)
            if literal:
                at = literal.end()
                continue
            depth += {"(": 1, ")": -1}.get(source[at], 0)
            at += 1
        yield source.count("\n", 0, begin.start()) + 1, source[begin.end():at - 1]


def pieces(arguments):
    """What of a message stands in it whatever its values are."""
    joined = re.sub(r'"\s*\n\s*"', "", arguments)
    for literal in TEXT.findall(joined):
        text = literal.replace('\\"', '"').replace("\\\\", "\\")
        for piece in re.split(r"\{[^}]*\}", text):
            piece = piece.strip(" :,;(\"'")
            if len(piece) >= SHORTEST:
                yield piece


class Messages(unittest.TestCase):
    def test_each_has_a_line_in_a_document(self):
        written = " ".join((SOURCE / f"docs/{name}.md").read_text() for name in DOCUMENTS)
        written = re.sub(r"\s+", " ", written)
        files = sorted(file for part in PARTS for file in (SOURCE / part).glob("*.cpp"))
        seen, missing = 0, []
        for file in files:
            for line, arguments in calls(file.read_text()):
                said = list(pieces(arguments))
                seen += bool(said)
                if said and not any(piece[:ENOUGH] in written for piece in said):
                    missing.append(f"{file.relative_to(SOURCE)}:{line}: {' ... '.join(said)}")
        self.assertGreater(seen, 150, "the calls are not found any more")
        self.assertEqual(missing, [], "no document says what is to be done about these")


class Claims(unittest.TestCase):
    def test_stand_where_they_are_claimed_and_have_their_tests(self):
        rows = re.findall(r'^\| "(.+)" \| (`.+`) \|$', (SOURCE / "docs/testing.md").read_text(), re.MULTILINE)
        self.assertGreater(len(rows), 25)
        claimed = re.sub(r"\s+", " ", (SOURCE / "README.md").read_text() + (SOURCE / "ARCHITECTURE.md").read_text())
        tests = set()
        for file in (SOURCE / "tests").rglob("*.cpp"):
            tests |= {f"{suite}.{name}" for suite, name in re.findall(r"\bTEST(?:_F|_P)?\((\w+),\s*(\w+)\)", file.read_text())}
        tests |= set(re.findall(r"add_test\(NAME ([\w.]+)", (SOURCE / "tests/torture/CMakeLists.txt").read_text()))
        for claim, names in rows:
            with self.subTest(claim=claim):
                self.assertTrue(claim in claimed, "it does not stand there")
                for name in re.findall(r"`([^`]+)`", names):
                    self.assertTrue(name in tests, f"there is no test {name}")


if __name__ == "__main__":
    unittest.main()
