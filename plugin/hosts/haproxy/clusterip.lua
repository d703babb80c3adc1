-- SPDX-License-Identifier: BSD-2-Clause
--
-- clusterip in HAProxy: what HAProxy itself connects to goes through the services of a file, in the kernel.
--
--     global
--         stats socket /run/haproxy/admin.sock level admin
--         setenv CLUSTERIP_FILE /etc/clusterip/clusterip.toml   # the services
--         setenv CLUSTERIP_CGROUP /sys/fs/cgroup/web            # whose connects; without it: those of HAProxy's own cgroup
--         setenv CLUSTERIP_PLUGIN libclusterip.so.1             # as dlopen finds it
--         lua-prepend-path /usr/lib/x86_64-linux-gnu/lua/5.3/?.so cpath
--         lua-load /etc/haproxy/clusterip.lua
--
-- `show clusterip` on the admin socket shows the services, `clusterip reload` reads the file again, and
-- `http-request use-service lua.clusterip` serves what the first shows.
--
-- HAProxy runs this file while it reads its configuration: before it becomes a daemon, before a master forks its workers, and
-- for `haproxy -c`. A handle does not survive fork. So here the file is only judged, and the handle is opened by a task, which
-- runs in the process that serves. That needs privileges there: HAProxy must not give them up (`user`, `group`, `chroot`).

local clusterip = require("clusterip")
local file = os.getenv("CLUSTERIP_FILE") or "/etc/clusterip/clusterip.toml"
local cgroup = os.getenv("CLUSTERIP_CGROUP")
local handle, problem = nil, "not attached yet"

-- The text of the file, which has no mistake; or nil, and what is wrong.
local function judged()
    local text, why = clusterip.read(file)
    if not text then return nil, why .. "\n" end
    local mistakes = clusterip.check(text, file)
    if mistakes then return nil, mistakes end
    return text
end

local function start(text)
    local opened, why = clusterip.open(cgroup)
    if not opened then return why end
    local done
    done, why = opened:load(text, file)
    if done then done, why = opened:attach() end
    if done then done, why = opened:canary() end
    if not done then
        opened:close()
        return why
    end
    handle = opened
end

-- All of the file, or nothing of it: what has served serves on when this fails.
local function reload()
    local text, why = judged()
    if not text then return why end
    local done
    if handle then
        done, why = handle:load(text, file)
        if done then done, why = handle:canary() end  -- a load does not see that what was attached is gone
    else
        problem = start(text)
        done, why = not problem, problem
    end
    return done and "reloaded\n" or why .. "\n"
end

local function shown()
    if not handle then return problem .. "\n" end
    local lines = {}
    for _, service in ipairs(handle:services()) do
        lines[#lines + 1] = string.format("service %s vip %s port %d connects %d refused %d live %d\n", service.name, service.vip,
                                          service.port, service.connects, service.refused, service.live)
        for _, backend in ipairs(service.backends) do
            lines[#lines + 1] = string.format("  backend %s port %d weight %d state %s connects %d failures %d live %d\n",
                                              backend.address, backend.port, backend.weight, backend.state, backend.connects,
                                              backend.failures, backend.live)
        end
    end
    return table.concat(lines)
end

clusterip.use(os.getenv("CLUSTERIP_PLUGIN") or "libclusterip.so.1")
local first, mistakes = judged()
if not first then error("\n" .. mistakes) end  -- refuses the configuration: `haproxy -c`, a start, a reload

core.register_task(function()
    if handle then return end  -- somebody was quicker, and asked for a reload
    problem = start(first)
    if problem then core.Alert("clusterip: " .. problem) end
end)
core.register_cli({"show", "clusterip"}, "show clusterip : services, with counters", function(applet) applet:send(shown()) end)
-- Not "reload clusterip": a command that begins with "reload" is the master's.
core.register_cli({"clusterip", "reload"}, "clusterip reload : read the services again", function(applet) applet:send(reload()) end)
core.register_service("clusterip", "http", function(applet)
    local text = shown()
    applet:set_status(handle and 200 or 503)
    applet:add_header("content-type", "text/plain")
    applet:add_header("content-length", tostring(#text))
    applet:start_response()
    applet:send(text)
end)
