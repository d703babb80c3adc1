# SPDX-License-Identifier: BSD-2-Clause
"""Whether a hot path has become longer: instructions of user space as callgrind counts them, and of each BPF program, compared
with what recorded.json has. No clock is asked, so a loaded machine changes nothing.

    compare.py WORK [--record]

WORK is the program `instructions_work` of the preset `ci`, whose compiler options the record is made for. --record writes what is
found; a commit that does so says why. Exit status: 0; 1 when something is longer, or shorter, than the tolerance allows: then the
record is to be made anew, so that the next change is compared with what there is.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile

RECORD = pathlib.Path(__file__).with_name("recorded.json")
PATHS = ["path_read_config", "path_encode", "path_encode_maglev", "path_choose_random", "path_choose_round_robin",
         "path_choose_least_conn", "path_choose_maglev"]  # of work.cpp


def counted(work):
    """Instructions by path: those that callgrind writes out each time a path has ended, and the programs' lengths."""
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            ["valgrind", "--tool=callgrind", "--collect-atstart=no", "--toggle-collect=path_*",
             *(f"--dump-after={path}" for path in PATHS), f"--callgrind-out-file={directory}/out", work], text=True, capture_output=True, check=False)
        if done.returncode != 0:
            sys.exit(f"compare.py: {work}: exit {done.returncode}\n{done.stderr[-2000:]}")
        for file in sorted(pathlib.Path(directory).glob("out.*")):
            text = file.read_text()
            trigger = re.search(r"^desc: Trigger: --dump-after=(path_\w+)", text, re.M)
            if trigger:
                count = int(re.search(r"^(?:summary|totals): (\d+)", text, re.M)[1])
                found[trigger[1]] = found.get(trigger[1], 0) + count
    lengths = subprocess.run([work, "--bpf"], text=True, capture_output=True, check=True).stdout
    found |= {f"bpf {name}": int(count) for name, count in (line.split() for line in lengths.splitlines())}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", metavar="WORK")
    parser.add_argument("--record", action="store_true")
    given = parser.parse_args()
    work = given.work
    found = counted(work)
    if given.record:
        record = {"tolerance": 0.03, "instructions": found}
        RECORD.write_text(json.dumps(record, indent=2) + "\n")
        return 0
    record = json.loads(RECORD.read_text())
    before, tolerance = record["instructions"], record["tolerance"]
    wrong = []
    print(f"{'':34}{'recorded':>14}{'now':>14}{'ratio':>9}")
    for path in sorted(before | found):
        old, new = before.get(path), found.get(path)
        ratio = new / old if old and new else None
        verdict = "" if ratio and abs(ratio - 1) <= tolerance else \
            "  NOT RECORDED" if old is None else "  GONE" if new is None else "  LONGER" if ratio > 1 else "  SHORTER: record it"
        print(f"{path:34}{old or '':>14}{new or '':>14}{ratio or 0:>9.3f}{verdict}")
        if verdict:
            wrong.append(path)
    if wrong:
        print(f"\nnot within {tolerance:.0%}: {', '.join(wrong)}\nif that is meant: {sys.argv[0]} {work} --record")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
