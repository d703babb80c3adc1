/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * The layout of the BPF maps: the one definition, included by the kernel side (clusterip.bpf.c, as C) and by the
 * plugin (as C++). Map keys compare bytes, so every byte is named and every size asserted.
 *
 *   Filter_Map    array        a bit for each VIP, by vip_hash(): an address whose bit is 0 is none of ours
 *   Service_Map   hash         service_key -> record index; inserted once, never changed
 *   Record_Map    array        record index -> service_record; its `word` is what publishes a service
 *   Slot_Map      array        blocks: a block_header, the service's slots, and with BLOCK_EJECT a block_eject and members
 *   Backend_Map   array        backend index -> backend_record; an index stays with its backend across reloads
 *   Stats_Map     array        shard * stats_per_shard + (record index | records + backend index) -> counters
 *   Meta_Map      array        one meta_record: what an adopting process needs to know
 *   Session_Map   sk_storage   of a connected socket: what it asked for, and what it got
 *   Flow_Map      sk_storage   of an unconnected UDP socket: the same for the last few VIPs that it sent to
 *   Affinity_Map  lru_hash     affinity_key -> affinity: the backend that a client was given
 *   Event_Ring    ringbuf      one event per decision, while somebody listens; absent before Linux 5.8
 *
 * All arrays are BPF_F_MMAPABLE: user space writes them through a mapping, without a system call. Session_Map, Flow_Map,
 * Affinity_Map and Event_Ring stay when the other maps are made anew, larger: what they name by an index has it there, too.
 * ARCHITECTURE.md, "Publication", has the order of writes and the reason for each step.
 */
#ifndef CLUSTERIP_MAP_LAYOUT_H
#define CLUSTERIP_MAP_LAYOUT_H

#include <linux/bpf.h>
#include <linux/types.h>

#ifdef __cplusplus
#define LAYOUT_ASSERT static_assert
#define LAYOUT_ALIGNED(n) alignas(n)
#else
#define LAYOUT_ASSERT _Static_assert
#define LAYOUT_ALIGNED(n) __attribute__((aligned(n)))
#endif

/* Any change of a struct or of a meaning below needs a new version: pinned state of another one is refused. */
#define LAYOUT_VERSION 3
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

/*
 * The bit of Filter_Map for an address, before it is masked. A weak hash is enough: a collision costs one look-up in
 * Service_Map, nothing else.
 */
static inline __attribute__((always_inline)) __u32 vip_hash(const __be32 address[4])
{
	__u64 high = (__u64)address[0] << 32 | address[1];
	__u64 low = (__u64)address[2] << 32 | address[3];

	return (__u32)((high * 0x9e3779b97f4a7c15ull + low * 0xbf58476d1ce4e5b9ull) >> 32);
}

#define MARKER_RECORD 0xffffffffu /* the value of a VIP marker in Service_Map: no record */

/*
 * One service. `word` is the index of the block's header in Slot_Map (low half) and the number of slots after it (high
 * half); it is written by one release store. 0 means "no service here": slot 0 is never part of a block.
 * The program reads only the first 32 bytes, which share one cache line; the name is for people.
 */
struct service_record {
	struct service_key key;
	__u32 turn; /* round_robin: how many have been; counts on across changes */
	LAYOUT_ALIGNED(8) __u64 word;
	char name[SERVICE_NAME_SIZE];
};
LAYOUT_ASSERT(sizeof(struct service_record) == 192, "three cache lines");

enum no_backend { /* what connect() to a service without a backend does */
	NO_BACKEND_REFUSE = 0,      /* ECONNREFUSED */
	NO_BACKEND_UNREACHABLE = 1, /* EHOSTUNREACH */
	NO_BACKEND_PASS = 2,        /* go on to the VIP itself, untouched */
};

