/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * The layout of the BPF maps: the one definition, included by the kernel side (clusterip.bpf.c, as C) and by the
 * plugin (as C++). Map keys compare bytes, so every byte is named and every size asserted.
 *
 *   Service_Map   hash    service_key -> record index; inserted once, never changed
 *   Record_Map    array   record index -> service_record; its `word` is what publishes a service
 *   Slot_Map      array   blocks: a block_header, then the service's slots
 *   Backend_Map   array   backend index -> backend_record; an index stays with its backend across reloads
 *   Stats_Map     array   shard * stats_per_shard + (record index | records + backend index) -> counters
 *   Meta_Map      array   one meta_record: what an adopting process needs to know
 *
 * All arrays are BPF_F_MMAPABLE: user space writes them through a mapping, without a system call.
 * ARCHITECTURE.md, "Publication", has the order of writes and the reason for each step.
 */
#ifndef CLUSTERIP_MAP_LAYOUT_H
#define CLUSTERIP_MAP_LAYOUT_H

#include <linux/types.h>

#ifdef __cplusplus
#define LAYOUT_ASSERT static_assert
#define LAYOUT_ALIGNED(n) alignas(n)
#else
#define LAYOUT_ASSERT _Static_assert
#define LAYOUT_ALIGNED(n) __attribute__((aligned(n)))
#endif

/* Any change of a struct or of a meaning below needs a new version: pinned state of another one is refused. */
#define LAYOUT_VERSION 1
#define LAYOUT_MAGIC 0x70697375 /* "usip" in memory */

#define SERVICE_NAME_SIZE 160 /* with the terminating NUL; "namespace/name:port" of Kubernetes needs 144 */

/*
 * What an application asks for. IPv4 addresses are v4-mapped (RFC 4291, 2.5.5.2). Port 0 with protocol 0 is a *VIP
 * marker*: it says that the address is ours, so that a port which no service has is refused, not leaked.
 */
struct service_key {
	__be32 address[4];
	__be16 port;
	__u8 protocol; /* IPPROTO_TCP, IPPROTO_UDP */
	__u8 zero;
};
LAYOUT_ASSERT(sizeof(struct service_key) == 20, "a map key has no hidden padding");

#define MARKER_RECORD 0xffffffffu /* the value of a VIP marker in Service_Map: no record */

/*
 * One service. `word` is the index of the block's header in Slot_Map (low half) and the number of slots after it (high
 * half); it is written by one release store. 0 means "no service here": slot 0 is never part of a block.
 * The program reads only the first 32 bytes, which share one cache line; the name is for people.
 */
struct service_record {
	struct service_key key;
	__u32 zero;
	LAYOUT_ALIGNED(8) __u64 word;
	char name[SERVICE_NAME_SIZE];
};
LAYOUT_ASSERT(sizeof(struct service_record) == 192, "three cache lines");

enum no_backend { /* what connect() to a service without a backend does */
	NO_BACKEND_REFUSE = 0,      /* ECONNREFUSED */
	NO_BACKEND_UNREACHABLE = 1, /* EHOSTUNREACH */
	NO_BACKEND_PASS = 2,        /* go on to the VIP itself, untouched */
};

/* The first entry of a block; 16 bytes, as a slot. */
struct block_header {
	__u8 no_backend; /* enum no_backend */
	__u8 zero[3];
	__u32 record; /* owner: the service's record index */
	__u64 reserved;
};
LAYOUT_ASSERT(sizeof(struct block_header) == 16, "a header takes one slot");

/*
 * One column of an alias table (Vose 1991): a draw that falls below `threshold` / 2^32 of the column takes `backend`,
 * any other takes `alias`.
 */
struct slot {
	__u32 threshold;
	__u32 backend; /* index in Backend_Map */
	__u32 alias;   /* index in Backend_Map */
	__u32 zero;
};
LAYOUT_ASSERT(sizeof(struct slot) == 16, "a slot takes 16 bytes");

union block_entry {
	struct block_header header;
	struct slot slot;
};
LAYOUT_ASSERT(sizeof(union block_entry) == 16, "Slot_Map's value");

enum backend_state {
	BACKEND_UNUSED = 0, /* the index is free */
	BACKEND_ACTIVE = 1,
	BACKEND_DRAIN = 2, /* gets no new connection: no slot names it */
};

struct backend_record {
	__be32 address[4];
	__be16 port;
	__u8 state; /* enum backend_state; for user space */
	__u8 zero;
	__u32 weight; /* for user space: slots have it worked in */
	__u32 record; /* owner: the service's record index */
	__u32 reserved;
};
LAYOUT_ASSERT(sizeof(struct backend_record) == 32, "two in a cache line");

/* Counted by atomic adds in the shard of the CPU, so that they are exact and CPUs seldom share a line. */
struct counters {
	__u64 connects; /* rewritten connects */
	__u64 refused;  /* connects refused for want of a backend; services only */
};
LAYOUT_ASSERT(sizeof(struct counters) == 16, "Stats_Map's value");

#define CGROUP_PATH_SIZE 4096 /* PATH_MAX */

struct meta_record {
	/* The first four stay as they are in every version: what it takes to tell it, and to unload it. */
	__u32 magic;
	__u32 version;
	__u64 cgroup_id;                    /* what the program is attached to; 0: to nothing */
	char cgroup_path[CGROUP_PATH_SIZE]; /* as the process that attached it saw it */

	__u64 generation; /* odd while a change is being published */
	__u32 services;   /* capacity; the sizes of all maps follow from these two and the shards */
	__u32 backends;
	__u32 shards;         /* of Stats_Map; a power of two */
	__u32 limit_services; /* [limits] of the configuration that was loaded last */
	__u32 limit_backends;
	__u32 zero;
};
LAYOUT_ASSERT(sizeof(struct meta_record) == 48 + CGROUP_PATH_SIZE, "Meta_Map's value");

/*
 * The canary: a reserved VIP that proves the hook at work with connected UDP sockets, that is without traffic.
 * 192.0.0.8 is the IPv4 dummy address (RFC 7600), never a valid destination.
 */
#define CANARY_VIP 0xc0000008u     /* 192.0.0.8, host byte order */
#define CANARY_BACKEND 0x7f000001u /* 127.0.0.1 */
#define CANARY_PORT 1
#define CANARY_REFUSED_PORT 2 /* a port of the canary's VIP that no service has */

#endif
