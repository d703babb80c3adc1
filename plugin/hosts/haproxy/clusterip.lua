-- SPDX-License-Identifier: BSD-2-Clause
--
-- clusterip in HAProxy: what HAProxy itself connects to goes through the services of a file, in the kernel.
--
--     global
--         stats socket /run/haproxy/admin.sock level admin
--         setenv CLUSTERIP_FILE /etc/clusterip/clusterip.toml   # the services
--         setenv CLUSTERIP_CGROUP /sys/fs/cgroup/web            # whose connects; without it: those of HAProxy's own cgroup
--         setenv CLUSTERIP_PLUGIN libclusterip.so.1             # as dlopen finds it
--         lua-prepend-path /etc/haproxy/?.so cpath              # where clusterip_lua.so is
--         lua-load /etc/haproxy/clusterip.lua                   # not lua-load-per-thread: one handle, in one state of Lua
--
-- A reload of HAProxy itself has other values from there; a line that was taken out, it has as before: `unsetenv` in its place.
--
-- `show clusterip` on the admin socket shows the services, `clusterip reload` reads the file again, and
-- `http-request use-service lua.clusterip` serves what the first shows.
--
-- HAProxy runs this file while it reads its configuration: before it becomes a daemon, before a master forks its workers, and
-- for `haproxy -c`. A handle does not survive fork. So here the file is only judged; a start, or a reload of HAProxy itself,
-- tries whether there can be a fast path, and is refused otherwise; and the handle that serves is opened by a task, which runs
-- in the process that serves. That needs privileges there: HAProxy must not give them up (`user`, `group`, `chroot`).

if (core.thread or 0) ~= 0 then error("clusterip.lua: expected lua-load, got lua-load-per-thread", 0) end

local clusterip = require("clusterip_lua")
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

-- A handle with the services, not attached: whether this kernel and these privileges can carry them. Or nil, and why not.
local function prepared(text)
    local opened, why = clusterip.open(cgroup)
    if not opened then return nil, why end
    local done
    done, why = opened:load(text, file)
    if done then return opened end
    opened:close()
    return nil, why
end

-- Nil, or what is wrong.
local function start(text)
    local opened, why = prepared(text)
    if not opened then return why end
    local done
    done, why = opened:attach()
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
    if not handle then
        problem = start(text)
        return (problem or "reloaded") .. "\n"
    end
    local done, gone
    done, why = handle:load(text, file)
    if not done then return why .. "\n" end
    -- A load does not see that what was attached is gone.
    done, why, gone = handle:canary()
    if done then return "reloaded\n" end
    if not gone then return why .. "\n" end
    local before = why
    done, why = handle:attach()
    if done then done, why = handle:canary() end
    return done and before .. ": attached again, reloaded\n" or why .. "\n"
end

local function shown()
    if not handle then return problem .. "\n" end
    local services, why = handle:services()
    if not services then return why .. "\n" end
    local lines = {}
    for _, service in ipairs(services) do
        lines[#lines + 1] = string.format("service %s vip %s port %d protocol %s connects %d refused %d live %d\n", service.name, service.vip,
                                          service.port, service.protocol, service.connects, service.refused, service.live)
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

-- Not for `haproxy -c`, which may have neither the privileges nor the cgroup of what serves.
core.register_init(function()
    local trial, why = prepared(first)
    if not trial then error("clusterip: " .. why, 0) end
    trial:close()
end)
core.register_task(function()
    if handle then return end  -- somebody was quicker, and asked for a reload
    problem = start(first)
    if not problem then return end
    problem = problem .. " (HAProxy could when it started: do `user`, `group` or `chroot` take that away?)"
    core.Alert("clusterip: no VIP is reached: " .. problem)
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
