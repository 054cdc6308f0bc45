/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Following the connections of the direct port, read-only: every program here returns 1.
 *
 * The cgroup hooks see segments, not a stream: each direction has a cursor in TCP sequence
 * numbers, so that a retransmission counts once and a gap is noticed. Egress and the state
 * callback run under the socket lock; ingress runs before it is taken, maybe on two CPUs at
 * once, and has a lock of its own that it only tries. */
#ifndef WEIR_TRACK_H
#define WEIR_TRACK_H

#include "step.h"

#define CLAIMED	     (~0ULL) /* while a place is made ready for who comes */
#define LOCK_TRIES   4096    /* its holder needs about a microsecond */
#define TCP_FLAG_SYN 2

struct segment {
	__u32 sequence, payload, length;
	int fin;
};

/* Where the payload is and which bytes of the stream it holds. 0 if this isn't plain TCP. */
static __always_inline int read_segment(struct __sk_buff *skb, struct segment *seg)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct iphdr *ip4 = data;
	struct ipv6hdr *ip6 = data;
	struct tcphdr *tcp;
	__u32 headers;

	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		if ((void *)(ip4 + 1) > end)
			return 0;
		headers = ip4->ihl * 4;
	} else {
		if ((void *)(ip6 + 1) > end || ip6->nexthdr != IPPROTO_TCP)
			return 0;
		headers = sizeof(*ip6);
	}
	tcp = data + headers;
	if ((void *)(tcp + 1) > end)
		return 0;
	seg->sequence = bpf_ntohl(tcp->seq);
	seg->fin = tcp->fin;
	seg->payload = headers + tcp->doff * 4;
	seg->length = skb->len > seg->payload ? skb->len - seg->payload : 0;
	return 1;
}

/* Is the stream within bytes that are counted and not read? */
static __always_inline int hops(const struct stream *s)
{
	return s->state == BODY || s->state == DATA || s->state == PAYLOAD;
}

/* ---- where a connection's state is ------------------------------------------------------- */

/* Cookies are given out one after the other, to each CPU from a run of 4096 of its own: what
 * differs between the runs goes in, so that two CPUs don't ask for the same places. */
static __always_inline struct connection *place_of(__u64 cookie)
{
	__u32 index = (cookie + 61 * (cookie >> 12)) & (PLACES - 1);
	struct place *place = bpf_map_lookup_elem(MAP(places), &index);

	if (!place)
		return NULL;
	barrier_var(place); /* the sum must not be made before the check */
	return &place->c;
}

static __always_inline struct connection *followed(void *ctx, struct bpf_sock *sk, __u64 *cookie)
{
	struct connection *c;

	if (!sk)
		return NULL;
	*cookie = bpf_get_socket_cookie(ctx);
	c = place_of(*cookie);
	if (c && c->owner == *cookie)
		return c;
	return bpf_sk_storage_get(MAP(connections), sk, NULL, 0);
}

/* What is not set when a connection is opened or a segment followed. */
static __always_inline void reset(struct stream *s)
{
	s->left = 0;
	s->id = 0;
	s->head_steps = s->status = 0;
	s->state = s->flags = s->match = s->type = 0;
}

/* Ingress may be with the socket before, which it found here in time. It takes `busy` and then
 * looks whether it is still the owner; we own and then look whether it is busy. */
static __always_inline int taken(struct connection *c)
{
	if (c->owner || __sync_val_compare_and_swap(&c->owner, 0, CLAIMED))
		return 0;
	if (c->in.busy) {
		__sync_lock_test_and_set(&c->owner, 0);
		return 0;
	}
	__builtin_memset(&c->mode, 0,
			 offsetof(struct connection, unused) - offsetof(struct connection, mode));
	reset(&c->in);
	reset(&c->out);
	return 1;
}

/* ---- life ------------------------------------------------------------------------------- */

