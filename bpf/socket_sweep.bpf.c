// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
//
// Ends connected sockets whose backend has left: a connected UDP socket would go on sending to nobody. Iterators over the
// sockets of one network namespace, run by the plugin after a change; unlike the fast path they need the running kernel's
// BTF, bpf_sock_destroy() (Linux 6.5) and CAP_PERFMON.
#include <linux/bpf.h>
#include <stdbool.h>
#include <stddef.h>

#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

#include "map_layout.h"

#define ESTABLISHED 1 // TCP_ESTABLISHED, which a connected UDP socket has, too
#define AF_INET 2

// What is used of the kernel's own types; libbpf finds the places of the members.
struct in6_addr {
	union {
		__be32 u6_addr32[4];
	} in6_u;
} __attribute__((preserve_access_index));

struct sock_common {
	__be32 skc_daddr;
	__be16 skc_dport;
	unsigned short skc_family;
	volatile unsigned char skc_state;
	struct in6_addr skc_v6_daddr;
} __attribute__((preserve_access_index));

struct sock {
	struct sock_common __sk_common;
} __attribute__((preserve_access_index));

struct bpf_iter_meta;
struct udp_sock;

struct bpf_iter__udp {
	struct bpf_iter_meta *meta;
	struct udp_sock *udp_sk;
} __attribute__((preserve_access_index));

struct bpf_iter__tcp {
	struct bpf_iter_meta *meta;
	struct sock_common *sk_common;
} __attribute__((preserve_access_index));

int bpf_sock_destroy(struct sock_common *sk) __ksym;

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct session);
} Session_Map SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct backend_record);
} Backend_Map SEC(".maps");

// Whether the socket was given a backend that is not its service's any more. What it was given before its last connect()
// does not count: that one has ended the session.
static __always_inline bool has_left(const struct session *session)
{
	__u32 index = session->backend;
	struct backend_record *backend = bpf_map_lookup_elem(&Backend_Map, &index);

	if (!session->asked.protocol || !backend)
		return false;
	return backend->state == BACKEND_UNUSED || backend->record != session->record || backend->port != session->port ||
	       backend->address[0] != session->address[0] || backend->address[1] != session->address[1] ||
	       backend->address[2] != session->address[2] || backend->address[3] != session->address[3];
}

// Whether the socket's peer is what the session says. A connect() that fails behind our program, for want of a route, leaves
// a UDP socket at its old peer.
static __always_inline bool is_connected_to(const struct sock *sk, const struct session *session)
{
	if (sk->__sk_common.skc_dport != session->port)
		return false;
	if (sk->__sk_common.skc_family == AF_INET)
		return sk->__sk_common.skc_daddr == session->address[3];
	if (!bpf_core_field_exists(sk->__sk_common.skc_v6_daddr))
		return true;
	const struct in6_addr *peer = &sk->__sk_common.skc_v6_daddr;
	return peer->in6_u.u6_addr32[0] == session->address[0] && peer->in6_u.u6_addr32[1] == session->address[1] &&
	       peer->in6_u.u6_addr32[2] == session->address[2] && peer->in6_u.u6_addr32[3] == session->address[3];
}

SEC("iter/udp")
int end_udp(struct bpf_iter__udp *ctx)
{
	struct sock *sk = (struct sock *)ctx->udp_sk;
	if (!sk || sk->__sk_common.skc_state != ESTABLISHED)
		return 0;
	struct session *session = bpf_sk_storage_get(&Session_Map, sk, NULL, 0);
	if (session && !(session->flags & BLOCK_KEEP) && has_left(session) && is_connected_to(sk, session))
		bpf_sock_destroy((struct sock_common *)sk);
	return 0;
}

SEC("iter/tcp")
int end_tcp(struct bpf_iter__tcp *ctx)
{
	struct sock_common *common = ctx->sk_common;
	if (!common)
		return 0;
	struct sock *sk = (struct sock *)bpf_skc_to_tcp_sock(common);
	if (!sk)
		return 0; // in TIME_WAIT, or a connection that is not accepted yet
	struct session *session = bpf_sk_storage_get(&Session_Map, sk, NULL, 0);
	if (session && session->flags & BLOCK_RESET && has_left(session))
		bpf_sock_destroy(common);
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
