# SPDX-License-Identifier: BSD-2-Clause
"""The module for Lua without HAProxy, above all when Lua's memory runs out: its errors are longjmp, and none may pass through the
library, or lose what C has. Lua runs in this process, by ctypes, with an allocator that fails from any one allocation on."""

import ctypes
import os
import pathlib
import resource
import unittest
from ctypes import CFUNCTYPE, c_char_p, c_int, c_size_t, c_ssize_t, c_void_p

import stage

MODULE = stage.BUILD / "plugin/hosts/haproxy/clusterip_lua.so"
OK = 0

Allocate = CFUNCTYPE(c_void_p, c_void_p, c_void_p, c_size_t, c_size_t)


class Lua:
    def __init__(self):
        self.library = ctypes.CDLL("liblua5.3.so.0", mode=ctypes.RTLD_GLOBAL)  # the module has its functions from there
        self.libc = ctypes.CDLL(None)
        self.libc.realloc.argtypes, self.libc.realloc.restype = [c_void_p, c_size_t], c_void_p
        self.libc.free.argtypes = [c_void_p]
        self.library.lua_newstate.restype = c_void_p
        self.library.lua_tolstring.argtypes, self.library.lua_tolstring.restype = [c_void_p, c_int, c_void_p], c_char_p
        self.library.lua_pcallk.argtypes = [c_void_p, c_int, c_int, c_int, c_ssize_t, c_void_p]
        for name in ("luaL_loadstring", "lua_getglobal"):
            getattr(self.library, name).argtypes = [c_void_p, c_char_p]
        for name in ("luaL_openlibs", "lua_close"):
            getattr(self.library, name).argtypes = [c_void_p]
        self.library.lua_settop.argtypes = [c_void_p, c_int]
        self.left = None  # allocations until there is no memory; None: there always is
        self.allocate = Allocate(self.allocate)
        self.state = c_void_p(self.library.lua_newstate(self.allocate, None))
        self.library.luaL_openlibs(self.state)

    def allocate(self, _, block, old, new):
        if new == 0:
            self.libc.free(block)
            return None
        if self.left is not None and (not block or new > old):
            if self.left == 0:
                return None
            self.left -= 1
        return self.libc.realloc(block, new)

    def run(self, text):
        if self.library.luaL_loadstring(self.state, text.encode()) != OK or self.call_top() != OK:
            raise AssertionError(self.message())

    def call(self, function, allocations=None):
        """How a global function ends, with so much memory."""
        self.library.lua_settop(self.state, 0)
        self.library.lua_getglobal(self.state, function.encode())
        self.left = allocations
        status = self.call_top()
        self.left = None
        return status

    def call_top(self):
        return self.library.lua_pcallk(self.state, 0, 1, 0, 0, None)

    def message(self):
        return (self.library.lua_tolstring(self.state, -1, None) or b"").decode()

    def close(self):
        self.library.lua_close(self.state)


class Module(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        stage.set_up(cls)

    def setUp(self):
        self.file = self.directory.write("services.toml", stage.services(backend1=1, backend2=3))
        self.lua = Lua()
        self.lua.run(f"""
            package.cpath = "{MODULE.parent}/?.so"
            clusterip = require("clusterip_lua")
            clusterip.use("{stage.PLUGIN}")
            function open() handle = clusterip.open("{self.cgroup.path}") return tostring(handle ~= nil) end
            function load()
                text = assert(clusterip.read("{self.file}"))
                assert(handle:load(text, "services.toml"))
            end
            function attach() assert(handle:attach()) assert(handle:canary()) end
            function read() return clusterip.read("{self.file}") end
            function check() return clusterip.check("mode = 1\\nvip = 2\\n", "services.toml") end
            function refuse() return (select(2, handle:load("mode = 1", "services.toml"))) end
            function services()
                local service = handle:services()[1]
                return service.name .. " " .. service.backends[2].address .. " " .. #service.backends
            end
            function use_another() clusterip.use("/another.so") end
            function use_again() return tostring(clusterip.use("{stage.PLUGIN}")) end
            function close() if handle then handle:close() end handle = nil collectgarbage() end""")
        self.addCleanup(self.lua.close)
        self.addCleanup(self.lua.call, "close")

    def succeeds(self, function):
        self.assertEqual(self.lua.call(function), OK, self.lua.message())

    def fails_at_each_allocation(self, function):
        """Until there are enough. How many that are."""
        for allocations in range(1000):
            self.lua.call("collectgarbage")  # what was there is asked for again
            status = self.lua.call(function, allocations)
            if status == OK:
                return allocations
            self.assertEqual(self.lua.message(), "not enough memory")
        raise AssertionError("it never succeeds")

    def test_another_plugin_is_refused_while_one_is_in_use(self):
        self.assertNotEqual(self.lua.call("use_another"), OK)
        self.assertRegex(self.lua.message(), f"/another.so: another one is in use: {stage.PLUGIN}$")
        self.succeeds("use_again")
        self.assertEqual(self.lua.message(), "true")

    def test_without_memory_each_call_ends_with_an_error_of_lua_and_works_when_there_is_memory(self):
        self.assertGreater(self.fails_at_each_allocation("open"), 0)
        self.assertEqual(self.lua.message(), "true")
        self.succeeds("load")
        self.succeeds("attach")
        for function, least, result in (("read", 1, pathlib.Path(self.file).read_text()),
                                        ("check", 1, "services.toml:1:1: mode: "),
                                        ("refuse", 1, "services.toml:1:1: mode: "),
                                        ("services", 10, "web 127.0.1.2 2")):
            with self.subTest(function):
                self.assertGreaterEqual(self.fails_at_each_allocation(function), least)
                self.assertTrue(self.lua.message().startswith(result), self.lua.message())
        self.assertIn("sock4_connect", "".join(self.cgroup.attached()))
        self.succeeds("close")
        self.assertEqual((self.cgroup.attached(), stage.bpf_ids(os.getpid())), ([], set()))

    def test_what_c_has_is_freed(self):
        self.directory.write("services.toml", stage.many_services(1000))
        self.succeeds("open")
        self.succeeds("load")
        rows = 1000 * 2 * 350  # bytes, of a visit of each service and backend
        turns = 100
        for _ in range(3):  # what the heap is from now on
            self.assertNotEqual(self.lua.call("services", 1), OK)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(turns):
            self.assertNotEqual(self.lua.call("services", 1), OK)
            self.assertNotEqual(self.lua.call("read", 1), OK)
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        self.assertLess(grown, turns * rows / 4)


if __name__ == "__main__":
    unittest.main()
