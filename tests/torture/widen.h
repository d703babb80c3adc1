/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Included before clusterip.bpf.c in test builds: a delay of some ten microseconds in each window, between the steps of a
 * look-up, in which a publisher can do its worst.
 */
#include <linux/bpf.h>

#include <bpf/bpf_helpers.h>

#define WINDOW_STEPS 400

static long window_step(__u32 index, void *context)
{
	(void)index;
	(void)context;
	bpf_ktime_get_ns();
	return 0;
}

#define WIDEN_WINDOW() bpf_loop(WINDOW_STEPS, window_step, NULL, 0)
