/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Every struct and map that the programs and user space share. This is the only definition:
 * Python reads the layouts from the BTF of the compiled object (weir.bpf.btf).
 *
 * Only types of the kernel's UAPI are used, so the object carries no relocations and one build
 * fits every kernel from 5.17 on. Ports are in host order, addresses in network order. */
#ifndef WEIR_MAPS_H
#define WEIR_MAPS_H

#include <stddef.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <linux/types.h>

#ifdef WEIR_BCC
#include "bcc.h"
#else
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#define A_MAP			 SEC(".maps")
#define MAP(name)		 (&(name))
#define FUNCTION(name)		 ((void *)(name))
typedef __u32 atomic; /* what atomic operations are done on */
#define CALLBACK(name, index, x) static long name(__u32 index, x) /* for bpf_loop() */
#endif

#define AF_INET	 2
#define AF_INET6 10

#define MAX_PODS      1024
#define MAX_ADDRESSES (4 * MAX_PODS)
#define MAX_LISTENERS (8 * MAX_PODS)
#define MAX_METERS    (LANES * MAX_PODS)
#define PLACES	      128

/* Raise it when something that is kept in a map (also a parser's state) gets another meaning, and
 * no definition changes that would tell: an agent uses the maps of an earlier one if their layouts
 * are equal (docs/decisions/027). */
enum layout {
	LAYOUT_VERSION = 1,
};

/* ---- which pod, which listener --------------------------------------------------------- */

/* IPv6, or IPv4 mapped into it (::ffff:a.b.c.d) */
struct address {
	__u32 word[4];
};

struct pod {
	__u16 user_port;
	__u16 direct_port;
	__u32 enabled;	    /* steer new connections; those accepted earlier stay counted */
	enum layout layout; /* nobody reads it: the version is in the BTF by it */
};

/* In a SO_REUSEPORT group every member has a slot of its own, so that the death of one leaves
 * the others reachable. An entry goes with its socket, nobody needs to remove it. */
enum listener_slot {
	SLOT_0,
	SLOT_1,
	SLOT_2,
	SLOT_3,
	SLOT_4,
	SLOT_5,
	SLOT_6,
	SLOT_7,
	LISTENER_SLOTS,
};

struct listener_key {
	__u64 netns; /* cookie of the pod's network namespace */
	__u16 port;
	__u16 family;
	enum listener_slot slot;
};

/* ---- what a pod is told about ---------------------------------------------------------- */

/* A pod's meter is split into lanes, one per CPU up to LANES of them: a request begins on one CPU
 * and ends on another, and a cache line that goes to and fro costs more than all the additions.
 * The pod's counts are the sums over its lanes; one lane alone may well be negative. */
enum meter_lane {
	LANE_0,
	LANES = 8,
};

struct meter_key {
	__u64 netns;
	enum meter_lane lane;
	__u32 unused;
};

/* Log-linear: four buckets for each power of two of microseconds. 0..3 us have one each; the
 * last power of two with buckets of its own is 2^31 us, more than that (71 minutes) goes to the
 * last bucket. A power of two of them, so that an index is bounded by a mask. */
#define LATENCY_BUCKETS 128

/* One lane. In-flight counts the HTTP/1 connections with at least one outstanding request and the
 * open streams of HTTP/2 connections; a request runs from its first byte in to its last byte out.
 * The integral of in-flight over time, up to any t at which nothing changed since, is
 * wsum + in_flight * t: two additions per event and no timer. */
struct meter {
	struct bpf_spin_lock lock; /* guards the fields down to latency */
	__u32 in_flight;
	__u64 epoch; /* this attachment; connections of an earlier one are not ours */
	__s64 wsum;  /* ns: sum of ends minus sum of starts */
	__u64 started, finished, aborted;
	__u64 latency[LATENCY_BUCKETS]; /* of finished requests */

	/* below: single additions, no lock */
	__u64 connections, closed;
	__u64 upgraded;	    /* 101: in flight until the connection closes */
	__u64 http2;	    /* connections that speak HTTP/2 */
	__u64 crowded;	    /* streams that found no place among OPEN_STREAMS: no time in flight */
	__u64 over_budget;  /* connections no longer parsed: head or chunks too costly */
	__u64 malformed;    /* connections no longer parsed: not HTTP/1 */
	__u64 out_of_order; /* segments that came before their turn */
	__u64 framing_lost; /* gaps where bytes that mattered were never shown to us */
	__u64 listeners;    /* entered the map by themselves */
	__u64 refused; /* listeners a SOCKHASH can't hold (MPTCP): the tc variant serves them */
	__u64 steered;
	__u64 missed; /* wanted the direct port, found no listener */
};

/* ---- one connection -------------------------------------------------------------------- */

#define WINDOW 256 /* bytes of a segment copied at a time */
#define LOOK   64  /* bytes a parser step may look at */

/* One direction of a connection. Ingress runs before TCP takes the socket lock, egress under it,
 * so nothing here is shared by the two: each has its own cursor and its own window. */
