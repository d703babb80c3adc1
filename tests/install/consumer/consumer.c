/* SPDX-License-Identifier: BSD-2-Clause */
#include <clusterip.h>
#include <stdio.h>

static void count(const clusterip_error *mistake, void *user)
{
	(void)mistake;
	++*(int *)user;
}

int main(void)
{
	static const char toml[] = "[engine]\nmod = 1\n";
	int mistakes = 0;

	printf("%s %u\n", clusterip_version_string(), (unsigned)(clusterip_abi_version() >> 16));
	return clusterip_check_text(toml, sizeof toml - 1, "none", count, &mistakes) < 0 && mistakes == 1 ? 0 : 1;
}
