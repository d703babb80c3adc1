/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * The plugin for Lua 5.3, as HAProxy has it. A handle is an object of Lua, which ends with it:
 *
 *     local clusterip = require("clusterip_lua")
 *     clusterip.use("libclusterip.so.1")             -- dlopen; an error when it cannot be used, or another one is in use
 *     clusterip.read(path)                           -- the text of a file, or nil and why
 *     clusterip.check(text, name)                    -- nil, or the mistakes, a line each
 *     local handle = clusterip.open(cgroup)          -- nil: the process's own; each of these: nil and a message on failure
 *     handle:load(text, name)  handle:attach()  handle:close()
 *     handle:canary()                                -- on failure a third value: whether what was attached is gone
 *     handle:services()                              -- { { name=, vip=, port=, protocol=, connects=, refused=, live=, backends={ ... } } }
 */
#define _GNU_SOURCE

#include <lauxlib.h>
#include <lua.h>
#include <netinet/in.h>

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
	static char used[4096];
	const char *path = luaL_checkstring(state, 1), *why;
	struct clusterip_plugin found;

	if (plugin.library && strcmp(path, used) == 0) return succeeded(state);
	if (plugin.library) return luaL_error(state, "%s: another one is in use: %s", path, used);
	luaL_argcheck(state, strlen(path) < sizeof used, 1, "the path is too long");
	why = clusterip_plugin_load(&found, path);
	if (why) {
		lua_pushstring(state, why);
		clusterip_plugin_unload(&found);
		return lua_error(state);
	}
	plugin = found;
	strcpy(used, path);
	return succeeded(state);
}

/*
 * Errors of Lua, such as one of its memory, are longjmp: none may pass through the library, nor past a free(). So visitors write
 * to C memory, and Lua gets that afterwards. `block` is from malloc() and freed here, whatever becomes of make().
 */
static int give(lua_State *state, lua_CFunction make, void *from, void *block)
{
	int code;

	lua_pushcfunction(state, make);
	lua_pushlightuserdata(state, from);
	code = lua_pcall(state, 1, 1, 0);
	free(block);
	return code == LUA_OK ? 1 : lua_error(state);
}

struct text {
	char *at;
	size_t length;
	const char *name;
	int incomplete;
};

static int make_string(lua_State *state)
{
	struct text *text = lua_touserdata(state, 1);

	lua_pushlstring(state, text->at, text->length);
	return 1;
}

static int read_file(lua_State *state)
{
	const char *path = luaL_checkstring(state, 1), *why;
	struct text text = { 0 };

	/* The library reads it on HAProxy's event loop, and HAProxy's watchdog ends a process whose thread is busy for two seconds. */
	text.at = clusterip_read_file(path, 4, &text.length, &why);
	if (text.at) return give(state, make_string, &text, text.at);
	lua_pushnil(state);
	lua_pushfstring(state, "%s: %s", path, why);
	return 2;
}

static void on_mistake(const clusterip_error *mistake, void *user)
{
	struct text *text = user;
	char line[sizeof mistake->message + 4160];
	int length = snprintf(line, sizeof line, "%.4095s:%u:%u: %s\n", text->name, mistake->line, mistake->column, mistake->message);
	char *larger = length < 0 ? NULL : realloc(text->at, text->length + (size_t)length);

	if (!larger) {
		text->incomplete = 1;
		return;
	}
	text->at = larger;
	memcpy(text->at + text->length, line, (size_t)length);
	text->length += (size_t)length;
}

static int check(lua_State *state)
{
	size_t length;
	const char *toml = luaL_checklstring(state, 1, &length);
	struct text mistakes = { .name = luaL_checkstring(state, 2) };

	if (plugin.check_text(toml, length, mistakes.name, on_mistake, &mistakes) == 0) {
		lua_pushnil(state);
		return 1;
	}
	if (!mistakes.incomplete) return give(state, make_string, &mistakes, mistakes.at);
	free(mistakes.at);
	return luaL_error(state, "not enough memory for the mistakes");
}

