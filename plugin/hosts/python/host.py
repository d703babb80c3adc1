#!/usr/bin/python3
# SPDX-License-Identifier: BSD-2-Clause
"""A host in another language, by the C ABI alone: host.py PLUGIN FILE [CGROUP], as ../c/host.c, which explains each step."""

import ctypes
import errno
import os
import pathlib
import signal
import stat
import sys
from ctypes import CFUNCTYPE, POINTER, byref, c_char, c_char_p, c_int, c_int32, c_size_t, c_uint32, c_void_p

ABI_MAJOR = 1
BACKGROUND = 4
FILE_LIMIT = 16 << 20


class Error(ctypes.Structure):
    _fields_ = [("size", c_size_t), ("code", c_int32), ("line", c_uint32), ("column", c_uint32), ("reserved", c_uint32),
                ("message", c_char * 512)]

    def __init__(self):
        super().__init__(size=ctypes.sizeof(Error))


class Options(ctypes.Structure):
    _fields_ = [("size", c_size_t), ("cgroup_path", c_char_p), ("pin_path", c_char_p), ("flags", c_uint32),
                ("reserved", c_uint32)]


OnMistake = CFUNCTYPE(None, POINTER(Error), c_void_p)


class Failed(Exception):
    def __init__(self, message, code=0):
        super().__init__(message)
        self.code = code


class Host:
    def __init__(self, plugin, cgroup):
        self.library = ctypes.CDLL(plugin)
        self.library.clusterip_abi_version.restype = c_uint32
        if (major := self.library.clusterip_abi_version() >> 16) != ABI_MAJOR:
            raise Failed(f"{plugin}: expected major version {ABI_MAJOR} of the ABI, got {major}")
        # Handles are pointers: without argument types ctypes would pass them as int.
        self.library.clusterip_check_text.argtypes = [c_char_p, c_size_t, c_char_p, OnMistake, c_void_p]
        self.library.clusterip_load_text.argtypes = [c_void_p, c_char_p, c_size_t, c_char_p, POINTER(Error)]
        self.library.clusterip_close.argtypes = [c_void_p]
        self.library.clusterip_close.restype = None
        self.handle = c_void_p()
        options = Options(ctypes.sizeof(Options), os.fsencode(cgroup), None, BACKGROUND, 0)
        self.call("open", byref(options), byref(self.handle))

    def call(self, name, *arguments):
        error = Error()
        if (code := getattr(self.library, "clusterip_" + name)(*arguments, byref(error))) != 0:
            raise Failed(f"{name}: {error.message.decode(errors='replace')}", code)

    def load(self, path):
        text, name, mistakes = read_file(path), os.fsencode(path), []

        def on_mistake(mistake, _):
            seen = mistake.contents
            mistakes.append(f"{path}:{seen.line}:{seen.column}: {seen.message.decode(errors='replace')}")

        if self.library.clusterip_check_text(text, len(text), name, OnMistake(on_mistake), None) != 0:
            raise Failed("\n".join(mistakes))
        self.call("load_text", self.handle, text, len(text), name)

    def attach(self):
        self.call("attach", self.handle)

    def prove(self):
        """A load does not see that somebody has detached it, or that its cgroup was made again: this does, and mends it."""
        try:
            self.call("canary", self.handle, None)
        except Failed as failed:
            if failed.code != -errno.ENOTCONN:
                raise
            print(failed, file=sys.stderr, flush=True)
            self.attach()
            self.call("canary", self.handle, None)

    def end(self):
        self.call("detach", self.handle)
        self.library.clusterip_close(self.handle)


def read_file(path):
    """All of it. Nothing is opened that waits, as a FIFO does, and nothing read that has no end."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOCTTY | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise Failed(f"{path}: expected a regular file")
        if len(text := file.read(FILE_LIMIT + 1)) > FILE_LIMIT:
            raise Failed(f"{path}: expected at most {FILE_LIMIT >> 20} MiB, got more")
        return text


def own_cgroup():
    mounts = (line.split() for line in pathlib.Path("/proc/self/mounts").read_text().splitlines())
    mount = next((fields[1] for fields in mounts if fields[2] == "cgroup2"), None)
    lines = pathlib.Path("/proc/self/cgroup").read_text().splitlines()
    path = next((line[3:] for line in lines if line.startswith("0::")), None)
    if mount is None or path is None:
        raise Failed("no cgroup v2 here")
    if path == "/" and not os.path.exists(mount + "/cgroup.type"):  # that of the whole machine, and no namespace's
        raise Failed("this process is in the root cgroup: name one")
    return mount + path


def main(plugin, path, cgroup=None):
    signals = {signal.SIGHUP, signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    cgroup = cgroup or own_cgroup()
    host = Host(plugin, cgroup)
    host.load(path)
    host.attach()
    host.prove()
    print(f"attached to {cgroup}", flush=True)
    while signal.sigwait(signals) == signal.SIGHUP:
        try:
            host.load(path)
            host.prove()
            print("reloaded", flush=True)
        except (Failed, OSError) as failed:
            print(failed, file=sys.stderr, flush=True)
    host.end()


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        print("usage: host.py PLUGIN FILE [CGROUP]", file=sys.stderr)
        sys.exit(2)
    try:
        main(*sys.argv[1:])
    except (Failed, OSError, AttributeError) as failed:  # the last: a library without a function
        sys.exit(f"host.py: {failed}")