enum policy { /* how the slots are laid out, and one of them is chosen */
	POLICY_RANDOM = 0,      /* alias table, by a random draw */
	POLICY_ROUND_ROBIN = 1, /* a ring in which each has its share, by turns */
	POLICY_LEAST_CONN = 2,  /* alias table: of two different ones, that with fewer live connections for its weight */
	POLICY_MAGLEV = 3,      /* Maglev table, by the client's hash */
};

enum client { /* who is one client to affinity and maglev */
	CLIENT_CGROUP = 0,
	CLIENT_NETNS = 1,
	CLIENT_SOCKET = 2,
};

#define BLOCK_NAMED 1u   /* getpeername() shows the VIP */
#define BLOCK_SESSION 2u /* connected sockets are remembered in Session_Map: for the name, the count or the end */
#define BLOCK_MARK 4u    /* connected sockets get `mark` */
#define BLOCK_RESET 8u   /* connections of a backend that leaves are ended; for user space */
#define BLOCK_KEEP 16u   /* connected UDP sockets are left alone, too; for user space */
#define BLOCK_LEFT 32u   /* left to the userspace engine: no slots, NO_BACKEND_PASS, or REFUSE when none carries it; for user space */
#define BLOCK_EJECT 64u  /* backends are ejected: a block_eject follows the slots */
#define BLOCK_PANIC 128u /* when all backends are down, the slots name those; for user space */
#define BLOCK_HEALTH 256u /* something checks the backends: down states outlast a load; for user space */

#define AFFINITY_UNIT_MS 10 /* a year has to fit into 32 bits */

/* The first entry of a block; 16 bytes, as a slot. */
struct block_header {
	__u8 no_backend : 4; /* enum no_backend */
	__u8 client : 4;     /* enum client */
	__u8 policy;         /* enum policy */
	__u16 flags;         /* BLOCK_* */
	__u32 record;        /* owner: the service's record index */
	__u32 affinity;      /* in AFFINITY_UNIT_MS after the last connect; 0: none */
	__u32 mark;          /* SO_MARK */
};
LAYOUT_ASSERT(sizeof(struct block_header) == 16, "a header takes one slot");

/*
 * One column of an alias table (Vose 1991): a draw that falls below `threshold` / 2^32 of the column takes `backend`,
 * any other takes `alias`. In rings and Maglev tables only `backend` has a meaning, the others are 0.
 */
struct slot {
	__u32 threshold;
	__u32 backend; /* index in Backend_Map */
	__u32 alias;   /* index in Backend_Map */
	__u32 choices; /* in the first slot of a block: how many backends its slots name. Elsewhere 0 */
};
LAYOUT_ASSERT(sizeof(struct slot) == 16, "a slot takes 16 bytes");

/*
 * With BLOCK_EJECT, the entry after the last slot. The *members* of the service, each backend that its slots name once, are
 * `members` entries, of which only slot.backend has a meaning: in an alias table the slots themselves, else entries of
 * their own.
 */
struct block_eject {
	__u32 time;     /* ms, of the first ejection in a row */
	__u16 failures; /* in a row, after which a backend is ejected */
	__u16 zero;
	__u32 members;
	__u32 first; /* where they begin, counted from the header */
};
LAYOUT_ASSERT(sizeof(struct block_eject) == 16, "as a slot");

#define EJECT_DOUBLINGS 4 /* the time doubles with each ejection in a row, up to 16 times the first */

/*
 * Members are looked at in groups of at most this many, since programs have no loops. At most half of each group is
 * ejected, and so of the service.
 */
#define EJECT_GROUP 32

#define EJECT_REDRAWS 3 /* draws by weight for a connect whose backend is ejected, before its group is gone through */

struct eject_group {
	__u32 first; /* among the members */
	__u32 size;
};

