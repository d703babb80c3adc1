/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * clusterip.h - the C ABI of libclusterip.so.1
 *
 * An application connects to a ClusterIP (VIP), a virtual address that stands for a service; the kernel makes that
 * connection reach one of the service's backends. A host program loads this library with dlopen (or links it), hands
 * it the services as TOML, and attaches it to a cgroup v2:
 *
 *     clusterip *handle;
 *     clusterip_error error = { sizeof error };
 *     clusterip_open(NULL, &handle, &error);
 *     clusterip_load_file(handle, "clusterip.toml", &error);
 *     clusterip_attach(handle, &error);
 *     ...
 *     clusterip_close(handle);
 *
 * With NULL options this attaches to the root of the hierarchy, that is to every process of the machine, for as long as the
 * handle is open.
 *
 * Rules that hold for every function:
 *
 * - Result: 0, or a negative errno. If an error struct is given, it is filled on failure and left alone on success.
 *   The codes that a host should tell apart:
 *     -EOPNOTSUPP  this kernel cannot do it: fall back to the userspace engine
 *     -EPERM       privileges are missing (CAP_BPF and CAP_NET_ADMIN, before Linux 6.8 CAP_PERFMON as well; or root; a
 *                  memory-lock limit before Linux 5.11)
 *     -EBADMSG     the configuration has mistakes; line and column say where the first one is
 *     -ENOTCONN    of clusterip_canary: what was attached is gone, attach again
 *     -EBUSY       another process owns the pinned state at this pin path
 *     -ESTALE      the pins were removed behind this handle's back: close it, and what it has attached ends
 *     -EPROTO      pinned state that is damaged, of another version, or not ours
 *     -ENOTRECOVERABLE  a bug of this library, with what it knows of it
 *     -EINVAL      a misuse of this interface
 *   Others come from the kernel and are explained by the message.
 * - Ownership: strings and structs belong to the caller and are not kept; what a visitor is given is valid only until
 *   the visitor returns.
 * - Threads: a handle is used by one thread of the host at a time; different handles are independent. Functions without a
 *   handle may be called from any thread.
 * - A handle does not survive fork: open it in the process that uses it.
 * - Structs begin with `size`, which the caller sets to sizeof; they only grow, at the end. `reserved` is 0.
 * - The library writes to no stream, installs no signal handler, and keeps no state beside the handles but what it has found
 *   out about the kernel. It starts a thread only with CLUSTERIP_BACKGROUND.
 */
#ifndef CLUSTERIP_H
#define CLUSTERIP_H

#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>

