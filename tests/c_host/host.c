/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * The whole life of the fast path from a host written in C99: c_host PLUGIN CGROUP CONFIG VIP PORT BACKEND_PORT.
 * It is started inside CGROUP. CONFIG has one service, VIP:PORT, and on 127.0.0.1:BACKEND_PORT a server answers.
 * Prints one line per step; exits with 1 at the first that fails.
 */
#define _POSIX_C_SOURCE 200809L

#include <arpa/inet.h>
#include <dlfcn.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "plugin/include/clusterip.h"

/* ISO C has no conversion from an object pointer to a function pointer; POSIX asks for one of the same bits. */
#define FIND(function, library, symbol)                         \
	do {                                                        \
		void *address_ = dlsym(library, symbol);                \
		if (!address_) fail("dlsym " symbol, -1, NULL);         \
		memcpy(&(function), &address_, sizeof(function));       \
	} while (0)

static void fail(const char *step, int code, const clusterip_error *error)
{
	printf("%s: %d %s\n", step, code, error ? error->message : "");
	exit(1);
}

static void check(const char *step, int code, const clusterip_error *error)
{
	if (code) fail(step, code, error);
	printf("%s: ok\n", step);
}

static void on_mistake(const clusterip_error *mistake, void *user)
{
	(void)mistake;
	++*(int *)user;
}

static int on_visit(const clusterip_service_info *service, const clusterip_backend_info *backend, void *user)
{
	(void)service;
	if (backend) ++*(int *)user;
	return 0;
}

static void ask(const struct sockaddr_in *to)
{
	char answer[64] = "";
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	if (fd < 0 || connect(fd, (const struct sockaddr *)to, sizeof *to)) fail("connect", -1, NULL);
	if (read(fd, answer, sizeof answer - 1) < 0) fail("read", -1, NULL);
	close(fd);
	printf("answer: %s\n", answer);
}

int main(int argc, char **argv)
{
	uint32_t (*abi_version)(void);
	const char *(*version_string)(void);
	int (*probe)(clusterip_capabilities *, clusterip_error *);
	int (*open_handle)(const clusterip_options *, clusterip **, clusterip_error *);
	int (*load_file)(clusterip *, const char *, clusterip_error *);
	int (*check_text)(const char *, size_t, const char *, clusterip_error_visitor, void *);
	int (*set_backends)(clusterip *, const char *, const clusterip_backend *, size_t, clusterip_error *);
	int (*attach)(clusterip *, clusterip_error *);
	int (*detach)(clusterip *, clusterip_error *);
	int (*resolve)(clusterip *, const struct sockaddr *, socklen_t, int, clusterip_resolution *, clusterip_error *);
	int (*visit_services)(clusterip *, clusterip_service_visitor, void *, clusterip_error *);
	int (*canary)(clusterip *, clusterip_canary_result *, clusterip_error *);
	void (*close_handle)(clusterip *);

	clusterip *handle = NULL;
	clusterip_error error = { sizeof error, 0, 0, 0, 0, "" };
	clusterip_capabilities capabilities = { sizeof capabilities, 0, 0, "" };
	clusterip_resolution resolution;
	clusterip_canary_result seen = { sizeof seen, 0, 0 };
	clusterip_options options;
	clusterip_backend backend;
	struct sockaddr_in vip;
	void *library;
	int count = 0;

	if (argc != 7) return 2;
	library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
	if (!library) fail(dlerror(), -1, NULL);
	FIND(abi_version, library, "clusterip_abi_version");
	FIND(version_string, library, "clusterip_version_string");
	FIND(probe, library, "clusterip_probe");
	FIND(open_handle, library, "clusterip_open");
	FIND(load_file, library, "clusterip_load_file");
	FIND(check_text, library, "clusterip_check_text");
	FIND(set_backends, library, "clusterip_set_backends");
	FIND(attach, library, "clusterip_attach");
	FIND(detach, library, "clusterip_detach");
	FIND(resolve, library, "clusterip_resolve");
	FIND(visit_services, library, "clusterip_visit_services");
	FIND(canary, library, "clusterip_canary");
	FIND(close_handle, library, "clusterip_close");

	if (abi_version() >> 16 != CLUSTERIP_ABI_MAJOR) fail("abi_version", (int)abi_version(), NULL);
	printf("version: %s\n", version_string());
	check("probe", probe(&capabilities, &error), &error);
	if (check_text("[[service]]\nnaem = 1\n", 21, "text", on_mistake, &count) >= 0 || count == 0)
		fail("check_text", count, NULL);

	memset(&options, 0, sizeof options);
	options.size = sizeof options;
	options.cgroup_path = argv[2];
	check("open", open_handle(&options, &handle, &error), &error);
	check("load_file", load_file(handle, argv[3], &error), &error);
	check("attach", attach(handle, &error), &error);
	check("canary", canary(handle, &seen, &error), &error);

	memset(&vip, 0, sizeof vip);
	vip.sin_family = AF_INET;
	vip.sin_port = htons((uint16_t)atoi(argv[5]));
	if (inet_pton(AF_INET, argv[4], &vip.sin_addr) != 1) return 2;
	ask(&vip);

	memset(&backend, 0, sizeof backend);
	backend.size = sizeof backend;
	backend.address = "127.0.0.1";
	backend.port = (uint16_t)atoi(argv[6]);
	backend.weight = 1;
	check("set_backends", set_backends(handle, "hosted", &backend, 1, &error), &error);
	ask(&vip);

	memset(&resolution, 0, sizeof resolution);
	resolution.size = sizeof resolution;
	check("resolve", resolve(handle, (struct sockaddr *)&vip, sizeof vip, IPPROTO_TCP, &resolution, &error), &error);
	printf("resolved: %s\n", resolution.service);
	count = 0;
	check("visit_services", visit_services(handle, on_visit, &count, &error), &error);
	printf("backends: %d\n", count);

	check("detach", detach(handle, &error), &error);
	close_handle(handle);
	if (dlclose(library)) fail(dlerror(), -1, NULL);
	printf("done\n");
	return 0;
}