/* The group of the member at `place`, of `members` (not 0): of equal size, as near as can be. */
static inline __attribute__((always_inline)) struct eject_group eject_group_of(__u32 place, __u32 members)
{
	__u32 groups = (members + EJECT_GROUP - 1) / EJECT_GROUP; /* [g * members / groups, (g + 1) * members / groups) */
	__u32 group = ((place + 1) * groups - 1) / members;
	__u32 first = group * members / groups;
	struct eject_group result = { first, (group + 1) * members / groups - first };

	return result;
}

union block_entry {
	struct block_header header;
	struct slot slot;
	struct block_eject eject;
};
LAYOUT_ASSERT(sizeof(union block_entry) == 16, "Slot_Map's value");

enum backend_state {
	BACKEND_UNUSED = 0, /* the index is free, or its backend has left */
	BACKEND_ACTIVE = 1,
	BACKEND_DRAIN = 2, /* gets no new connection: no slot names it */
	BACKEND_DOWN = 3,  /* the same; what unconnected sockets send goes elsewhere, too */
	BACKEND_TRIED = 4, /* down, but so are all others of a service with BLOCK_PANIC: used as if it were active */
};

#define NO_PLACE 0xffffffffu

/* What comes after `live` stays 0 (and `place` NO_PLACE) unless the service has BLOCK_EJECT. */
struct backend_record {
	__be32 address[4];
	__be16 port;
	__u8 state; /* enum backend_state */
	__u8 zero;
	__u32 weight;
	__u32 record; /* owner: the service's record index */
	__u32 live;   /* sessions that have counted themselves here; changed by atomic adds only */
	__u64 ejected_until; /* CLOCK_MONOTONIC, ns; 0: not ejected */
	__u32 failures;  /* connects that failed in a row, those of before an ejection included */
	__u32 ejections; /* in a row */
	__u32 place;     /* among the members of the service's block; for a moment, of the block before */
	__u32 zeroes[3];
};
LAYOUT_ASSERT(sizeof(struct backend_record) == 64, "a cache line");

/* Counted by atomic adds in the shard of the CPU, so that they are exact and CPUs seldom share a line. */
struct counters {
	__u64 connects; /* choices of a backend: rewritten connects, and flows of unconnected sockets */
	__u64 refused;  /* connects refused for want of a backend; services only */
	__u64 reversed; /* addresses shown as the VIP: getpeername(), and the sender of a datagram */
	__u64 failures; /* connects that failed; backends only, and sessions that sock_ops sees */
};
LAYOUT_ASSERT(sizeof(struct counters) == 32, "Stats_Map's value");

/*
 * What is known of a connected socket. Written by its connect(), under the socket's lock; ends with the socket.
 * `asked.protocol` 0: its last connect() was not to a VIP. `lock` is for `counted` alone: the end of a connection and the
 * close of its socket may come at the same moment, and one of them gives back.
 */
struct session {
	struct bpf_spin_lock lock;
	__u32 counted; /* 1: `live` of the backend has this socket in it */
	struct service_key asked;
	__u32 flags; /* BLOCK_* of the service when it was asked */
	__be32 address[4];
	__be16 port;
	__u16 trying;      /* 1: from the SYN of a TCP connection until it stands or has failed */
	__u32 backend;     /* index in Backend_Map */
	__u32 record;      /* index in Record_Map */
	__u32 mark_before; /* with BLOCK_MARK: the socket's mark before ours */
};
LAYOUT_ASSERT(sizeof(struct session) == 64, "Session_Map's value");

#define FLOWS 8 /* VIPs that an unconnected socket can talk to without forgetting one */

struct flow {
	struct service_key asked; /* protocol 0: unused */
	__u32 record;
	__be32 address[4];
	__be16 port;
	__u16 zero;
	__u32 backend;
};
LAYOUT_ASSERT(sizeof(struct flow) == 48, "Flow_Map's value has no hidden padding");

struct flows {
	struct flow flow[FLOWS];
	__u32 next; /* the one to be replaced next, modulo FLOWS */
	__u32 zero;
};
LAYOUT_ASSERT(sizeof(struct flows) == 392, "Flow_Map's value");