struct stream {
	__u64 now;   /* when the current segment was seen */
	__u64 left;  /* bytes of the body or chunk still to come */
	__u32 next;  /* sequence number of the first byte not followed yet */
	atomic busy; /* in: a segment is being followed on some CPU */
	__u32 id;    /* HTTP/2: of the current frame's stream */
	/* the segment being followed: positions count from its first payload byte */
	__u32 at, end, payload;
	__u32 base; /* what the window holds */
	__u16 have;
	__u16 head_steps; /* what was used of the head budget */
	__u16 status, unused;
	__u8 state, flags, match, type;
	/* what lies beyond WINDOW is only ever looked at, never believed */
	__u8 window[WINDOW + LOOK + 8];
};

/* What is left for the chunks of one direction. */
struct chunk_budget {
	__u64 refill;
	__u32 steps, unused;
};

enum mode { HTTP1, HTTP2, TUNNEL, OPAQUE }; /* the last two: one request until the close */

/* Ingress and egress are mostly on different CPUs, and a cache line that goes to and fro costs more
 * than everything else. Processors fetch lines in pairs, so that is true of a pair. The kernel puts
 * this 8 bytes behind the second line of a pair: so the first 56 bytes, which are seldom written,
 * are one line, the next pair is all that both write, and each direction begins a pair of its own.
 */
struct connection {
	__u64 owner; /* cookie of the socket; 0: there is none yet, or no longer */
	__u64 netns, epoch;
	enum mode mode;
	atomic ended;	     /* no stream may be opened any more */
	__u32 refused_above; /* HTTP/2, egress only: streams that GOAWAY disowns */
	struct chunk_budget in_chunks;

	__u64 since; /* first byte of the request that is running, ns */
	__u64 heads; /* bit i: request number i (mod 64) is a HEAD; written by ingress only */
	atomic outstanding; /* changed atomically: by ingress, egress, the end of the connection */
	__u32 asked;	    /* ingress only: number of requests seen */
	__u32 answered;	    /* egress only */
	__u32 last_stream;  /* HTTP/2, ingress only: the highest stream that was opened */
	__u32 late_from, late_to; /* ingress only: this range came before its turn */
	struct chunk_budget out_chunks;
	__u64 unused[9];

	struct stream in, out;
};

/* The open streams of an HTTP/2 connection. Ingress takes places, ingress, egress and the end of
 * the connection empty them; who empties a place, by an atomic exchange, counts the end. */
#define OPEN_STREAMS 256
#define PROBES	     8 /* a stream's place is one of so many, found from its number */

struct streams {
	__u64 since[OPEN_STREAMS];
	atomic id[OPEN_STREAMS]; /* 0: free */
};

/* The name of a map's struct is how user space finds its definition in the BTF. */
struct pods_map {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_PODS);
	__type(key, __u64); /* netns cookie */
	__type(value, struct pod);
} pods A_MAP;

/* sk_lookup and tc can't ask for the netns cookie (or not on every kernel): by local address */
struct addresses_map {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_ADDRESSES);
	__type(key, struct address);
	__type(value, __u64); /* netns cookie */
} addresses A_MAP;

/* Lookup only: no program is ever attached to this map, so sockets in it work as without it. */
struct listeners_map {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, MAX_LISTENERS);
	__type(key, struct listener_key);
	__type(value, __u64);
} listeners A_MAP;

/* Rung with a pod's netns cookie when a listener of it has opened: whoever waits for the pod to
 * become ready looks at once. Of no consequence if nobody hears it. */
#define RING_SIZE 65536 /* a whole number of pages, however large they are */

struct bell_map {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, RING_SIZE);
} bell A_MAP;

struct meters_map {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC); /* only lanes that there are CPUs for exist */
	__uint(max_entries, MAX_METERS);
	__type(key, struct meter_key);
	__type(value, struct meter);
} meters A_MAP;

/* Dies with its socket: no size to choose, nothing to collect (docs/decisions/002). */
struct connections_map {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct connection);
} connections A_MAP;

/* But to make and free such a storage takes the kernel more than a microsecond. So connections have
 * a place in a table, by their cookie, as long as it is free, and a storage only if it isn't. Few
 * places, which stay in the caches: who opens connections all the time has few at once. */
struct place {
	__u64 unused[9]; /* as far behind the beginning of a pair of lines as in a storage */
	struct connection c;
};

struct places_map {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE); /* it begins where a page does */
	__uint(max_entries, PLACES);
	__type(key, __u32);
	__type(value, struct place);
} places A_MAP;

/* Only sockets that speak HTTP/2 have it. */
struct open_streams_map {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct streams);
} open_streams A_MAP;

/* This CPU's lane. */
static __always_inline struct meter *pod_meter(__u64 netns)
{
	struct meter_key key = {
	    .netns = netns,
	    .lane = bpf_get_smp_processor_id() & (LANES - 1),
	};

	return bpf_map_lookup_elem(MAP(meters), &key);
}

static __always_inline void count(__u64 *counter)
{
	__sync_fetch_and_add(counter, 1);
}

#endif
