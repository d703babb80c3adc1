/* SPDX-License-Identifier: BSD-2-Clause
 *
 * Preloaded into a program, makes one of its system calls fail:
 *
 *   CLUSTERIP_FAULT="CALL COMMAND NTH ERRNO FILE"
 *
 * The NTH time (from 1) that CALL is made (with COMMAND as its first argument, unless that is -1) it fails with ERRNO, once;
 * with -NTH, from that time on. Then FILE gets a byte, so that whoever counts knows when there is no NTH time. With 0 for NTH
 * nothing fails, and FILE gets a byte each time. CALL is a name below.
 *
 *   CLUSTERIP_FAULT_WHEN="FILE": only what is called while FILE exists is counted.
 *
 *   CLUSTERIP_CLOCK="FILE SECONDS CLOCK": while FILE exists, that clock (CLOCK_*, a number) is that much later. FILE.shifted
 *   is made at the first such answer.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static struct {
	char call[32];
	long command;
	long nth;
	int error;
	char file[256];
	char when[256];
	char clock_file[256];
	char clock_mark[272];
	long clock_seconds;
	int clock;
} fault;
static atomic_long *calls; /* of this process and those that it forks */
static atomic_flag has_shifted = ATOMIC_FLAG_INIT;

/* By system calls that nothing here replaces. */
static void mark(const char *file)
{
	long fd = syscall(SYS_openat, AT_FDCWD, file, O_CREAT | O_WRONLY | O_APPEND | O_CLOEXEC, 0600);

	syscall(SYS_write, fd, ".", 1);
	syscall(SYS_close, fd);
}

__attribute__((constructor)) static void read_fault(void)
{
	const char *text = getenv("CLUSTERIP_FAULT");

	calls = mmap(NULL, sizeof *calls, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (calls == MAP_FAILED)
		_exit(124);
	if (text && sscanf(text, "%31s %ld %ld %d %255s", fault.call, &fault.command, &fault.nth, &fault.error, fault.file) != 5)
		_exit(124);
	text = getenv("CLUSTERIP_FAULT_WHEN");
	if (text)
		snprintf(fault.when, sizeof fault.when, "%s", text);
	text = getenv("CLUSTERIP_CLOCK");
	if (text && sscanf(text, "%255s %ld %d", fault.clock_file, &fault.clock_seconds, &fault.clock) != 3)
		_exit(124);
	snprintf(fault.clock_mark, sizeof fault.clock_mark, "%s.shifted", fault.clock_file);
}

/* Whether this call fails: errno is set. */
static int fails(const char *call, long command)
{
	if (strcmp(fault.call, call) != 0 || (fault.command != -1 && fault.command != command))
		return 0;
	if (fault.when[0] && access(fault.when, F_OK) != 0)
		return 0;
	long nth = atomic_fetch_add(calls, 1) + 1;
	if (fault.nth > 0 ? nth != fault.nth : nth < -fault.nth)
		return 0;
	mark(fault.file);
	errno = fault.error;
	return fault.nth != 0;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

long syscall(long number, ...)
{
	static long (*real)(long, ...);
	long a[6];
	va_list arguments;

	va_start(arguments, number);
	for (int i = 0; i < 6; i++)
		a[i] = va_arg(arguments, long);
	va_end(arguments);
	if (!real)
		real = REAL(syscall);
	if ((number == SYS_bpf && fails("bpf", a[0])) || (number == SYS_membarrier && fails("membarrier", a[0])))
		return -1;
	return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

int socket(int family, int type, int protocol)
{
	return fails("socket", family) ? -1 : REAL(socket)(family, type, protocol);
}

int accept4(int fd, struct sockaddr *address, socklen_t *length, int flags)
{
	return fails("accept4", -1) ? -1 : REAL(accept4)(fd, address, length, flags);
}

int epoll_ctl(int epoll, int operation, int fd, struct epoll_event *event)
{
	return fails("epoll_ctl", operation) ? -1 : REAL(epoll_ctl)(epoll, operation, fd, event);
}

ssize_t splice(int in, off64_t *off_in, int out, off64_t *off_out, size_t length, unsigned int flags)
{
	return fails("splice", -1) ? -1 : REAL(splice)(in, off_in, out, off_out, length, flags);
}

int pipe2(int fds[2], int flags)
{
	return fails("pipe2", -1) ? -1 : REAL(pipe2)(fds, flags);
}

ssize_t sendto(int fd, const void *bytes, size_t length, int flags, const struct sockaddr *to, socklen_t to_length)
{
	/* Of netlink sockets alone: those have an address. */
	if (to && to->sa_family == AF_NETLINK && fails("netlink", -1))
		return -1;
	return REAL(sendto)(fd, bytes, length, flags, to, to_length);
}

/* Asio receives by the same functions. */
static int is_netlink(int fd)
{
	int domain = 0;
	socklen_t length = sizeof domain;

	return getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &length) == 0 && domain == AF_NETLINK;
}

ssize_t recvmsg(int fd, struct msghdr *message, int flags)
{
	if (!is_netlink(fd))
		return REAL(recvmsg)(fd, message, flags);
	if (fails("netlink-receive", -1))
		return -1;
	ssize_t size = REAL(recvmsg)(fd, message, flags);
	if (size >= 0 && fails("netlink-cut", -1))
		message->msg_flags |= MSG_TRUNC;
	return size;
}

ssize_t recv(int fd, void *bytes, size_t length, int flags)
{
	/* Not the one that empties a queue, whose end is the only error that it expects. */
	return is_netlink(fd) && !(flags & MSG_DONTWAIT) && fails("netlink-news", -1) ? -1 : REAL(recv)(fd, bytes, length, flags);
}

int mkdir(const char *path, mode_t mode)
{
	return fails("mkdir", -1) ? -1 : REAL(mkdir)(path, mode);
}

int rename(const char *from, const char *to)
{
	return fails("rename", -1) ? -1 : REAL(rename)(from, to);
}

int unlink(const char *path)
{
	return fails("unlink", -1) ? -1 : REAL(unlink)(path);
}

int rmdir(const char *path)
{
	return fails("rmdir", -1) ? -1 : REAL(rmdir)(path);
}

int clock_gettime(clockid_t id, struct timespec *now)
{
	static int (*real)(clockid_t, struct timespec *);
	if (!real)
		real = REAL(clock_gettime);
	int result = real(id, now);
	int error = errno;
	if (result == 0 && fault.clock_seconds && id == fault.clock && access(fault.clock_file, F_OK) == 0) {
		now->tv_sec += fault.clock_seconds;
		if (!atomic_flag_test_and_set(&has_shifted))
			mark(fault.clock_mark);
	}
	errno = error;
	return result;
}