#ifdef __cplusplus
extern "C" {
#endif

#define CLUSTERIP_ABI_MAJOR 1u
#define CLUSTERIP_ABI_MINOR 3u

/* An instance of the fast path. Opaque. */
typedef struct clusterip clusterip;

/* Why a call failed. `message` is one line without a newline, NUL-terminated, cut at its end if need be. */
typedef struct {
	size_t size;
	int32_t code;          /* the negative errno that the function returned */
	uint32_t line, column; /* position in the configuration, from 1; 0: not about the configuration */
	uint32_t reserved;
	char message[512];
} clusterip_error;

/* clusterip_options.flags */
#define CLUSTERIP_ENGINE_TABLE 1u /* a path left NULL is taken from [engine] of the configuration that is loaded first */
/*
 * Services that this kernel cannot carry are left to the userspace engine, rather than refuse all of it with -EOPNOTSUPP:
 * what applications send to them passes untouched. clusterip_visit_services gives each with CLUSTERIP_ENGINE_USERSPACE
 * and the reason; its backends only in the handle that loaded it.
 */
#define CLUSTERIP_ALLOW_PARTIAL 2u
/*
 * One thread of the library's own runs the health checks that the configuration asks for (`health`): from the first load_*
 * that asks for some to detach or close, with all signals blocked. A backend that fails is CLUSTERIP_DOWN until it answers
 * again, whatever load_* and set_backends bring meanwhile. Without this flag `health` is accepted, and the host checks:
 * clusterip_set_backend_state. With it, a backend is given new connections when the host and the checks agree. Neither
 * detach nor close may then be called from a visitor: they wait for the thread, and that may be waiting for the visits.
 */
#define CLUSTERIP_BACKGROUND 4u
/* [engine] mode of the configurations is not asked: the host has chosen the engine. */
#define CLUSTERIP_ANY_MODE 8u

typedef struct {
	size_t size;
	const char *cgroup_path; /* cgroup v2 directory to attach to; NULL: [engine] cgroup, by default the hierarchy's root */
	const char *pin_path;    /* directory on a BPF filesystem that keeps the fast path alive; NULL: nothing is pinned */
	uint32_t flags;          /* CLUSTERIP_ENGINE_TABLE and the other flags above */
	uint32_t reserved;
} clusterip_options;

/* What the kernel can do, each tried and not concluded from a version. */
#define CLUSTERIP_CAN_CONNECT4 1u      /* cgroup/connect4 programs: without them there is no fast path */
#define CLUSTERIP_CAN_MAP_MEMORY 2u    /* memory-mapped arrays (Linux 5.5): without them there is no fast path */
#define CLUSTERIP_CAN_SET_ERRNO 4u     /* bpf_set_retval (Linux 5.18): else a refused connect() fails with EPERM */
#define CLUSTERIP_CAN_LINK 8u          /* bpf_link for cgroups (Linux 5.7): else BPF_PROG_ATTACH with ALLOW_MULTI */
#define CLUSTERIP_CAN_MEMBARRIER 16u   /* MEMBARRIER_CMD_GLOBAL: else a map-in-map update waits for readers */
#define CLUSTERIP_CAN_BATCH 32u        /* batched map updates (Linux 5.6): else one system call per service */
#define CLUSTERIP_CAN_SESSIONS 64u     /* socket storage (Linux 5.3): without it there is no fast path */
#define CLUSTERIP_CAN_CONNECT6 128u    /* cgroup/connect6: IPv6 sockets, also to IPv4 VIPs */
#define CLUSTERIP_CAN_SENDMSG 256u     /* cgroup/sendmsg4 and 6 (Linux 4.18): UDP services */
#define CLUSTERIP_CAN_RECVMSG 512u     /* cgroup/recvmsg4 and 6 (Linux 5.2): UDP services */
#define CLUSTERIP_CAN_GETPEER 1024u    /* cgroup/getpeername4 and 6 (Linux 5.8): else getpeername() shows the backend */
#define CLUSTERIP_CAN_RELEASE 2048u    /* cgroup/sock_release (Linux 5.9): live counts, least_conn */
#define CLUSTERIP_CAN_SOCK_OPS 4096u   /* sock_ops: a failed connect counts no longer than it lasts; `eject` */
#define CLUSTERIP_CAN_MARK 8192u       /* bpf_setsockopt in connect hooks (Linux 5.8): `mark` */
#define CLUSTERIP_CAN_NETNS_CLIENT 16384u  /* bpf_get_netns_cookie (Linux 5.7): client = "netns" */
#define CLUSTERIP_CAN_CGROUP_CLIENT 32768u /* bpf_get_current_cgroup_id (Linux 5.7): client = "cgroup" */
#define CLUSTERIP_CAN_EVENTS 65536u    /* ring buffer (Linux 5.8) and who the caller is: events */
#define CLUSTERIP_CAN_DESTROY 131072u  /* bpf_sock_destroy (Linux 6.5), BTF, CAP_PERFMON: ending sockets of backends that left */

typedef struct {
	size_t size;
	uint32_t can; /* CLUSTERIP_CAN_* */
	uint32_t reserved;
	char reason[256]; /* why there is no fast path; empty when there is one */
} clusterip_capabilities;

typedef struct {
	size_t size;         /* of one element; an array's elements all have the first one's */
	const char *address; /* "10.244.1.2" */
	uint16_t port;       /* host byte order, 1 to 65535 */
	uint16_t reserved;
	uint32_t weight;     /* 1 to 65535; 0 counts as 1 */
	uint32_t state;      /* CLUSTERIP_ACTIVE, CLUSTERIP_DRAIN or CLUSTERIP_DOWN */
} clusterip_backend;

#define CLUSTERIP_ACTIVE 0u
#define CLUSTERIP_DRAIN 1u /* no new connections; those that live go on */
#define CLUSTERIP_DOWN 2u  /* the same; what unconnected UDP sockets send goes to another backend at once */

/* Engines that can carry a service. */
#define CLUSTERIP_ENGINE_BPF 1u
#define CLUSTERIP_ENGINE_USERSPACE 2u

typedef struct {
	size_t size;
	const char *name;
	const char *vip;     /* numeric address */
	const char *policy;  /* as in the TOML */
	const char *no_backend;
	const char *reason;  /* why this engine carries the service; empty when nothing speaks against the fast path */
	uint64_t connects;   /* connects rewritten to a backend since the fast path was first loaded */
	uint64_t refused;    /* connects refused since then because there was no backend */
	uint32_t engine;     /* CLUSTERIP_ENGINE_* */
	uint32_t backends;   /* visits of a backend that follow */
	uint16_t port;       /* host byte order */
	uint8_t protocol;    /* IPPROTO_TCP or IPPROTO_UDP */
	uint8_t reserved[5];
	uint64_t live;       /* sum over the backends */
	uint64_t reversed;   /* addresses of backends shown as the VIP: getpeername(), and senders of datagrams */
	/* Since ABI 1.3: */
	uint64_t affinity_ms; /* for how long a client keeps its backend (`affinity`); 0: it does not */
} clusterip_service_info;

typedef struct {
	size_t size;
	const char *address; /* numeric address */
	uint64_t connects;   /* connects that chose this backend since it was added */
	uint32_t weight;
	uint32_t state;      /* CLUSTERIP_ACTIVE, CLUSTERIP_DRAIN or CLUSTERIP_DOWN */
	uint16_t port;       /* host byte order */
	uint16_t reserved[3];
	uint64_t live;       /* connected sockets that have this backend now and are remembered (see peer_names) */
	uint64_t reversed;   /* addresses of it that were shown as the VIP */
	/* Since ABI 1.2: */
	uint64_t failures;   /* TCP connects that failed, in all, of sockets that are remembered (peer_names, `eject`) */
	uint32_t ejected_ms; /* for how long it still gets no new connection after failures (`eject`); 0: it is not ejected */
	uint32_t reserved2;
} clusterip_backend_info;

/* What a connect() would meet. */
#define CLUSTERIP_VERDICT_PASS 0u       /* no VIP of ours, or left to the userspace engine: untouched */
#define CLUSTERIP_VERDICT_REWRITTEN 1u  /* reaches `backend` */
#define CLUSTERIP_VERDICT_NO_BACKEND 2u /* the service has no backend: its no_backend applies; or as clusterip_refuse_left_out */
#define CLUSTERIP_VERDICT_NO_SERVICE 3u /* a port of a VIP that no service has: refused */

typedef struct {
	size_t size;
	uint32_t verdict;  /* CLUSTERIP_VERDICT_* */
	uint32_t engine;   /* CLUSTERIP_ENGINE_*; 0 without a service */
	uint32_t backends; /* backends that there were to choose from: active and not ejected; with panic, all that are down */
	uint32_t reserved;
	char service[160]; /* empty without a service */
	struct sockaddr_storage backend;
} clusterip_resolution;

/* What a connect() in the cgroup was seen to do. */
typedef struct {
	size_t size;
	int32_t rewrite_errno; /* 0: rewritten; else the errno of the connect(), EADDRNOTAVAIL when it was not rewritten */
	int32_t refuse_errno;  /* the errno that a refused connect() got; 0: it was not refused */
} clusterip_canary_result;

/* clusterip_event.verdict, beside CLUSTERIP_VERDICT_*: the service was replaced again and again meanwhile; refused */
#define CLUSTERIP_VERDICT_CONTENDED 4u

/*
 * The same: no decision about a connect(), but `backend` of `service` was ejected after failed connects, of which the last
 * was to `vip` by the socket `cookie`. cgroup and pid are 0, comm is empty.
 */
#define CLUSTERIP_VERDICT_EJECTED 5u

/* clusterip_event.reason: why this backend */
#define CLUSTERIP_REASON_NONE 0u     /* no backend was chosen */
#define CLUSTERIP_REASON_POLICY 1u   /* by the service's policy */
#define CLUSTERIP_REASON_AFFINITY 2u /* the client had it before */

/* A decision of the kernel about one connect() to a VIP or the first datagram of an unconnected socket to it; an ejection. */
typedef struct {
	size_t size;
	uint64_t time;   /* CLOCK_MONOTONIC, ns */
	uint64_t cookie; /* of the socket, as SO_COOKIE tells */
	uint64_t cgroup; /* id of the caller's cgroup v2 */
	uint32_t pid;
	uint32_t verdict; /* CLUSTERIP_VERDICT_*; PASS: no_backend = "pass", or left to the userspace engine */
	uint32_t reason;  /* CLUSTERIP_REASON_* */
	int32_t error;    /* the errno of a refusal; 0 */
	uint8_t protocol; /* IPPROTO_TCP or IPPROTO_UDP */
	uint8_t reserved[7];
	struct sockaddr_storage vip;     /* what was asked for */
	struct sockaddr_storage backend; /* with CLUSTERIP_VERDICT_REWRITTEN and CLUSTERIP_VERDICT_EJECTED */
	char comm[16];     /* empty where the loader had no CAP_PERFMON */
	char service[160]; /* empty without a service */
	/* Since ABI 1.2: */
	uint32_t backends; /* that the service's policy chooses from, those that are ejected included */
	uint32_t reserved2;
	uint64_t lost;     /* events lost up to this one, since the fast path was first loaded, because the buffer was full */
} clusterip_event;

/* Return 0 to go on; anything else ends the visits. */
typedef int (*clusterip_event_visitor)(const clusterip_event *event, void *user);

/* One mistake of a configuration: line, column and message ("key: what was expected, got what"). */
typedef void (*clusterip_error_visitor)(const clusterip_error *mistake, void *user);

/* A service (backend NULL), then each of its backends. Return 0 to go on; anything else ends the visits. */
typedef int (*clusterip_service_visitor)(const clusterip_service_info *service, const clusterip_backend_info *backend,
                                         void *user);

/* CLUSTERIP_ABI_MAJOR << 16 | CLUSTERIP_ABI_MINOR of the library: a host refuses another major. */
uint32_t clusterip_abi_version(void);

/* The library's version, "0.1.0". Static storage. */
const char *clusterip_version_string(void);

/*
 * Try what this kernel and these privileges can do. 0 when it could be told, even if there is no fast path: `ret->can`
 * and `ret->reason` say so. -EPERM when privileges are missing to find out.
 */
int clusterip_probe(clusterip_capabilities *ret, clusterip_error *reterr);

/*
 * Open the fast path for a cgroup. `options` NULL: all defaults. Nothing is attached or changed yet. If `pin_path` holds
 * the state of an earlier process, the handle adopts it: it can be looked at (visit, resolve, canary), changed (load,
 * set_backends), taken over (attach) or removed (detach). The first change takes the lock of the pin path and keeps it
 * until close; -EBUSY when another process has it. On success the caller owns *ret, to be given back by clusterip_close.
 * Errors: -EOPNOTSUPP, -EPERM; -ENOENT, -ENOTDIR for a missing cgroup or pin path; -EINVAL when one of them is on a
 * filesystem of another kind.
 */
int clusterip_open(const clusterip_options *options, clusterip **ret, clusterip_error *reterr);

/*
 * Read a configuration and make it the one that serves: all of it or, on failure, nothing of it. Before attach it is
 * only made ready; afterwards, and on adopted state, it is live when the call returns. -EOPNOTSUPP when engine.mode is
 * "userspace", or a service cannot be carried here (see CLUSTERIP_ALLOW_PARTIAL).
 */
int clusterip_load_file(clusterip *handle, const char *path, clusterip_error *reterr);

/* The same from memory. `name` stands for the file in messages. */
int clusterip_load_text(clusterip *handle, const char *toml, size_t length, const char *name, clusterip_error *reterr);

/*
 * Validate a configuration without a handle and without privileges: one visit per mistake, in the order of the text.
 * 0 when there is none, else -EBADMSG.
 */
int clusterip_check_text(const char *toml, size_t length, const char *name, clusterip_error_visitor visit, void *user);

/*
 * Replace the backends of one service: a feed for hosts that learn of backends otherwise than by the file. Costs what the
 * service is large, whatever else there is; one store publishes it. A later load_* replaces it again. `count` 0: the
 * service has no backend. Errors: -ENOENT no such service; -EBADMSG an element that the configuration would not accept.
 */
int clusterip_set_backends(clusterip *handle, const char *service, const clusterip_backend *backends, size_t count,
                           clusterip_error *reterr);

/*
 * Say whether a backend may be given new connections: for a host's own health checks. `backend` is a sockaddr_in or
 * sockaddr_in6, state CLUSTERIP_ACTIVE, CLUSTERIP_DRAIN or CLUSTERIP_DOWN. Costs what clusterip_set_backends does.
 * CLUSTERIP_DOWN lasts until this or clusterip_set_backends says otherwise, the backend leaves, or a load_* of a
 * configuration in which the service does not ask for `health`, or which drains the backend: a load_* of one that asks for
 * it keeps what is down, also in adopted state, so that neither a reload nor a restart sends a connection to a backend that
 * is known to be down. Other states last until the next load_*. When all backends of a service with `panic` are down, they
 * are used as if they were active, and still told as down. Errors: -ENOENT no such service, or it has no such backend.
 */
int clusterip_set_backend_state(clusterip *handle, const char *service, const struct sockaddr *backend, socklen_t length,
                                uint32_t state, clusterip_error *reterr);

/*
 * Refuse connects to what is left to the userspace engine (CLUSTERIP_ALLOW_PARTIAL), until the next load_*: for a host whose
 * userspace engine ends and whose pins stay. They would pass otherwise, and leave this machine where there is a default route.
 * 0 also when nothing is left to it. Since ABI 1.2.
 */
int clusterip_refuse_left_out(clusterip *handle, clusterip_error *reterr);

/*
 * Make it live: attach to the cgroup and, with a pin path, pin everything. On adopted state the program is exchanged in
 * place, and no connect() meets a moment without one. On failure nothing is attached that was not before.
 */
int clusterip_attach(clusterip *handle, clusterip_error *reterr);

/*
 * Take it away: detach what this handle or its pin path has attached, and remove the pins. Nothing of others is touched.
 * 0 also when there was nothing.
 */
int clusterip_detach(clusterip *handle, clusterip_error *reterr);

/*
 * Which backend would a connect() to this address reach now? Decided by the rule and the state that the kernel uses; with
 * a random policy each call draws anew. `vip` is a sockaddr_in or sockaddr_in6; protocol IPPROTO_TCP or IPPROTO_UDP.
 * Errors: -EAFNOSUPPORT; -ENOENT nothing is loaded.
 */
int clusterip_resolve(clusterip *handle, const struct sockaddr *vip, socklen_t length, int protocol,
                      clusterip_resolution *ret, clusterip_error *reterr);

/*
 * Visit every service and backend as the kernel has them, with their counters. Returns what ended the visits (0, or the
 * visitor's value), or a negative errno.
 */
int clusterip_visit_services(clusterip *handle, clusterip_service_visitor visit, void *user, clusterip_error *reterr);

/*
 * Prove that the hook is at work: a short-lived child in the cgroup connects UDP sockets (no traffic) to a reserved VIP. Where
 * it may not be moved there, it does so where this process is, which has to be below that cgroup: in a container, for one.
 * 0 when the connect() was rewritten and the one to an unserved port refused; ret (may be NULL) has what was seen.
 * Errors: -ENOTCONN not attached, not rewritten, or the cgroup that was attached to is not there any more: what was attached
 * is gone, and clusterip_attach on the same handle attaches anew; -EPROTO not refused; -ESTALE the pins were removed: what serves ends
 * with this handle; -EEXIST a fast path with other pins is attached to the same cgroup and may decide first.
 */
int clusterip_canary(clusterip *handle, clusterip_canary_result *ret, clusterip_error *reterr);

/*
 * Which VIP did this connected socket ask for? `socket` is a descriptor of the calling process; *ret a sockaddr_in or
 * sockaddr_in6. Errors: -ENOENT its last connect() was not to a VIP (or not remembered: peer_names = false), -EBADF,
 * -ENOTSOCK.
 */
int clusterip_original_destination(clusterip *handle, int socket, struct sockaddr_storage *ret, clusterip_error *reterr);

/*
 * A descriptor that polls readable when there are events. It belongs to the handle, is the same until the next load_* or
 * attach at least, and there is one reader: who reads takes the events away from others with the same pins. From the call
 * on, and for `seconds`, the kernel writes events; call it again in time to go on, or with 0 to stop. So a reader that
 * dies leaves nothing on. Returns the descriptor. Errors: -EOPNOTSUPP; -ENOENT nothing is loaded.
 */
int clusterip_event_fd(clusterip *handle, uint32_t seconds, clusterip_error *reterr);

/*
 * Visit the events that are there, without waiting. Returns how many, the visitor's value if that is negative, or a
 * negative errno. What comes while the reader is slow and the buffer (some 900 events) full is lost, and counted.
 */
int clusterip_read_events(clusterip *handle, clusterip_event_visitor visit, void *user, clusterip_error *reterr);

/* Give the handle back. NULL is a no-op. Pinned state stays and goes on serving; what is not pinned ends. */
void clusterip_close(clusterip *handle);

#ifdef __cplusplus
}
#endif

#endif