static int open_handle(lua_State *state)
{
	clusterip_options options = { .size = sizeof options, .flags = CLUSTERIP_BACKGROUND };
	clusterip_error error = { .size = sizeof error };
	char own_cgroup[4096];
	clusterip **handle;
	const char *why;

	options.cgroup_path = luaL_optstring(state, 1, NULL);
	if (!options.cgroup_path) {
		why = clusterip_own_cgroup(own_cgroup, sizeof own_cgroup);
		if (why) {
			lua_pushnil(state);
			lua_pushstring(state, why);
			return 2;
		}
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

	return plugin.attach(handle_of(state), &error) ? failed(state, &error) : succeeded(state);
}

static int canary(lua_State *state)
{
	clusterip_error error = { .size = sizeof error };
	int code = plugin.canary(handle_of(state), NULL, &error);

	if (!code) return succeeded(state);
	failed(state, &error);
	lua_pushboolean(state, code == -ENOTCONN);
	return 3;
}

/* A visit, with what belongs to it copied. */
struct row {
	int is_backend;
	uint16_t port;
	uint32_t weight, state;
	uint64_t connects, failed, live;
	const char *protocol;
	char name[160], address[160]; /* names as long as clusterip_event has them */
};

struct rows {
	struct row *at;
	size_t count, room;
};

static int on_visit(const clusterip_service_info *service, const clusterip_backend_info *backend, void *user)
{
	struct rows *rows = user;
	struct row *row;

	if (rows->count == rows->room) {
		rows->room = 2 * rows->room + 64;
		row = realloc(rows->at, rows->room * sizeof *row);
		if (!row) return -ENOMEM;
		rows->at = row;
	}
	row = &rows->at[rows->count++];
	memset(row, 0, sizeof *row);
	row->is_backend = backend != NULL;
	row->port = backend ? backend->port : service->port;
	row->connects = backend ? backend->connects : service->connects;
	row->failed = backend ? backend->failures : service->refused;
	row->live = backend ? backend->live : service->live;
	snprintf(row->address, sizeof row->address, "%s", backend ? backend->address : service->vip);
	if (backend) {
		row->weight = backend->weight;
		row->state = backend->state;
	} else {
		row->protocol = service->protocol == IPPROTO_UDP ? "udp" : "tcp";
		snprintf(row->name, sizeof row->name, "%s", service->name);
	}
	return 0;
}

static void set(lua_State *state, const char *name, uint64_t value)
{
	lua_pushinteger(state, (lua_Integer)value);
	lua_setfield(state, -2, name);
}

static int make_services(lua_State *state)
{
	static const char *const states[] = { "active", "drain", "down" };
	const struct rows *rows = lua_touserdata(state, 1);
	lua_Integer service_count = 0, backend_count = 0;

	luaL_checkstack(state, 8, NULL);
	lua_newtable(state); /* the services */
	lua_pushnil(state);  /* the last one's backends */
	for (const struct row *row = rows->at; row < rows->at + rows->count; ++row) {
		lua_newtable(state);
		set(state, "port", row->port);
		set(state, "connects", row->connects);
		set(state, "live", row->live);
		set(state, row->is_backend ? "failures" : "refused", row->failed);
		lua_pushstring(state, row->address);
		lua_setfield(state, -2, row->is_backend ? "address" : "vip");
		if (row->is_backend) {
			set(state, "weight", row->weight);
			lua_pushstring(state, row->state < 3 ? states[row->state] : "unknown");
			lua_setfield(state, -2, "state");
			lua_rawseti(state, -2, ++backend_count);
			continue;
		}
		lua_pushstring(state, row->name);
		lua_setfield(state, -2, "name");
		lua_pushstring(state, row->protocol);
		lua_setfield(state, -2, "protocol");
		backend_count = 0;
		lua_newtable(state);
		lua_replace(state, -3);
		lua_pushvalue(state, -2);
		lua_setfield(state, -2, "backends");
		lua_rawseti(state, -3, ++service_count);
	}
	lua_pop(state, 1);
	return 1;
}

static int services(lua_State *state)
{
	clusterip_error error = { .size = sizeof error };
	clusterip *handle = handle_of(state);
	struct rows rows = { NULL, 0, 0 };
	int code = plugin.visit_services(handle, on_visit, &rows, &error);

	if (code == 0) return give(state, make_services, &rows, rows.at);
	free(rows.at);
	if (code == -ENOMEM) return luaL_error(state, "not enough memory for the services");
	return failed(state, &error);
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

int luaopen_clusterip_lua(lua_State *state)
{
	static const luaL_Reg functions[] = {
		{ "use", use }, { "read", read_file }, { "check", check }, { "open", open_handle }, { NULL, NULL }
	};
	static const luaL_Reg methods[] = { { "load", load },         { "attach", attach },      { "canary", canary },
		                                { "services", services }, { "close", close_handle }, { "__gc", close_handle },
		                                { NULL, NULL } };

	luaL_newmetatable(state, HANDLE);
	lua_pushvalue(state, -1);
	lua_setfield(state, -2, "__index");
	luaL_setfuncs(state, methods, 0);
	luaL_newlib(state, functions);
	return 1;
}
