/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * The least that a host does, to be read from main() on: host PLUGIN FILE [CGROUP]. Connects of processes in CGROUP (without
 * it: in the host's own) go to the services of FILE until it gets SIGTERM or SIGINT; SIGHUP reads FILE again. Each decision
 * of the kernel is a line on stdout, each mistake one on stderr. What a proxy does beside is its own.
 */
#define _GNU_SOURCE

#include <poll.h>
#include <signal.h>
#include <sys/signalfd.h>

#include "clusterip_plugin.h"

enum { EVENT_SECONDS = 60 };

static struct clusterip_plugin plugin;

static int fail(const char *step, const clusterip_error *error)
{
	fprintf(stderr, "host: %s: %s\n", step, error->message);
	return 1;
}

/* One event for each connect() to a VIP. The structs grow at the end: what this host was compiled with is there. */
static int on_event(const clusterip_event *event, void *user)
{
	(void)user;
	/* A port that no service has; and what the canary tries after each load. */
	if (!event->service[0] || event->service[0] == '(') return 0;
	printf("%s pid %u: %s\n", event->service, event->pid,
	       event->verdict == CLUSTERIP_VERDICT_REWRITTEN ? "rewritten" : "not rewritten");
	return 0;
}

static void on_mistake(const clusterip_error *mistake, void *path)
{
	fprintf(stderr, "%s:%u:%u: %s\n", (const char *)path, mistake->line, mistake->column, mistake->message);
}

/* All of the file, or nothing of it: what has served before serves on when this fails. 0, or -1 when it has been said. */
static int load(clusterip *handle, const char *path)
{
	clusterip_error error = { .size = sizeof error };
	const char *why;
	size_t length;
	char *text = clusterip_read_file(path, 16, &length, &why);
	int code;

	if (!text) {
		fprintf(stderr, "%s: %s\n", path, why);
		return -1;
	}
	/* load_text tells the first mistake, check_text each of them. */
	code = plugin.check_text(text, length, path, on_mistake, (void *)path);
	if (!code && (code = plugin.load_text(handle, text, length, path, &error))) fail("load", &error);
	free(text);
	return code ? -1 : 0;
}

/*
 * A canary's connect is rewritten. A load does not see that somebody has detached what was attached, or that its cgroup was
 * removed and made again; this does, and mends it.
 */
static int prove(clusterip *handle)
{
	clusterip_error error = { .size = sizeof error };
	int code = plugin.canary(handle, NULL, &error);

	if (code == -ENOTCONN) {
		fail("canary", &error);
		if (plugin.attach(handle, &error)) return fail("attach", &error);
		code = plugin.canary(handle, NULL, &error);
	}
	return code ? fail("canary", &error) : 0;
}

int main(int argc, char **argv)
{
	clusterip_error error = { .size = sizeof error };
	clusterip_options options = { .size = sizeof options, .flags = CLUSTERIP_BACKGROUND };
	struct signalfd_siginfo got;
	char own_cgroup[4096];
	clusterip *handle;
	sigset_t signals;
	const char *why;
	int code, events, signal_fd;

	if (argc != 3 && argc != 4) {
		fprintf(stderr, "usage: host PLUGIN FILE [CGROUP]\n");
		return 2;
	}
	setvbuf(stdout, NULL, _IOLBF, 0);

	/* 1. The library, and whether it is one for this host: another major version of the ABI is refused. */
	why = clusterip_plugin_load(&plugin, argv[1]);
	if (why) {
		fprintf(stderr, "host: %s\n", why);
		return 1;
	}

	/* 2. Whose connects. A host has a reason to touch those of others, or it stays with its own. */
	if (argc == 3 && (why = clusterip_own_cgroup(own_cgroup, sizeof own_cgroup))) {
		fprintf(stderr, "host: %s\n", why);
		return 1;
	}
	options.cgroup_path = argc == 4 ? argv[3] : own_cgroup;

	/* Signals as events. The library's thread, which CLUSTERIP_BACKGROUND asks for, blocks all of them by itself. */
	sigemptyset(&signals);
	sigaddset(&signals, SIGHUP);
	sigaddset(&signals, SIGTERM);
	sigaddset(&signals, SIGINT);
	sigprocmask(SIG_BLOCK, &signals, NULL);
	signal_fd = signalfd(-1, &signals, SFD_CLOEXEC);

	/* 3. A handle, in the process that keeps it: a daemon forks before this. -EOPNOTSUPP: use another way to balance. */
	code = plugin.open(&options, &handle, &error);
	if (code) return fail(code == -EOPNOTSUPP ? "this kernel cannot" : "open", &error);

	/* 4. The services, then the hooks: from attach on, connects are rewritten. The canary has seen one that was. */
	if (load(handle, argv[2])) return 1;
	if (plugin.attach(handle, &error)) return fail("attach", &error);
	if (prove(handle)) return 1;
	printf("attached to %s\n", options.cgroup_path);

	/* 5. The loop of a host. The kernel writes events for so long, and a host that wants more asks in time. */
	for (;;) {
		events = plugin.event_fd(handle, EVENT_SECONDS, &error);
		struct pollfd wait[] = { { signal_fd, POLLIN, 0 }, { events, POLLIN, 0 } }; /* poll passes over one below 0 */

		if (poll(wait, 2, EVENT_SECONDS * 1000 / 2) < 0 && errno != EINTR) break;
		if (wait[1].revents && plugin.read_events(handle, on_event, NULL, &error) < 0) fail("events", &error);
		if (!wait[0].revents) continue;
		if (read(signal_fd, &got, sizeof got) != sizeof got || got.ssi_signo != SIGHUP) break;
		/* The same handle: a service that the new file has, too, is there at every moment. */
		if (load(handle, argv[2]) == 0 && prove(handle) == 0) printf("reloaded\n");
	}

	/* 6. Take it away. Without pins, close alone does that as well, and so does the end of the process, however it comes. */
	if (plugin.detach(handle, &error)) fail("detach", &error);
	plugin.close(handle);
	clusterip_plugin_unload(&plugin);
	return 0;
}
