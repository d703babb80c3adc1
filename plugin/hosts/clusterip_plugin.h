/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * The plugin by dlopen: what each host in this directory shares, to be copied with it. Linking -lclusterip does as well; a
 * host that loads it at run time starts without it, too, and says what is missing.
 */
#ifndef CLUSTERIP_PLUGIN_H
#define CLUSTERIP_PLUGIN_H

#include <dlfcn.h>
#include <mntent.h>
#include <stdio.h>
#include <string.h>

#include <clusterip.h>

/* The functions that these hosts call. A host that calls others adds their names. */
#define CLUSTERIP_FUNCTIONS(X) \
	X(abi_version) X(version_string) X(check_text) X(open) X(load_text) X(attach) X(detach) X(canary) \
	X(visit_services) X(event_fd) X(read_events) X(close)

/* The names without their prefix; types come from the header, so that a call is checked as any other is. */
struct clusterip_plugin {
	void *library;
#define CLUSTERIP_MEMBER(name) __typeof__(clusterip_##name) *name;
	CLUSTERIP_FUNCTIONS(CLUSTERIP_MEMBER)
#undef CLUSTERIP_MEMBER
};

/* NULL, or why the library at this path (or of this name, as dlopen finds it) cannot be used. */
static const char *clusterip_plugin_load(struct clusterip_plugin *ret, const char *path)
{
	void *address;

	memset(ret, 0, sizeof *ret);
	ret->library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
	if (!ret->library) return dlerror();
	/* ISO C converts no object pointer to a function pointer; POSIX has both of the same bits. */
#define CLUSTERIP_FIND(name)                                     \
	address = dlsym(ret->library, "clusterip_" #name);           \
	if (!address) return dlerror();                              \
	memcpy(&ret->name, &address, sizeof address);
	CLUSTERIP_FUNCTIONS(CLUSTERIP_FIND)
#undef CLUSTERIP_FIND
	/* Within a major version the library only grows: a newer one serves a host that was compiled for an older one. */
	if (ret->abi_version() >> 16 != CLUSTERIP_ABI_MAJOR) return "the library has another major version of the ABI";
	return NULL;
}

static void clusterip_plugin_unload(struct clusterip_plugin *plugin)
{
	if (plugin->library) dlclose(plugin->library);
	memset(plugin, 0, sizeof *plugin);
}

/*
 * The directory of the cgroup v2 that this process is in: what a host attaches to that wants its own connects rewritten and
 * nobody else's. 0, or -1 when there is no such hierarchy.
 */
static int clusterip_own_cgroup(char *ret, size_t size)
{
	struct mntent *mount;
	char line[4096], *path = NULL;
	FILE *file = fopen("/proc/self/cgroup", "re");

	while (file && !path && fgets(line, sizeof line, file))
		if (strncmp(line, "0::", 3) == 0) path = strtok(line + 3, "\n");
	if (file) fclose(file);
	file = setmntent("/proc/self/mounts", "re");
	while (file && (mount = getmntent(file))) {
		if (!path || strcmp(mount->mnt_type, "cgroup2") != 0) continue;
		int length = snprintf(ret, size, "%s%s", mount->mnt_dir, path);
		endmntent(file);
		return length < 0 || (size_t)length >= size ? -1 : 0;
	}
	if (file) endmntent(file);
	return -1;
}

#endif
