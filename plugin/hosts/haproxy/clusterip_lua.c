/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * The plugin for Lua 5.3, as HAProxy has it. A handle is an object of Lua, which ends with it:
 *
 *     local clusterip = require("clusterip")
 *     clusterip.use("libclusterip.so.1")             -- dlopen; an error when it cannot be used
 *     clusterip.check(text, name)                    -- nil, or the mistakes, a line each
 *     local handle = clusterip.open(cgroup)          -- nil: the process's own; each of these: nil and a message on failure
 *     handle:load(text, name)  handle:attach()  handle:close()
 *     handle:services()                              -- { { name=, vip=, port=, connects=, refused=, live=, backends={ ... } } }
 */
#define _GNU_SOURCE

#include <lauxlib.h>
#include <lua.h>

#include "clusterip_plugin.h"

#define HANDLE "clusterip.handle"

/* One for the process: the states of Lua share the libraries that are loaded anyway. */
static struct clusterip_plugin plugin;

static int failed(lua_State *state, const clusterip_error *error)
{
	lua_pushnil(state);
	lua_pushstring(state, error->message);
	return 2;
}

static int succeeded(lua_State *state)
{
	lua_pushboolean(state, 1);
	return 1;
}

static clusterip *handle_of(lua_State *state)
{
	clusterip **handle = luaL_checkudata(state, 1, HANDLE);

	luaL_argcheck(state, *handle, 1, "the handle is closed");
	return *handle;
}

static int use(lua_State *state)
{
	struct clusterip_plugin found;
	const char *why;

	if (plugin.library) return succeeded(state);
	why = clusterip_plugin_load(&found, luaL_checkstring(state, 1));
	if (why) {
		lua_pushstring(state, why);
		clusterip_plugin_unload(&found);
		return lua_error(state);
	}
	plugin = found;
	return succeeded(state);
}

struct mistakes {
	lua_State *state;
	const char *name;
};

static void on_mistake(const clusterip_error *mistake, void *user)
{
	struct mistakes *mistakes = user;

	lua_pushfstring(mistakes->state, "%s:%d:%d: %s\n", mistakes->name, (int)mistake->line, (int)mistake->column,
	                mistake->message);
	lua_concat(mistakes->state, 2);
}

static int check(lua_State *state)
{
	size_t length;
	const char *text = luaL_checklstring(state, 1, &length);
	struct mistakes mistakes = { state, luaL_checkstring(state, 2) };

	lua_pushliteral(state, "");
	if (plugin.check_text(text, length, mistakes.name, on_mistake, &mistakes) == 0) lua_pushnil(state);
	return 1;
}

static int open_handle(lua_State *state)
{
	clusterip_options options = { .size = sizeof options, .flags = CLUSTERIP_BACKGROUND };
	clusterip_error error = { .size = sizeof error };
	char own_cgroup[4096];
	clusterip **handle;

	options.cgroup_path = luaL_optstring(state, 1, NULL);
	if (!options.cgroup_path) {
		if (clusterip_own_cgroup(own_cgroup, sizeof own_cgroup)) return luaL_error(state, "no cgroup v2 here");
		options.cgroup_path = own_cgroup;
	}
	handle = lua_newuserdata(state, sizeof *handle);
	*handle = NULL;
	luaL_setmetatable(state, HANDLE);
	return plugin.open(&options, handle, &error) ? failed(state, &error) : 1;
}

static int load(lua_State *state)
{
	clusterip_error error = { .size = sizeof error };
	size_t length;
	const char *text = luaL_checklstring(state, 2, &length);

	return plugin.load_text(handle_of(state), text, length, luaL_checkstring(state, 3), &error) ? failed(state, &error)
	                                                                                           : succeeded(state);
}

static int attach(lua_State *state)
{
	clusterip_error error = { .size = sizeof error };
	clusterip *handle = handle_of(state);

	return plugin.attach(handle, &error) || plugin.canary(handle, NULL, &error) ? failed(state, &error) : succeeded(state);
}

static void set(lua_State *state, const char *name, uint64_t value)
{
	lua_pushinteger(state, (lua_Integer)value);
	lua_setfield(state, -2, name);
}

/* On the stack: the services, the last of them, its backends. */
static int on_visit(const clusterip_service_info *service, const clusterip_backend_info *backend, void *user)
{
	static const char *const states[] = { "active", "drain", "down" };
	lua_State *state = user;

	lua_newtable(state);
	if (!backend) {
		lua_pushstring(state, service->name);
		lua_setfield(state, -2, "name");
		lua_pushstring(state, service->vip);
		lua_setfield(state, -2, "vip");
		set(state, "port", service->port);
		set(state, "connects", service->connects);
		set(state, "refused", service->refused);
		set(state, "live", service->live);
		lua_newtable(state);
		lua_setfield(state, -2, "backends");
		lua_rawseti(state, -2, (lua_Integer)lua_rawlen(state, -2) + 1);
		return 0;
	}
	lua_pushstring(state, backend->address);
	lua_setfield(state, -2, "address");
	lua_pushstring(state, backend->state < 3 ? states[backend->state] : "unknown");
	lua_setfield(state, -2, "state");
	set(state, "port", backend->port);
	set(state, "weight", backend->weight);
	set(state, "connects", backend->connects);
	set(state, "failures", backend->failures);
	set(state, "live", backend->live);
	lua_rawgeti(state, -2, (lua_Integer)lua_rawlen(state, -2)); /* the service */
	lua_getfield(state, -1, "backends");
	lua_pushvalue(state, -3);
	lua_rawseti(state, -2, (lua_Integer)lua_rawlen(state, -2) + 1);
	lua_pop(state, 3);
	return 0;
}

static int services(lua_State *state)
{
	clusterip_error error = { .size = sizeof error };
	clusterip *handle = handle_of(state);

	luaL_checkstack(state, 8, NULL);
	lua_newtable(state);
	return plugin.visit_services(handle, on_visit, state, &error) ? failed(state, &error) : 1;
}

/* HAProxy ends its states of Lua when it ends: the handle with them. */
static int close_handle(lua_State *state)
{
	clusterip **handle = luaL_checkudata(state, 1, HANDLE);

	if (*handle) {
		plugin.detach(*handle, NULL);
		plugin.close(*handle);
	}
	*handle = NULL;
	return 0;
}

int luaopen_clusterip(lua_State *state)
{
	static const luaL_Reg functions[] = { { "use", use }, { "check", check }, { "open", open_handle }, { NULL, NULL } };
	static const luaL_Reg methods[] = { { "load", load },         { "attach", attach },     { "services", services },
		                                { "close", close_handle }, { "__gc", close_handle }, { NULL, NULL } };

	luaL_newmetatable(state, HANDLE);
	lua_pushvalue(state, -1);
	lua_setfield(state, -2, "__index");
	luaL_setfuncs(state, methods, 0);
	luaL_newlib(state, functions);
	return 1;
}
