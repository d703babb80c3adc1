// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
//
// The fast path: rewrites the destination of connect() from a service's VIP to one of its backends. It runs inside the
// system call of the application; the connection that follows is an ordinary one, and nothing of ours is in its way.
//
// It needs no BTF of the running kernel and no loop: CAP_BPF and CAP_NET_ADMIN are enough to load it.
#include <linux/bpf.h>
#include <linux/in.h>
#include <stdbool.h>
#include <stddef.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "map_layout.h"

// errno values: <errno.h> is not for BPF programs.
#define ECONNREFUSED 111
#define EHOSTUNREACH 113

// A reader that meets a reused element of Service_Map looks again. The element of a stable service is never reused, so
// only connects to services that are being removed and added back come here, and one more look is nearly always enough.
#define LOOKUPS 4

// The torture test builds this program again with a delay where a wrong publication protocol would be seen, and with a
// look-up by a wrong protocol.
#ifndef WIDEN_WINDOW
#define WIDEN_WINDOW()
#endif
#ifndef LOOK_UP
#define LOOK_UP look_up
#endif

// Set by the loader before the program is verified. Branches on them are resolved by the verifier, so that a kernel never
// sees a call to a helper which it lacks.
const volatile __u32 can_set_errno = 0;
const volatile __u32 stats_shard_mask = 0; // shards - 1
const volatile __u32 stats_per_shard = 0;
const volatile __u32 stats_backends = 0; // index of backend 0 within a shard

// max_entries of 1 stands for "set by the loader", which sizes them from the configuration.
struct {
	__uint(type, BPF_MAP_TYPE_HASH); // preallocated: an insert fails only when the map is full
	__uint(max_entries, 1);
	__type(key, struct service_key);
	__type(value, __u32);
} Service_Map SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct service_record);
} Record_Map SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, union block_entry);
} Slot_Map SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct backend_record);
} Backend_Map SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct counters);
} Stats_Map SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct meta_record);
} Meta_Map SEC(".maps");

// What the program decides about one connect().
enum verdict {
	PASS,        // no VIP of ours, or a protocol that we do not serve: untouched
	REWRITTEN,   // goes to a backend
	NO_BACKEND_REFUSED,
	NO_BACKEND_UNREACHED,
	NO_SERVICE,  // a port of our VIP that no service has
	CONTENDED,   // the service was replaced at each of our looks
};

// A service as it is published: where its record is, and the block that `word` names.
struct service {
	__u32 record;
	__u32 header; // index in Slot_Map
	__u32 slots;
};

static __always_inline struct counters *counters_at(__u32 index)
{
	__u32 shard = bpf_get_smp_processor_id() & stats_shard_mask;
	__u32 i = shard * stats_per_shard + index;

	return bpf_map_lookup_elem(&Stats_Map, &i);
}

static __always_inline bool same_key(const struct service_key *a, const struct service_key *b)
{
	return a->address[0] == b->address[0] && a->address[1] == b->address[1] && a->address[2] == b->address[2] &&
	       a->address[3] == b->address[3] && a->port == b->port && a->protocol == b->protocol;
}

// One look for the service that has exactly this key. PASS: there is none.
static __always_inline enum verdict look_up(const struct service_key *key, struct service *service)
{
	__u32 *value = bpf_map_lookup_elem(&Service_Map, key);
	if (!value)
		return PASS;

	// The kernel may reuse the element for another key at any time, also between this look-up and this load. The record
	// tells: it has the full key.
	WIDEN_WINDOW();
	service->record = *(volatile __u32 *)value;
	struct service_record *record = bpf_map_lookup_elem(&Record_Map, &service->record);
	if (!record || !same_key(&record->key, key))
		return CONTENDED;

	// One load of one word: the whole service as it was published at that moment. The block stays as it is until a grace
	// period has passed, that is until this program has returned.
	__u64 word = *(volatile __u64 *)&record->word;
	if (!word)
		return PASS;
	WIDEN_WINDOW();
	service->header = (__u32)word;
	service->slots = word >> 32;
	return REWRITTEN;
}

