/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * The plugin by dlopen: what each host in this directory shares, to be copied with it. Linking -lclusterip does as well; a
 * host that loads it at run time starts without it, too, and says what is missing.
 */
#ifndef CLUSTERIP_PLUGIN_H
#define CLUSTERIP_PLUGIN_H

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <mntent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

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

/* NULL, or why the library at this path (or of this name, as dlopen finds it) cannot be used; valid until the next call. */
static const char *clusterip_plugin_load(struct clusterip_plugin *ret, const char *path)
{
	static char other[512];
	unsigned major;
	void *address;

	memset(ret, 0, sizeof *ret);
	ret->library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
	if (!ret->library) return dlerror();
	/* ISO C converts no object pointer to a function pointer; POSIX has both of the same bits. */
#define CLUSTERIP_FIND(name)                                     \
	address = dlsym(ret->library, "clusterip_" #name);           \
	if (!address) return dlerror();                              \
	memcpy(&ret->name, &address, sizeof address);
	/* Within a major version the library only grows: a newer one serves a host that was compiled for an older one. */
	CLUSTERIP_FIND(abi_version)
	major = ret->abi_version() >> 16;
	if (major != CLUSTERIP_ABI_MAJOR) {
		snprintf(other, sizeof other, "%s: expected major version %u of the ABI, got %u", path, CLUSTERIP_ABI_MAJOR, major);
		return other;
	}
	CLUSTERIP_FUNCTIONS(CLUSTERIP_FIND)
#undef CLUSTERIP_FIND
	return NULL;
}

static void clusterip_plugin_unload(struct clusterip_plugin *plugin)
{
	if (plugin->library) dlclose(plugin->library);
	memset(plugin, 0, sizeof *plugin);
}

/*
 * The directory of the cgroup v2 that this process is in: what a host attaches to that wants its own connects rewritten and
 * nobody else's. NULL, or why there is none.
 */
static const char *clusterip_own_cgroup(char *ret, size_t size)
{
	struct mntent *mount;
	char line[4096], type[4096], *path = NULL;
	FILE *file = fopen("/proc/self/cgroup", "re");

	while (file && !path && fgets(line, sizeof line, file))
		if (strncmp(line, "0::", 3) == 0) path = strtok(line + 3, "\n");
	if (file) fclose(file);
	file = setmntent("/proc/self/mounts", "re");
	while (file && (mount = getmntent(file))) {
		if (!path || strcmp(mount->mnt_type, "cgroup2") != 0) continue;
		int length = snprintf(ret, size, "%s%s", mount->mnt_dir, path);
		int type_length = snprintf(type, sizeof type, "%s/cgroup.type", mount->mnt_dir);
		endmntent(file);
		if (length < 0 || (size_t)length >= size || type_length < 0 || (size_t)type_length >= sizeof type)
			return "the path of this process's cgroup is too long";
		/* That of the whole machine. A namespace's root has this file, and no more than the namespace in it. */
		if (strcmp(path, "/") == 0 && access(type, F_OK) != 0) return "this process is in the root cgroup: name one";
		return NULL;
	}
	if (file) endmntent(file);
	return "no cgroup v2 here";
}

/*
 * All of a file of at most so many MiB, for free(), and its length; or NULL, and why. A host has other things to do meanwhile: nothing is opened that
 * waits, as a FIFO does, and nothing read that has no end.
 */
static char *clusterip_read_file(const char *path, unsigned mebibytes, size_t *length, const char **why)
{
	const size_t limit = (size_t)mebibytes << 20;
	int file = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
	struct stat status;
	char *text = NULL;
	ssize_t got = 1;

	*length = 0;
	*why = NULL;
	if (file < 0 || fstat(file, &status) != 0)
		*why = strerror(errno);
	else if (!S_ISREG(status.st_mode))
		*why = "expected a regular file";
	else if (!(text = malloc(limit + 1))) /* what is not written to costs nothing */
		*why = strerror(errno);
	while (!*why && got != 0) {
		got = read(file, text + *length, limit + 1 - *length);
		if (got < 0 && errno != EINTR) *why = strerror(errno);
		if (got > 0) *length += (size_t)got;
		if (*length > limit) *why = "the file is larger than this host takes";
	}
	if (file >= 0) close(file);
	if (!*why) return text;
	free(text);
	return NULL;
}

#endif