static __always_inline void connection_opened(struct bpf_sock_ops *ctx)
{
	__u64 netns = bpf_get_netns_cookie(ctx), cookie;
	struct pod *pod = bpf_map_lookup_elem(MAP(pods), &netns);
	struct bpf_sock *sk = ctx->sk;
	struct connection *c;
	struct meter *meter;
	struct tcphdr *tcp;
	__u32 early = 0;

	if (!pod || ctx->local_port != pod->direct_port || !sk)
		return;
	meter = pod_meter(netns);
	if (!meter)
		return;
	cookie = bpf_get_socket_cookie(ctx);
	c = place_of(cookie);
	if (!c || !taken(c))
		c = bpf_sk_storage_get(MAP(connections), sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!c)
		return;
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
	c->netns = netns;
	c->epoch = meter->epoch;
	c->out.next = ctx->snd_nxt;
	c->in.next = ctx->rcv_nxt;
	count(&meter->connections);

	/* Payload on the ACK that completed the handshake (the bare ACK was lost, or the listener
	 * has TCP_DEFER_ACCEPT) went by before this socket existed: a request began, unread. */
	tcp = ctx->skb_data;
	if ((void *)(tcp + 1) <= ctx->skb_data_end && !(ctx->skb_tcp_flags & TCP_FLAG_SYN))
		early = ctx->skb_len - tcp->doff * 4;
	if (early) {
		c->in.next += early;
		c->in.state = LOST;
		count(&meter->framing_lost);
		request_begins(c, bpf_ktime_get_ns(), 0);
	}
	__sync_lock_test_and_set(&c->owner, cookie);
}

static __always_inline void ends(struct connection *c, struct bpf_sock *sk)
{
	__u64 now = bpf_ktime_get_ns();
	struct streams *open = NULL;

	__sync_lock_test_and_set(&c->ended, 1);
	if (c->mode != HTTP1)
		open = streams_of(sk, 0);
	if (open)
		streams_end(c, open, 0, now);
	else
		http1_ends(c, now, c->out.state == UNTIL_CLOSE);
}

/* After FIN_WAIT1 and LAST_ACK data may still be on its way out, in CLOSE_WAIT the answer is
 * still owed: only CLOSE is the end. Egress sees the FIN, which normally comes first. */
static __always_inline void state_changed(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct connection *c;
	struct meter *meter;
	__u64 cookie;

	if (ctx->args[1] != BPF_TCP_CLOSE)
		return;
	c = followed(ctx, sk, &cookie);
	if (!sk || !c || c->owner != cookie)
		return;
	ends(c, sk);
	meter = meter_of(c);
	if (meter)
		count(&meter->closed);
	__sync_lock_test_and_set(&c->owner, 0); /* from now on somebody else's place */
}

/* ---- requests --------------------------------------------------------------------------- */

/* `n` bytes were delivered that no program was shown. Inside a body of known length nothing is
 * lost; elsewhere the request stays counted and framing resumes with an idle connection. */
static __always_inline void unseen_in(struct connection *c, __u32 n)
{
	struct stream *s = &c->in;
	struct meter *meter;

	if (s->state >= UNTIL_CLOSE)
		return;
	if (hops(s) && s->left >= n) {
		s->left -= n;
		if (!s->left)
			s->state = s->state == BODY ? IDLE : s->state == DATA ? DATA_END : FRAME;
		return;
	}
	meter = meter_of(c);
	if (meter)
		count(&meter->framing_lost);
	if (s->state == IDLE)
		request_begins(c, s->now, 0);
	s->match = 0;
	s->state = LOST;
	s->head_steps = 0;
}

/* Out-of-order segments are not kept, only the range that they cover. */
static __always_inline void came_early(struct connection *c, struct segment *seg)
{
	__u32 from = seg->sequence, to = from + seg->length;
	struct meter *meter = meter_of(c);

	if (meter)
		count(&meter->out_of_order);
	if (c->late_from == c->late_to) {
		c->late_from = from;
		c->late_to = to;
		return;
	}
	if ((__s32)(from - c->late_from) < 0)
		c->late_from = from;
	if ((__s32)(to - c->late_to) > 0)
		c->late_to = to;
}