static __always_inline enum verdict find_service(const struct service_key *key, struct service *service)
{
	enum verdict verdict = CONTENDED;

	// Unrolled: a loop would make the verifier of older kernels ask for more than CAP_BPF.
#pragma clang loop unroll(full)
	for (int i = 0; i < LOOKUPS; i++) {
		if (verdict == CONTENDED)
			verdict = LOOK_UP(key, service);
	}
	return verdict;
}

// No service has this port. If the address is a VIP, that must not reach the network.
static __always_inline enum verdict check_vip(const struct service_key *key)
{
	struct service_key marker = *key;
	marker.port = 0;
	marker.protocol = 0;

	// A UDP connect to port 0 asks for the route only: getaddrinfo() sorts addresses with it (RFC 6724).
	if (key->port == 0 && key->protocol == IPPROTO_UDP)
		return PASS;
	return bpf_map_lookup_elem(&Service_Map, &marker) ? NO_SERVICE : PASS;
}

// One draw chooses column and side of the alias table: the high word of draw * columns is the column, the low word a
// uniform position in it.
static __always_inline struct backend_record *choose_backend(const struct service *service, __u32 *index)
{
	__u64 draw = (__u64)bpf_get_prandom_u32() * service->slots;
	__u32 at = service->header + 1 + (__u32)(draw >> 32);

	union block_entry *entry = bpf_map_lookup_elem(&Slot_Map, &at);
	if (!entry)
		return NULL;
	// Two loads, not one through a pointer that is chosen first: for that, the verifier asks for CAP_PERFMON.
	*index = *(volatile __u32 *)&entry->slot.backend;
	if ((__u32)draw >= entry->slot.threshold)
		*index = *(volatile __u32 *)&entry->slot.alias;
	WIDEN_WINDOW();
	return bpf_map_lookup_elem(&Backend_Map, index);
}

static __always_inline enum verdict refuse(const struct service *service, const struct block_header *header)
{
	if (header->no_backend == NO_BACKEND_PASS)
		return PASS;

	struct counters *counters = counters_at(service->record);
	if (counters)
		__sync_fetch_and_add(&counters->refused, 1);
	return header->no_backend == NO_BACKEND_UNREACHABLE ? NO_BACKEND_UNREACHED : NO_BACKEND_REFUSED;
}

// Fills `backend` when the verdict is REWRITTEN.
static __always_inline enum verdict decide(const struct service_key *key, struct backend_record **backend)
{
	struct service service = {};
	enum verdict verdict = find_service(key, &service);
	if (verdict == PASS)
		return check_vip(key);
	if (verdict == CONTENDED)
		return CONTENDED;

	union block_entry *block = bpf_map_lookup_elem(&Slot_Map, &service.header);
	if (!block)
		return PASS; // cannot be: words name blocks inside the map
	if (!service.slots)
		return refuse(&service, &block->header);

	__u32 index = 0;
	*backend = choose_backend(&service, &index);
	if (!*backend)
		return PASS; // cannot be: slots name backends inside the map

	struct counters *counters = counters_at(service.record);
	if (counters)
		__sync_fetch_and_add(&counters->connects, 1);
	counters = counters_at(stats_backends + index);
	if (counters)
		__sync_fetch_and_add(&counters->connects, 1);
	return REWRITTEN;
}

// What a verdict means to the system call: 1 lets it go on, 0 ends it. Ending it without an errno gives EPERM, which is
// all that kernels before 5.18 can do.
static __always_inline int answer(enum verdict verdict)
{
	if (verdict == PASS || verdict == REWRITTEN)
		return 1;
	if (can_set_errno)
		bpf_set_retval(verdict == NO_BACKEND_UNREACHED ? -EHOSTUNREACH : -ECONNREFUSED);
	return 0;
}

SEC("cgroup/connect4")
int sock4_connect(struct bpf_sock_addr *ctx)
{
	if (ctx->protocol != IPPROTO_TCP && ctx->protocol != IPPROTO_UDP)
		return 1;

	struct service_key key = {
		.address = {0, 0, bpf_htonl(0xffff), ctx->user_ip4},
		.port = (__be16)ctx->user_port,
		.protocol = (__u8)ctx->protocol,
	};
	struct backend_record *backend = NULL;
	enum verdict verdict = decide(&key, &backend);
	if (verdict == REWRITTEN && backend) {
		ctx->user_ip4 = backend->address[3];
		ctx->user_port = backend->port;
	}
	return answer(verdict);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
