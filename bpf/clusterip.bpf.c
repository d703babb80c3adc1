// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
//
// The fast path: rewrites the destination of connect() and of sendmsg() from a service's VIP to one of its backends, and
// the addresses that the application is shown back. It runs inside the system calls of the application; a connection is an
// ordinary one, and nothing of ours is in its way.
//
// It needs no BTF of the running kernel and no loop: CAP_BPF and CAP_NET_ADMIN are enough to load it.
#include <linux/bpf.h>
#include <linux/in.h>
#include <stdbool.h>
#include <stddef.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "balance/hash.h"
#include "map_layout.h"

// errno values: <errno.h> is not for BPF programs.
#define ECONNREFUSED 111
#define EHOSTUNREACH 113

// <sys/socket.h> is not for BPF programs either.
#define AF_INET 2
#define AF_INET6 10
#define SOL_SOCKET 1
#define SO_MARK 36

// A branch that is seldom taken, if ever.
#define unlikely(condition_) __builtin_expect(!!(condition_), 0)

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
const volatile __u32 can_mark = 0;
const volatile __u32 can_netns_cookie = 0;
const volatile __u32 can_cgroup_id = 0;
const volatile __u32 can_events = 0;
const volatile __u32 can_comm = 0;
const volatile __u32 has_udp = 0; // whether there are UDP services
const volatile __u32 has_sessions = 0; // whether any service remembers sockets, or has since the programs are attached
const volatile __u32 has_sock_ops = 0; // whether connections are counted as their SYN is sent
const volatile __u32 has_eject = 0; // whether backends of any service are ejected
const volatile __u32 filter_mask = 0; // bits of Filter_Map - 1
const volatile __u32 stats_shard_mask = 0; // shards - 1
const volatile __u32 stats_per_shard = 0;
const volatile __u32 stats_backends = 0; // index of backend 0 within a shard
const volatile __u64 draw_seed = 0; // hosts must not draw alike

// max_entries of 1 stands for "set by the loader", which sizes them from the configuration.
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} Filter_Map SEC(".maps");

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

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct session);
} Session_Map SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct flows);
} Flow_Map SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, struct affinity_key);
	__type(value, struct affinity);
} Affinity_Map SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
} Event_Ring SEC(".maps");

// What the program decides about one connect() or one datagram.
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

// What came of looking for a backend. Filled as far as the verdict needs.
struct decision {
	struct service service;
	__u32 backend; // index in Backend_Map
	__u32 flags;   // BLOCK_*
	__u32 mark;
	__u32 reason;       // enum event_reason
	struct backend_record *record;
};

// Where this CPU counts: the index in Stats_Map of what its shard has at `index`.
static __always_inline __u32 stats_index(__u32 index)
{
	return (bpf_get_smp_processor_id() & stats_shard_mask) * stats_per_shard + index;
}

static __always_inline struct counters *counters_at(__u32 index)
{
	__u32 i = stats_index(index);

	return bpf_map_lookup_elem(&Stats_Map, &i);
}

// Of the columns and rings of blocks: the alias of `slot` unless the position falls below its threshold.
static __always_inline __u32 side_of(const struct slot *slot, __u32 position)
{
	return position < slot->threshold ? slot->backend : slot->alias;
}

static __always_inline void count_reversed(__u32 index)
{
	struct counters *counters = counters_at(index);
	if (counters)
		__sync_fetch_and_add(&counters->reversed, 1);
}

// Nearly every connect() of a host is to an address which is none of ours. It pays for one bit.
static __always_inline bool may_be_vip(const __be32 address[4])
{
	__u32 bit = vip_hash(address) & filter_mask;
	__u32 index = bit / 64;
	__u64 *word = bpf_map_lookup_elem(&Filter_Map, &index);

	return word && *(volatile __u64 *)word >> (bit % 64) & 1;
}

static __always_inline bool same_key(const struct service_key *a, const struct service_key *b)
{
	return a->address[0] == b->address[0] && a->address[1] == b->address[1] && a->address[2] == b->address[2] &&
	       a->address[3] == b->address[3] && a->port == b->port && a->protocol == b->protocol;
}

