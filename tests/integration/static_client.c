/* SPDX-License-Identifier: BSD-2-Clause */
/* static_client ADDRESS PORT: connect, print what the server says. */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	struct sockaddr_in to = { .sin_family = AF_INET };
	char answer[64];
	ssize_t size;
	int fd;

	if (argc != 3 || inet_pton(AF_INET, argv[1], &to.sin_addr) != 1) return 2;
	to.sin_port = htons((uint16_t)atoi(argv[2]));
	fd = socket(AF_INET, SOCK_STREAM, 0);
	if (fd < 0 || connect(fd, (struct sockaddr *)&to, sizeof to)) {
		perror("connect");
		return 1;
	}
	while ((size = read(fd, answer, sizeof answer)) > 0) fwrite(answer, 1, (size_t)size, stdout);
	return size < 0;
}
