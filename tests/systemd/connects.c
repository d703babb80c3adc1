/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Both ends of the connections in the guest, static, so that they need nothing there:
 *   connects serve ADDRESS PORT NAME     answers each connection with NAME
 *   connects once ADDRESS PORT           prints the answer to one
 *   connects stream ADDRESS PORT FILE    connects again and again until SIGTERM; FILE then has the counts:
 *                                        "N connects, N failed", and a line for each name that answered
 */
#include <arpa/inet.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { max_name = 32, max_names = 16 };

static volatile sig_atomic_t is_ending;

static void end(int signal)
{
	(void)signal;
	is_ending = 1;
}

static struct sockaddr_in address_of(const char *host, const char *port)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons((in_port_t)atoi(port)) };

	if (inet_pton(AF_INET, host, &address.sin_addr) != 1) {
		fprintf(stderr, "connects: %s is no address\n", host);
		exit(2);
	}
	return address;
}

static int serve(const struct sockaddr_in *address, const char *name)
{
	const int on = 1;
	const int listener = socket(AF_INET, SOCK_STREAM, 0);

	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
	if (bind(listener, (const struct sockaddr *)address, sizeof *address) || listen(listener, 128)) {
		perror("connects: listen");
		return 1;
	}
	for (;;) {
		const int connection = accept(listener, NULL, NULL);

		if (connection < 0)
			continue;
		(void)!write(connection, name, strlen(name));
		close(connection);
	}
}

/* 0 and the name of who answered, or an errno. */
static int connect_once(const struct sockaddr_in *address, char name[max_name])
{
	const struct timeval patience = { .tv_sec = 20 };
	const int fd = socket(AF_INET, SOCK_STREAM, 0);
	ssize_t size = 0, length = 0;
	int error = 0;

	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
	if (connect(fd, (const struct sockaddr *)address, sizeof *address))
		error = errno;
	while (!error && length < max_name - 1 && (size = read(fd, name + length, (size_t)(max_name - 1 - length))) > 0)
		length += size;
	if (!error && size < 0)
		error = errno;
	if (!error && length == 0)
		error = ENODATA;
	name[length] = 0;
	close(fd);
	return error;
}

static int stream(const struct sockaddr_in *address, const char *path)
{
	/* Pace: what this emulated machine can do beside its other work. */
	const struct timespec pause = { .tv_nsec = 3000000 };
	char names[max_names][max_name] = { { 0 } };
	unsigned long answers[max_names] = { 0 }, connects = 0, failed = 0;
	struct sigaction action;
	FILE *file;
	int i;

	memset(&action, 0, sizeof action);
	action.sa_handler = end;
	action.sa_flags = SA_RESTART;
	sigaction(SIGTERM, &action, NULL);
	while (!is_ending) {
		char name[max_name];
		const int error = connect_once(address, name);

		/* With a timeout set, a signal interrupts whatever SA_RESTART says. */
		if (is_ending && error == EINTR)
			break;
		++connects;
		if (error) {
			if (failed++ < 10)
				fprintf(stderr, "# connect %lu failed: %s\n", connects, strerror(error));
		} else {
			for (i = 0; i < max_names - 1 && names[i][0] && strcmp(names[i], name) != 0; ++i)
				;
			strcpy(names[i], name);
			++answers[i];
		}
		nanosleep(&pause, NULL);
	}
	file = fopen(path, "w");
	if (!file)
		return 1;
	fprintf(file, "%lu connects, %lu failed\n", connects, failed);
	for (i = 0; i < max_names && names[i][0]; ++i)
		fprintf(file, "%s %lu\n", names[i], answers[i]);
	return fclose(file) ? 1 : 0;
}

int main(int argc, char **argv)
{
	struct sockaddr_in address;
	char name[max_name];
	int error;

	if (argc < 4)
		return 2;
	address = address_of(argv[2], argv[3]);
	if (!strcmp(argv[1], "serve") && argc == 5)
		return serve(&address, argv[4]);
	if (!strcmp(argv[1], "stream") && argc == 5)
		return stream(&address, argv[4]);
	error = connect_once(&address, name);
	puts(error ? strerror(error) : name);
	return error != 0;
}