// The same without a branch for each member: in a loop, those would multiply for the verifier.
static __always_inline __u32 differs(const struct service_key *a, const struct service_key *b)
{
	return (a->address[0] ^ b->address[0]) | (a->address[1] ^ b->address[1]) | (a->address[2] ^ b->address[2]) |
	       (a->address[3] ^ b->address[3]) | (a->port ^ b->port) | (a->protocol ^ b->protocol);
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

// Who asks, for policies that give one client one backend.
static __always_inline __u64 client_of(struct bpf_sock_addr *ctx, __u32 client)
{
	if (client == CLIENT_NETNS && can_netns_cookie)
		return bpf_get_netns_cookie(ctx);
	if (client == CLIENT_CGROUP && can_cgroup_id)
		return bpf_get_current_cgroup_id();
	return bpf_get_socket_cookie(ctx);
}

static __always_inline bool load_slot(const struct service *service, __u32 slot, struct slot *out)
{
	__u32 at = service->header + 1 + slot;
	union block_entry *entry = bpf_map_lookup_elem(&Slot_Map, &at);
	if (!entry)
		return false; // cannot be: words name blocks inside the map
	*out = entry->slot;
	return true;
}

// The n-th connect of a service on a CPU gets the n-th number of a sequence: the seed's, the service's and the CPU's own
// (`index` is of its counters). That is SplitMix64 with the counter as its state, at a third of the price of
// bpf_get_prandom_u32(). Where CPUs share counters, two connects at the very same moment may get the same number.
static __always_inline __u64 random_bits(__u32 index, __u64 count)
{
	return hash_mix(draw_seed + ((__u64)index << 40) + count * 0x9e3779b97f4a7c15ull);
}

// One draw chooses column and side of the alias table: the high word of draw * columns is the column, the low word a
// uniform position in it.
static __always_inline __u32 draw(const struct service *service, __u32 random, struct slot *slot)
{
	__u64 product = (__u64)random * service->slots;

	if (!load_slot(service, product >> 32, slot))
		return 0;
	return side_of(slot, (__u32)product);
}

// The turn is read and then added to, not fetched by one atomic step, which kernels before 5.12 lack: two connects at
// the very same moment may take the same turn.
static __always_inline __u32 take_turn(const struct service *service)
{
	struct slot slot = {};
	struct service_record *record = bpf_map_lookup_elem(&Record_Map, &service->record);
	if (!record)
		return 0; // cannot be: the record was just read
	__u32 turn = *(volatile __u32 *)&record->turn;
	__sync_fetch_and_add(&record->turn, 1);
	load_slot(service, turn % service->slots, &slot);
	return slot.backend;
}

// Below 0 for a moment while counts move to new maps.
static __always_inline __u32 read_live(const struct backend_record *backend)
{
	__s32 live = *(volatile __s32 *)&backend->live;

	return live < 0 ? 0 : live;
}

// Two different backends, the first by weight: the second is taken only when it has fewer live connections for its
// weight. So idle backends are chosen by weight, and of two backends the less loaded one always.
static __always_inline __u32 choose_less_loaded(const struct service *service, __u64 random)
{
	struct slot slot = {};
	__u32 first = draw(service, random >> 32, &slot);
	if (service->slots < 2)
		return first;

	__u32 column = ((__u64)(__u32)random * service->slots) >> 32;
	if (!load_slot(service, column, &slot))
		return first;
	if (slot.backend == first) {
		column = column + 1 < service->slots ? column + 1 : 0;
		if (!load_slot(service, column, &slot))
			return first;
	}
	__u32 second = slot.backend;
	struct backend_record *a = bpf_map_lookup_elem(&Backend_Map, &first);
	struct backend_record *b = bpf_map_lookup_elem(&Backend_Map, &second);
	if (!a || !b)
		return first; // cannot be: slots name backends inside the map
	__u64 a_load = (__u64)read_live(a) * b->weight;
	__u64 b_load = (__u64)read_live(b) * a->weight;

	return b_load < a_load ? second : first;
}

static __always_inline __u32 apply_policy(const struct service *service, __u32 policy, __u64 client, __u64 random)
{
	struct slot slot = {};

	if (policy == POLICY_ROUND_ROBIN)
		return take_turn(service);
	if (policy == POLICY_LEAST_CONN)
		return choose_less_loaded(service, random);
	if (policy == POLICY_MAGLEV) {
		load_slot(service, hash_slot(hash_mix(client), service->slots), &slot);
		return slot.backend;
	}
	return draw(service, random >> 32, &slot);
}

// Whether new connections may go to the backend, as far as its state says.
static __always_inline bool takes_new(const struct backend_record *backend)
{
	return backend->state == BACKEND_ACTIVE || backend->state == BACKEND_TRIED;
}

static __always_inline bool is_ejected(const struct backend_record *backend, __u64 now)
{
	return *(volatile __u64 *)&backend->ejected_until > now;
}

// The entry of a block with BLOCK_EJECT that says when backends are ejected.
static __always_inline const struct block_eject *eject_of(__u32 header, __u32 slots)
{
	__u32 at = header + 1 + slots;
	union block_entry *entry = bpf_map_lookup_elem(&Slot_Map, &at);

	return entry ? &entry->eject : NULL;
}

// Instead of a backend that is ejected: another draw by weight, and when a few of those fail, too, the first of its group
// that is not ejected, from a place of chance. There is one, since at most half of them are. `random` is the client's hash
// with Maglev: so each client keeps its second choice as it keeps the first.
static __always_inline __u32 avoid_ejected(const struct service *service, __u32 policy, __u64 random, __u32 chosen)
{
	const bool has_sides = policy == POLICY_RANDOM || policy == POLICY_LEAST_CONN;
	struct backend_record *backend = bpf_map_lookup_elem(&Backend_Map, &chosen);
	if (!backend || !*(volatile __u64 *)&backend->ejected_until)
		return chosen;
	__u64 now = bpf_ktime_get_ns();
	if (!is_ejected(backend, now))
		return chosen;

#pragma clang loop unroll(full)
	for (int i = 0; i < EJECT_REDRAWS; i++) {
		struct slot slot = {};
		random = hash_mix(random);
		__u64 product = (random >> 32) * service->slots;
		if (!load_slot(service, product >> 32, &slot))
			return chosen;
		__u32 other = has_sides ? side_of(&slot, (__u32)product) : slot.backend;
		struct backend_record *record = bpf_map_lookup_elem(&Backend_Map, &other);
		if (record && !is_ejected(record, now))
			return other;
	}

	const struct block_eject *eject = eject_of(service->header, service->slots);
	__u32 place = *(volatile __u32 *)&backend->place;
	if (!eject || place >= eject->members)
		return chosen;
	struct eject_group group = eject_group_of(place, eject->members);
	__u32 first = service->header + eject->first + group.first;
	__u32 at = ((__u64)(__u32)random * group.size) >> 32;

#pragma clang loop unroll(full)
	for (__u32 i = 0; i < EJECT_GROUP; i++) {
		__u32 index = first + at;
		union block_entry *member = bpf_map_lookup_elem(&Slot_Map, &index);
		if (i >= group.size || !member)
			return chosen;
		__u32 other = member->slot.backend;
		struct backend_record *record = bpf_map_lookup_elem(&Backend_Map, &other);
		if (record && !is_ejected(record, now))
			return other;
		at = at + 1 < group.size ? at + 1 : 0;
	}
	return chosen;
}

// The backend that the client had before, unless it has left, drains, is ejected, or the time is over.
static __always_inline bool recall(const struct affinity_key *key, const struct block_header *header, __u32 *index)
{
	struct affinity *affinity = bpf_map_lookup_elem(&Affinity_Map, key);
	if (!affinity)
		return false;

	// The element may be reused for another client at any moment: the copy is judged by the key in it.
	struct affinity copy = *affinity;
	__u64 now = bpf_ktime_get_ns();
	if (copy.key.client != key->client || copy.key.record != key->record || now >= copy.expires)
		return false;
	struct backend_record *backend = bpf_map_lookup_elem(&Backend_Map, &copy.backend);
	if (!backend || backend->record != key->record || !takes_new(backend) || (has_eject && is_ejected(backend, now)))
		return false;
	affinity->expires = now + (__u64)header->affinity * AFFINITY_UNIT_MS * 1000000;
	*index = copy.backend;
	return true;
}

static __always_inline void remember(const struct affinity_key *key, const struct block_header *header, __u32 index)
{
	struct affinity affinity = {
		.key = *key,
		.expires = bpf_ktime_get_ns() + (__u64)header->affinity * AFFINITY_UNIT_MS * 1000000,
		.backend = index,
	};

	bpf_map_update_elem(&Affinity_Map, key, &affinity, BPF_ANY);
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

// Chooses a backend of the service that find_service() has found.
static __always_inline enum verdict choose(struct bpf_sock_addr *ctx, struct decision *decision, bool can_eject)
{
	const struct service *service = &decision->service;
	union block_entry *block = bpf_map_lookup_elem(&Slot_Map, &service->header);
	if (!block)
		return PASS; // cannot be: words name blocks inside the map
	const struct block_header *header = &block->header;
	if (!service->slots)
		return refuse(service, header);

	__u32 index = stats_index(service->record);
	struct counters *of_service = bpf_map_lookup_elem(&Stats_Map, &index);
	if (!of_service)
		return PASS; // cannot be: all records have counters
	__u64 random = random_bits(index, *(volatile __u64 *)&of_service->connects);

	struct affinity_key key = {.record = service->record};
	decision->reason = REASON_POLICY;
	decision->flags = header->flags;
	decision->mark = header->mark;
	if (header->affinity || header->policy == POLICY_MAGLEV)
		key.client = client_of(ctx, header->client);
	if (header->affinity && recall(&key, header, &decision->backend)) {
		decision->reason = REASON_AFFINITY;
	} else {
		decision->backend = apply_policy(service, header->policy, key.client, random);
		if (can_eject && has_eject && unlikely(header->flags & BLOCK_EJECT))
			decision->backend = avoid_ejected(service, header->policy,
							  header->policy == POLICY_MAGLEV ? hash_mix(key.client) : random,
							  decision->backend);
		if (header->affinity)
			remember(&key, header, decision->backend);
	}
	WIDEN_WINDOW();
	decision->record = bpf_map_lookup_elem(&Backend_Map, &decision->backend);
	struct counters *of_backend = counters_at(stats_backends + decision->backend);
	if (!decision->record || !of_backend)
		return PASS; // cannot be: slots name backends inside the map

	// Among many services none of this is in a cache, and an atomic add lets no load overtake it: so load first, all of it
	// at once.
	(void)*(volatile __be16 *)&decision->record->port;
	(void)*(volatile __u64 *)&of_backend->connects;
	__sync_fetch_and_add(&of_service->connects, 1);
	__sync_fetch_and_add(&of_backend->connects, 1);
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

// An event for whoever listens, to be filled and submitted. Nobody does, nearly always: that costs one load.
static __always_inline struct event *begin_event(void)
{
	__u32 first = 0;
	struct meta_record *meta = bpf_map_lookup_elem(&Meta_Map, &first);
	if (!meta || !meta->events_until)
		return NULL;
	__u64 now = bpf_ktime_get_ns();
	if (now >= meta->events_until)
		return NULL;
	struct event *event = bpf_ringbuf_reserve(&Event_Ring, sizeof(*event), 0);
	if (!event) { // whoever listens is too slow
		__sync_fetch_and_add(&meta->lost_events, 1);
		return NULL;
	}
	__builtin_memset(event, 0, sizeof(*event));
	event->time = now;
	event->lost = *(volatile __u64 *)&meta->lost_events;
	return event;
}

static __always_inline void name_service(struct event *event, __u32 index)
{
	struct service_record *record = bpf_map_lookup_elem(&Record_Map, &index);
	if (record)
		__builtin_memcpy(event->service, record->name, sizeof(event->service));
}

static __always_inline void tell(struct bpf_sock_addr *ctx, const struct service_key *key,
				 const struct decision *decision, enum verdict verdict)
{
	if (!can_events)
		return;
	struct event *event = begin_event();
	if (!event)
		return;
	event->cookie = bpf_get_socket_cookie(ctx);
	event->cgroup = bpf_get_current_cgroup_id();
	event->pid = bpf_get_current_pid_tgid() >> 32;
	if (can_comm)
		bpf_get_current_comm(event->comm, sizeof(event->comm));
	event->asked = *key;
	event->reason = decision->reason;
	event->verdict = EVENT_PASS;
	if (verdict == REWRITTEN)
		event->verdict = EVENT_REWRITTEN;
	else if (verdict == NO_SERVICE)
		event->verdict = EVENT_NO_SERVICE;
	else if (verdict == CONTENDED)
		event->verdict = EVENT_CONTENDED;
	else if (verdict != PASS)
		event->verdict = EVENT_NO_BACKEND;
	if (verdict != PASS && verdict != REWRITTEN)
		event->error = verdict == NO_BACKEND_UNREACHED ? EHOSTUNREACH : ECONNREFUSED;
	if (verdict == REWRITTEN && decision->record) {
		__builtin_memcpy(event->backend, decision->record->address, sizeof(event->backend));
		event->backend_port = decision->record->port;
	}
	if (verdict != NO_SERVICE && verdict != CONTENDED) {
		struct slot slot = {};
		if (decision->service.slots && load_slot(&decision->service, 0, &slot))
			event->backends = slot.choices;
		name_service(event, decision->service.record);
	}
	bpf_ringbuf_submit(event, 0);
}

// The socket no longer counts at its backend. Whoever comes second finds nothing to do.
static __always_inline void give_back(struct session *session)
{
	bpf_spin_lock(&session->lock);
	__u32 counted = session->counted;
	session->counted = 0;
	bpf_spin_unlock(&session->lock);
	if (!counted)
		return;

	__u32 index = session->backend;
	struct backend_record *backend = bpf_map_lookup_elem(&Backend_Map, &index);
	if (backend)
		__sync_fetch_and_add(&backend->live, -1);
}

// No lock: the socket is locked, and has no end of a connection to come before this one has begun.
static __always_inline void count_session(struct session *session, struct backend_record *backend)
{
	if (session->counted)
		return;
	__sync_fetch_and_add(&backend->live, 1);
	session->counted = 1;
}

// A new connect() makes the socket what it was before the last one.
static __always_inline void end_session(struct bpf_sock_addr *ctx, struct session *session)
{
	if (!session->asked.protocol)
		return;
	give_back(session);
	session->asked.protocol = 0;
	if (can_mark && session->flags & BLOCK_MARK) {
		__u32 mark = session->mark_before;
		bpf_setsockopt(ctx, SOL_SOCKET, SO_MARK, &mark, sizeof(mark));
	}
}

static __always_inline void begin_session(struct bpf_sock_addr *ctx, struct session *session,
					  const struct service_key *key, const struct decision *decision)
{
	struct backend_record *backend = decision->record;
	if (!session || !backend)
		return; // no memory: the connection works, but getpeername() shows the backend
	__builtin_memcpy(session->address, backend->address, sizeof(session->address));
	session->port = backend->port;
	session->backend = decision->backend;
	session->record = decision->service.record;
	session->flags = decision->flags;
	session->trying = 0;
	if (can_mark && decision->flags & BLOCK_MARK) {
		__u32 mark = decision->mark;
		session->mark_before = ctx->sk->mark;
		bpf_setsockopt(ctx, SOL_SOCKET, SO_MARK, &mark, sizeof(mark));
	}
	// A connection that fails before its SYN is never heard of again when the socket is the kernel's own, as below MPTCP.
	if (!has_sock_ops || key->protocol != IPPROTO_TCP)
		count_session(session, backend);
	session->asked = *key;
}

// Whether connected sockets of the service have sessions.
static __always_inline bool is_remembered(const struct service *service)
{
	union block_entry *block = bpf_map_lookup_elem(&Slot_Map, &service->header);

	return block && service->slots && block->header.flags & BLOCK_SESSION;
}

// connect(), both families: where the socket is to go is in `decision->record` when the verdict is REWRITTEN.
static __always_inline enum verdict decide_connect(struct bpf_sock_addr *ctx, const struct service_key *key,
						   struct decision *decision)
{
	bool is_candidate = may_be_vip(key->address);
	enum verdict verdict = is_candidate ? find_service(key, &decision->service) : PASS;
	struct session *session = NULL;

	// One look is for the session that ends here and for the one that begins. It ends before the choice, in which the
	// socket would count against the backend that it leaves.
	if (has_sessions) {
		__u64 flags = verdict == REWRITTEN && is_remembered(&decision->service) ? BPF_SK_STORAGE_GET_F_CREATE : 0;
		session = bpf_sk_storage_get(&Session_Map, ctx->sk, NULL, flags);
		if (session)
			end_session(ctx, session);
	}
	if (!is_candidate)
		return PASS;
	if (verdict == PASS) {
		verdict = check_vip(key);
		if (verdict == PASS)
			return PASS;
	}
	if (verdict == REWRITTEN)
		verdict = choose(ctx, decision, true);
	if (has_sessions && verdict == REWRITTEN && decision->flags & BLOCK_SESSION)
		begin_session(ctx, session, key, decision);
	tell(ctx, key, decision, verdict);
	return verdict;
}

// The backend that a socket was given, unless its index has become another one's.
static __always_inline struct backend_record *same_backend(__u32 index, __u32 record, const __be32 address[4],
							   __be16 port)
{
	struct backend_record *backend = bpf_map_lookup_elem(&Backend_Map, &index);
	if (!backend || backend->record != record || backend->port != port || backend->address[0] != address[0] ||
	    backend->address[1] != address[1] || backend->address[2] != address[2] || backend->address[3] != address[3])
		return NULL;
	return backend;
}

// The same, if it is still one of the service's that takes what is sent.
static __always_inline struct backend_record *still_serves(__u32 index, __u32 record, const __be32 address[4],
							   __be16 port)
{
	struct backend_record *backend = same_backend(index, record, address, port);

	return backend && (takes_new(backend) || backend->state == BACKEND_DRAIN) ? backend : NULL;
}

// Hides from the compiler where a pointer comes from. Otherwise it makes one address of several that differ by a constant,
// and adds what it has chosen: for that, the verifier asks for CAP_PERFMON.
#define OPAQUE(pointer_) asm volatile("" : "+r"(pointer_))

// What the socket has sent to this VIP before went to a backend, and what it sends now goes there, too.
static __always_inline bool recall_flow(const struct flows *flows, const struct service_key *key,
					struct decision *decision, __u32 *place)
{
	struct flow found = {};

#pragma clang loop unroll(full)
	for (__u32 i = 0; i < FLOWS; i++) {
		const struct flow *flow = &flows->flow[i];
		OPAQUE(flow);
		if (differs(&flow->asked, key))
			continue;
		found = *flow;
		*place = i;
	}
	if (*place == FLOWS)
		return false;
	if (found.record == decision->service.record)
		decision->record = still_serves(found.backend, found.record, found.address, found.port);
	decision->backend = found.backend;
	return true;
}

static __always_inline void keep_flow(struct flows *flows, const struct service_key *key,
				      const struct decision *decision, __u32 place)
{
	struct backend_record *backend = decision->record;

	// The place is compared rather than used as an index, for the same reason.
#pragma clang loop unroll(full)
	for (__u32 i = 0; i < FLOWS; i++) {
		struct flow *flow = &flows->flow[i];
		OPAQUE(flow);
		if (i != place || !backend)
			continue;
		flow->asked = *key;
		flow->record = decision->service.record;
		__builtin_memcpy(flow->address, backend->address, sizeof(flow->address));
		flow->port = backend->port;
		flow->backend = decision->backend;
	}
}

// A datagram with a destination: as decide_connect(), but the socket stays what it is.
static __always_inline enum verdict decide_send(struct bpf_sock_addr *ctx, const struct service_key *key,
						struct decision *decision)
{
	if (!may_be_vip(key->address))
		return PASS;
	enum verdict verdict = find_service(key, &decision->service);
	if (verdict == PASS) {
		verdict = check_vip(key);
		if (verdict != PASS)
			tell(ctx, key, decision, verdict);
		return verdict;
	}
	if (verdict != REWRITTEN || !has_udp) {
		tell(ctx, key, decision, verdict);
		return verdict;
	}

	// sendto() on a connected socket: from another backend it would get no reply.
	struct session *session = bpf_sk_storage_get(&Session_Map, ctx->sk, NULL, 0);
	if (session && same_key(&session->asked, key) && session->record == decision->service.record) {
		decision->record = still_serves(session->backend, session->record, session->address, session->port);
		if (decision->record)
			return REWRITTEN;
	}
	__u32 place = FLOWS;
	struct flows *flows = bpf_sk_storage_get(&Flow_Map, ctx->sk, NULL, 0);
	if (flows && recall_flow(flows, key, decision, &place) && decision->record)
		return REWRITTEN;

	verdict = choose(ctx, decision, false);
	if (verdict == REWRITTEN) {
		if (!flows)
			flows = bpf_sk_storage_get(&Flow_Map, ctx->sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
		if (flows) {
			if (place == FLOWS)
				place = flows->next++ % FLOWS;
			keep_flow(flows, key, decision, place);
		}
	}
	tell(ctx, key, decision, verdict);
	return verdict;
}

static __always_inline bool same_endpoint(const __be32 a[4], __be16 a_port, const __be32 b[4], __be16 b_port)
{
	return a_port == b_port && a[3] == b[3] && a[2] == b[2] && a[1] == b[1] && a[0] == b[0];
}

// What the socket's peer is called: the VIP, if it is connected to the backend that this stood for.
static __always_inline bool name_peer(struct bpf_sock_addr *ctx, const struct service_key *peer, __u32 flags,
				      struct service_key *asked)
{
	struct session *session = bpf_sk_storage_get(&Session_Map, ctx->sk, NULL, 0);
	if (!session || !session->asked.protocol || (session->flags & flags) != flags ||
	    !same_endpoint(session->address, session->port, peer->address, peer->port))
		return false;
	*asked = session->asked;
	count_reversed(session->record);
	count_reversed(stats_backends + session->backend);
	return true;
}

// Who has sent a datagram: of two VIPs that share a backend, nobody could tell which one was meant.
static __always_inline bool name_sender(struct bpf_sock_addr *ctx, const struct service_key *sender,
					struct service_key *asked)
{
	if (name_peer(ctx, sender, 0, asked))
		return true;
	struct flows *flows = bpf_sk_storage_get(&Flow_Map, ctx->sk, NULL, 0);
	if (!flows)
		return false;

	struct flow found = {};
#pragma clang loop unroll(full)
	for (__u32 i = 0; i < FLOWS; i++) {
		const struct flow *flow = &flows->flow[i];
		OPAQUE(flow);
		if ((flow->address[0] ^ sender->address[0]) | (flow->address[1] ^ sender->address[1]) |
		    (flow->address[2] ^ sender->address[2]) | (flow->address[3] ^ sender->address[3]) |
		    (flow->port ^ sender->port))
			continue;
		found = *flow;
	}
	if (!found.asked.protocol)
		return false;
	*asked = found.asked;
	count_reversed(found.record);
	count_reversed(stats_backends + found.backend);
	return true;
}

// How many of a group are ejected, but for one. Adding up signs leaves the verifier one way through.
static __always_inline __u32 count_ejected(__u32 first, __u32 size, __u32 but, __u64 now)
{
	__u32 count = 0;

#pragma clang loop unroll(full)
	for (__u32 i = 0; i < EJECT_GROUP; i++) {
		__u32 at = first + i;
		union block_entry *member = bpf_map_lookup_elem(&Slot_Map, &at);
		if (i >= size || !member)
			break;
		__u32 index = member->slot.backend;
		struct backend_record *record = bpf_map_lookup_elem(&Backend_Map, &index);
		if (record && index != but)
			count += (now - *(volatile __u64 *)&record->ejected_until) >> 63;
	}
	return count;
}

// A connect has failed: ejects its backend when that was one too many in a row. Without a lock: CPUs that eject two of a
// group at once each see the other, and never leave more than half of it ejected.
static __always_inline void fail_backend(struct bpf_sock_ops *ctx, const struct session *session,
					 struct backend_record *backend)
{
	__u64 now = bpf_ktime_get_ns();
	__u32 ejections = *(volatile __u32 *)&backend->ejections; // before the next: see below
	if (is_ejected(backend, now))
		return; // the connect began before that
	__u32 record = session->record;
	struct service_record *service = bpf_map_lookup_elem(&Record_Map, &record);
	if (!service)
		return;
	__u64 word = *(volatile __u64 *)&service->word;
	__u32 header = (__u32)word;
	union block_entry *block = bpf_map_lookup_elem(&Slot_Map, &header);
	if (!word || !block || !(block->header.flags & BLOCK_EJECT))
		return;
	const struct block_eject *eject = eject_of(header, word >> 32);
	if (!eject)
		return;

	__u32 place = *(volatile __u32 *)&backend->place;
	if (place >= eject->members)
		return;

	// Added, then read: of two connects that fail at once, at least one sees both.
	__sync_fetch_and_add(&backend->failures, 1);
	if (*(volatile __u32 *)&backend->failures < eject->failures)
		return;
	struct eject_group group = eject_group_of(place, eject->members);
	__u32 first = header + eject->first + group.first;
	__u32 self = header + eject->first + place;
	union block_entry *member = bpf_map_lookup_elem(&Slot_Map, &self);
	if (!member || member->slot.backend != session->backend)
		return; // the block is being replaced: the next failure will do
	if (2 * (count_ejected(first, group.size, session->backend, now) + 1) > group.size)
		return;

	__u32 doublings = ejections < EJECT_DOUBLINGS ? ejections : EJECT_DOUBLINGS;
	*(volatile __u64 *)&backend->ejected_until = now + (((__u64)eject->time * 1000000) << doublings);
	// An atomic add of nothing, so that other CPUs, and who publishes a new block, see what was stored before we look at
	// what they have stored. (Where it is no barrier, as on arm64, more than half may be ejected until a time is over:
	// then a choice falls back on what was chosen first.)
	__u64 nothing = 0;
	OPAQUE(nothing);
	__sync_fetch_and_add(&backend->ejected_until, nothing);
	if (*(volatile __u64 *)&service->word != word ||
	    2 * (count_ejected(first, group.size, session->backend, now) + 1) > group.size) {
		*(volatile __u64 *)&backend->ejected_until = 0;
		return;
	}
	// A plain store of what was read first: who fails here at the same moment does not double the time twice.
	*(volatile __u32 *)&backend->ejections = ejections + 1;
	if (!can_events)
		return;
	struct event *event = begin_event();
	if (!event)
		return;
	event->cookie = bpf_get_socket_cookie(ctx);
	event->asked = session->asked;
	event->verdict = EVENT_EJECTED;
	event->backends = eject->members;
	__builtin_memcpy(event->backend, session->address, sizeof(event->backend));
	event->backend_port = session->port;
	name_service(event, session->record);
	bpf_ringbuf_submit(event, 0);
}

// A connection stands: the row of failures is over. One that began before an ejection does not end that.
static __always_inline void restore_backend(struct backend_record *backend)
{
	__u64 until = *(volatile __u64 *)&backend->ejected_until;
	if (until && bpf_ktime_get_ns() < until)
		return;
	if (until)
		*(volatile __u64 *)&backend->ejected_until = 0;
	if (*(volatile __u32 *)&backend->failures)
		*(volatile __u32 *)&backend->failures = 0;
	if (*(volatile __u32 *)&backend->ejections)
		*(volatile __u32 *)&backend->ejections = 0;
}

// The connection stands, or has failed. To give up before it stands, by close(), is a failure, too: that is how applications
// find that a host is gone.
static __always_inline void end_attempt(struct bpf_sock_ops *ctx, struct session *session, __u32 state)
{
	if (state != BPF_TCP_CLOSE && state != BPF_TCP_ESTABLISHED)
		return;
	session->trying = 0;
	bool can_eject = has_eject && session->flags & BLOCK_EJECT;
	if (state == BPF_TCP_ESTABLISHED && !can_eject)
		return;
	struct backend_record *backend =
		same_backend(session->backend, session->record, session->address, session->port);
	if (!backend)
		return;
	if (state == BPF_TCP_ESTABLISHED) {
		restore_backend(backend);
		return;
	}
	struct counters *counters = counters_at(stats_backends + session->backend);
	if (counters)
		__sync_fetch_and_add(&counters->failures, 1);
	if (can_eject)
		fail_backend(ctx, session, backend);
}

static __always_inline bool is_served(const struct bpf_sock_addr *ctx)
{
	return ctx->protocol == IPPROTO_TCP || ctx->protocol == IPPROTO_UDP;
}

static __always_inline void read_v4(const struct bpf_sock_addr *ctx, struct service_key *key)
{
	key->address[0] = 0;
	key->address[1] = 0;
	key->address[2] = bpf_htonl(0xffff);
	key->address[3] = ctx->user_ip4;
	key->port = (__be16)ctx->user_port;
	key->protocol = (__u8)ctx->protocol;
	key->zero = 0;
}

// Also of an IPv6 socket with an IPv4 destination: that is written as v4-mapped, here as in our keys.
static __always_inline void read_v6(const struct bpf_sock_addr *ctx, struct service_key *key)
{
	key->address[0] = ctx->user_ip6[0];
	key->address[1] = ctx->user_ip6[1];
	key->address[2] = ctx->user_ip6[2];
	key->address[3] = ctx->user_ip6[3];
	key->port = (__be16)ctx->user_port;
	key->protocol = (__u8)ctx->protocol;
	key->zero = 0;
}

static __always_inline void write_v4(struct bpf_sock_addr *ctx, const __be32 address[4], __be16 port)
{
	ctx->user_ip4 = address[3];
	ctx->user_port = port;
}

static __always_inline void write_v6(struct bpf_sock_addr *ctx, const __be32 address[4], __be16 port)
{
	ctx->user_ip6[0] = address[0];
	ctx->user_ip6[1] = address[1];
	ctx->user_ip6[2] = address[2];
	ctx->user_ip6[3] = address[3];
	ctx->user_port = port;
}

SEC("cgroup/connect4")
int sock4_connect(struct bpf_sock_addr *ctx)
{
	struct service_key key;
	struct decision decision = {};

	// The kernel refuses another family, but only behind this program: the socket stays what it is.
	if (!is_served(ctx) || ctx->user_family != AF_INET)
		return 1;
	read_v4(ctx, &key);
	enum verdict verdict = decide_connect(ctx, &key, &decision);
	if (verdict == REWRITTEN && decision.record)
		write_v4(ctx, decision.record->address, decision.record->port);
	return answer(verdict);
}

SEC("cgroup/connect6")
int sock6_connect(struct bpf_sock_addr *ctx)
{
	struct service_key key;
	struct decision decision = {};

	// The kernel refuses another family, but only behind this program: the socket stays what it is.
	if (!is_served(ctx) || ctx->user_family != AF_INET6)
		return 1;
	read_v6(ctx, &key);
	enum verdict verdict = decide_connect(ctx, &key, &decision);
	if (verdict == REWRITTEN && decision.record)
		write_v6(ctx, decision.record->address, decision.record->port);
	return answer(verdict);
}

SEC("cgroup/sendmsg4")
int sock4_sendmsg(struct bpf_sock_addr *ctx)
{
	struct service_key key;
	struct decision decision = {};

	if (!is_served(ctx))
		return 1;
	read_v4(ctx, &key);
	enum verdict verdict = decide_send(ctx, &key, &decision);
	if (verdict == REWRITTEN && decision.record)
		write_v4(ctx, decision.record->address, decision.record->port);
	return answer(verdict);
}

SEC("cgroup/sendmsg6")
int sock6_sendmsg(struct bpf_sock_addr *ctx)
{
	struct service_key key;
	struct decision decision = {};

	if (!is_served(ctx))
		return 1;
	read_v6(ctx, &key);
	enum verdict verdict = decide_send(ctx, &key, &decision);
	if (verdict == REWRITTEN && decision.record)
		write_v6(ctx, decision.record->address, decision.record->port);
	return answer(verdict);
}

SEC("cgroup/recvmsg4")
int sock4_recvmsg(struct bpf_sock_addr *ctx)
{
	struct service_key sender, asked;

	read_v4(ctx, &sender);
	if (name_sender(ctx, &sender, &asked))
		write_v4(ctx, asked.address, asked.port);
	return 1;
}

SEC("cgroup/recvmsg6")
int sock6_recvmsg(struct bpf_sock_addr *ctx)
{
	struct service_key sender, asked;

	read_v6(ctx, &sender);
	if (name_sender(ctx, &sender, &asked))
		write_v6(ctx, asked.address, asked.port);
	return 1;
}

SEC("cgroup/getpeername4")
int sock4_getpeer(struct bpf_sock_addr *ctx)
{
	struct service_key peer, asked;

	read_v4(ctx, &peer);
	if (name_peer(ctx, &peer, BLOCK_NAMED, &asked))
		write_v4(ctx, asked.address, asked.port);
	return 1;
}

SEC("cgroup/getpeername6")
int sock6_getpeer(struct bpf_sock_addr *ctx)
{
	struct service_key peer, asked;

	read_v6(ctx, &peer);
	if (name_peer(ctx, &peer, BLOCK_NAMED, &asked))
		write_v6(ctx, asked.address, asked.port);
	return 1;
}

SEC("cgroup/sock_release")
int sock_release(struct bpf_sock *sk)
{
	struct session *session = bpf_sk_storage_get(&Session_Map, sk, NULL, 0);

	if (session)
		give_back(session);
	return 1;
}

// The fate of a connection that was rewritten: no hook above runs when it fails or is torn down. It counts from its SYN on,
// since from there on every way ends in TCP_CLOSE.
SEC("sockops")
int sock_ops(struct bpf_sock_ops *ctx)
{
	if (ctx->op != BPF_SOCK_OPS_TCP_CONNECT_CB && ctx->op != BPF_SOCK_OPS_STATE_CB)
		return 1;
	struct bpf_sock *sk = ctx->sk;
	if (!sk)
		return 1;
	struct session *session = bpf_sk_storage_get(&Session_Map, sk, NULL, 0);
	if (!session)
		return 1;
	if (ctx->op == BPF_SOCK_OPS_STATE_CB) {
		__u32 state = ctx->args[1];
		if (session->trying)
			end_attempt(ctx, session, state);
		if (state == BPF_TCP_CLOSE)
			give_back(session);
		return 1;
	}
	__u32 index = session->backend;
	struct backend_record *backend = bpf_map_lookup_elem(&Backend_Map, &index);
	if (backend && session->asked.protocol) {
		session->trying = 1;
		count_session(session, backend);
		bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
	}
	return 1;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