static __always_inline void gap_filled(struct connection *c)
{
	struct stream *s = &c->in;
	__s32 n = c->late_to - s->next;

	if (c->late_from == c->late_to || (__s32)(s->next - c->late_from) < 0)
		return;
	c->late_from = c->late_to = 0;
	if (n <= 0)
		return;
	s->next += n;
	unseen_in(c, n);
}

static __always_inline void receive(struct __sk_buff *skb, struct bpf_sock *sk,
				    struct connection *c, struct segment *seg)
{
	struct stream *s = &c->in;
	__u32 known = s->next - seg->sequence; /* bytes of this segment followed before */

	if ((__s32)known >= (__s32)seg->length)
		return; /* a retransmission */
	if ((__s32)known < 0) {
		struct bpf_tcp_sock *tcp = bpf_tcp_sock(sk);

		if (!tcp || (__s32)(tcp->rcv_nxt - seg->sequence) < 0) {
			came_early(c, seg);
			return;
		}
		/* TCP has everything up to here already */
		s->now = bpf_ktime_get_ns();
		unseen_in(c, seg->sequence - s->next);
		known = 0;
	}
	s->next = seg->sequence + seg->length;
	if (hops(s) && s->left > seg->length - known) {
		s->left -= seg->length - known;
	} else {
		s->now = bpf_ktime_get_ns();
		if (s->state == LOST && !c->outstanding)
			s->state = c->mode == HTTP2 ? FRAME : IDLE;
		follow(skb, sk, c, seg->payload, known, seg->length, 0);
	}
	if (c->late_from != c->late_to)
		gap_filled(c);
}

SEC("cgroup_skb/ingress")
int follow_in(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;
	struct connection *c;
	struct segment seg;
	__u64 cookie;
	int tries = 0;

	if (!read_segment(skb, &seg) || !seg.length)
		return 1; /* a pure ACK */
	c = followed(skb, sk, &cookie);
	if (!sk || !c || c->mode > HTTP2)
		return 1;
	while (__sync_lock_test_and_set(&c->in.busy, 1))
		if (++tries == LOCK_TRIES)
			return 1; /* stays a gap, to be noticed by the next segment */
	if (c->owner == cookie)	  /* still, or already */
		receive(skb, sk, c, &seg);
	/* clang 14 has no store-release for BPF */
	__sync_lock_test_and_set(&c->in.busy, 0);
	return 1;
}

/* ---- answers ---------------------------------------------------------------------------- */

static __always_inline void send(struct __sk_buff *skb, struct bpf_sock *sk, struct connection *c,
				 struct segment *seg)
{
	struct stream *s = &c->out;
	__s32 known = s->next - seg->sequence;
	atomic nothing = 0;

	if (known >= (__s32)seg->length)
		return; /* a retransmission */
	s->next = seg->sequence + seg->length;
	if (hops(s) && s->left > seg->length - known) {
		s->left -= seg->length - known; /* also over bytes that were not shown */
		return;
	}
	/* what is read here is mostly written in the end: see request_begins(). Of a constant zero
	 * the compiler would make a read and then a write. */
	barrier_var(nothing);
	if (s->state >= UNTIL_CLOSE ||
	    (c->mode == HTTP1 && !awaits(__sync_fetch_and_add(&c->outstanding, nothing))))
		return;
	s->now = bpf_ktime_get_ns();
	if (known < 0) {
		struct streams *open = streams_of(sk, 0);

		if (open)
			give_up_streams(c, open, s->now, GIVE_UP_FRAMING_LOST);
		else
			give_up(c, s->now, GIVE_UP_FRAMING_LOST);
		return;
	}
	follow(skb, sk, c, seg->payload, known, seg->length, 1);
}

SEC("cgroup_skb/egress")
int follow_out(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;
	struct connection *c;
	struct segment seg;
	__u64 cookie;

	if (!read_segment(skb, &seg) || !(seg.length || seg.fin))
		return 1;
	c = followed(skb, sk, &cookie);
	if (!sk || !c)
		return 1;
	if (seg.length && c->mode <= HTTP2)
		send(skb, sk, c, &seg);
	if (seg.fin)
		ends(c, sk);
	return 1;
}

#endif