struct affinity_key {
	__u64 client;
	__u32 record;
	__u32 zero;
};
LAYOUT_ASSERT(sizeof(struct affinity_key) == 16, "a map key has no hidden padding");

/* Has the key in it: the kernel may reuse the element for another key under a reader. */
struct affinity {
	struct affinity_key key;
	__u64 expires; /* CLOCK_MONOTONIC, ns */
	__u32 backend;
	__u32 zero;
};
LAYOUT_ASSERT(sizeof(struct affinity) == 32, "Affinity_Map's value");

enum event_verdict {
	EVENT_PASS = 0, /* no_backend = "pass" */
	EVENT_REWRITTEN = 1,
	EVENT_NO_BACKEND = 2,
	EVENT_NO_SERVICE = 3,
	EVENT_CONTENDED = 4,
	EVENT_EJECTED = 5, /* the backend, after failed connects; no decision about a connect() */
};

enum event_reason {
	REASON_NONE = 0,
	REASON_POLICY = 1,   /* chosen anew */
	REASON_AFFINITY = 2, /* the client's backend */
	REASON_SESSION = 3,  /* the one that the socket is connected to */
};

#define COMM_SIZE 16

struct event {
	__u64 time; /* CLOCK_MONOTONIC, ns */
	__u64 cookie;
	__u64 cgroup;
	struct service_key asked;
	__be32 backend[4];
	__be16 backend_port;
	__u8 verdict; /* enum event_verdict */
	__u8 reason;  /* enum event_reason */
	__u32 pid;
	__u32 error; /* errno of a refusal */
	__u32 backends; /* that there were to choose from */
	__u32 zero;
	__u64 lost; /* meta_record's, at this time */
	char comm[COMM_SIZE];
	char service[SERVICE_NAME_SIZE];
};
LAYOUT_ASSERT(sizeof(struct event) == 264, "Event_Ring's element");

#define CGROUP_PATH_SIZE 4096 /* PATH_MAX */

struct meta_record {
	/* The first four stay as they are in every version: what it takes to tell it, and to unload it. */
	__u32 magic;
	__u32 version;
	__u64 cgroup_id;                    /* what the program is attached to; 0: to nothing */
	char cgroup_path[CGROUP_PATH_SIZE]; /* as the process that attached it saw it */

	__u64 generation; /* odd while a change is being published */
	__u64 events_until; /* CLOCK_MONOTONIC, ns: until then, decisions are written to Event_Ring */
	__u64 lost_events;  /* that Event_Ring had no room for */
	__u32 services;     /* capacity; the sizes of all maps follow from these and the shards */
	__u32 backends;
	__u32 entries; /* of Slot_Map, half of them */
	__u32 affinities;
	__u32 shards;         /* of Stats_Map; a power of two */
	__u32 limit_services; /* [limits] of the configuration that was loaded last */
	__u32 limit_backends;
	__u32 limit_flows;
	__u32 flags; /* META_* */
	__u32 zero;
};
#define META_PEER_NAMES 1u /* blocks are written with BLOCK_NAMED */
#define META_EJECTS 2u     /* the programs that are attached know of ejection */
LAYOUT_ASSERT(sizeof(struct meta_record) == 80 + CGROUP_PATH_SIZE, "Meta_Map's value");

/*
 * The canary: a reserved VIP that proves the hook at work with connected UDP sockets, that is without traffic.
 * 192.0.0.8 is the IPv4 dummy address (RFC 7600), never a valid destination.
 */
#define CANARY_NAME "(canary)"
#define CANARY_VIP 0xc0000008u     /* 192.0.0.8, host byte order */
#define CANARY_BACKEND 0x7f000001u /* 127.0.0.1 */
#define CANARY_PORT 1
#define CANARY_REFUSED_PORT 2 /* a port of the canary's VIP that no service has */

#endif
