/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* What a request does to the counters of its pod and to its connection. Knows nothing of bytes.
 *
 * `outstanding` is the one field that several CPUs change (ingress adds, egress subtracts, the
 * end of the connection takes all): always by a single atomic operation whose old value decides
 * who was first or last. ENDED in it turns everything that comes later into nothing. */
#ifndef WEIR_METER_H
#define WEIR_METER_H

#include "maps.h"

#define ENDED	   (1U << 31)
#define HEAD_QUEUE 64 /* requests whose HEAD bit can be remembered */

enum { GIVE_UP_OVER_BUDGET, GIVE_UP_MALFORMED, GIVE_UP_FRAMING_LOST };

static __always_inline struct meter *meter_of(const struct connection *c)
{
	struct meter *meter = pod_meter(c->netns);

	return meter && meter->epoch == c->epoch ? meter : NULL;
}

static __always_inline __u32 log2_of(__u32 v)
{
	__u32 log = 0;

	if (v >> 16) {
		log += 16;
		v >>= 16;
	}
	if (v >> 8) {
		log += 8;
		v >>= 8;
	}
	if (v >> 4) {
		log += 4;
		v >>= 4;
	}
	if (v >> 2) {
		log += 2;
		v >>= 2;
	}
	return log + (v >> 1);
}

/* 0 1 2 3 | 4 5 6 7 | 8-9 10-11 12-13 14-15 | 16-19 ... us */
static __always_inline __u32 latency_bucket(__u64 ns)
{
	/* a division costs ten times a multiplication; exact for all that fits 32 bits */
	__u64 us = ns >> 32 ? ns / 1000 : ns * 274877907 >> 38;
	__u32 bucket = us, log;

	if (us >> 32) {
		bucket = LATENCY_BUCKETS - 1;
	} else if (us >= 4) {
		log = log2_of(us);
		bucket = 4 * (log - 1) + ((us >> (log - 2)) & 3);
	}
	/* what the verifier must see, and the compiler would deem superfluous */
	barrier_var(bucket);
	return bucket & (LATENCY_BUCKETS - 1);
}

/* The connection has one more request to answer; how many there were before. */
static __always_inline __u32 one_more(struct connection *c, __u64 now)
{
	__u32 before = __sync_fetch_and_add(&c->outstanding, 1);
	struct meter *meter;

	if (before)
		return before; /* waits behind another one, or the connection has ended */
	c->since = now;
	meter = meter_of(c);
	if (!meter)
		return 0;
	bpf_spin_lock(&meter->lock);
	meter->in_flight++;
	meter->wsum -= now;
	meter->started++;
	bpf_spin_unlock(&meter->lock);
	return 0;
}

static __always_inline void parse_no_more(struct connection *c, const int reason)
{
	struct meter *meter = meter_of(c);

	c->mode = OPAQUE;
	if (meter)
		count(reason == GIVE_UP_OVER_BUDGET ? &meter->over_budget
		      : reason == GIVE_UP_MALFORMED ? &meter->malformed
						    : &meter->framing_lost);
}

/* Nothing of the connection is parsed from now on; it counts as one request until it closes. */
static __always_inline void give_up(struct connection *c, __u64 now, const int reason)
{
	parse_no_more(c, reason);
	if (!c->outstanding)
		one_more(c, now);
}

static __always_inline void request_begins(struct connection *c, __u64 now, int is_head)
{
	/* the line comes from another CPU: written first, it is fetched once and not twice */
	__u32 before = one_more(c, now);
	__u64 bit = 1ULL << (c->asked & (HEAD_QUEUE - 1));

	/* pipelined deeper than the bits reach: fine as long as no HEAD is among them */
	if (before >= HEAD_QUEUE && (is_head || c->heads)) {
		parse_no_more(c, GIVE_UP_OVER_BUDGET);
		return;
	}
	c->heads = is_head ? c->heads | bit : c->heads & ~bit;
	c->asked++;
}

static __always_inline int awaits(__u32 outstanding)
{
	return outstanding && !(outstanding & ENDED);
}

static __always_inline int awaits_answer(const struct connection *c)
{
	return awaits(c->outstanding);
}

static __always_inline int answers_head(const struct connection *c)
{
	return (c->heads >> (c->answered & (HEAD_QUEUE - 1))) & 1;
}

static __always_inline void answer_ends(struct connection *c, __u64 now)
{
	__u64 since = c->since;
	__u32 before = __sync_fetch_and_add(&c->outstanding, -1), bucket;
	struct meter *meter = meter_of(c);

	c->answered++;
	if (before > 1)
		c->since = now; /* the next of the pipeline runs from here */
	if (!meter)
		return;
	bucket = latency_bucket(now - since);
	bpf_spin_lock(&meter->lock);
	meter->finished++;
	meter->latency[bucket]++;
	if (before > 1) {
		meter->started++;
	} else {
		meter->in_flight--;
		meter->wsum += now;
	}
	bpf_spin_unlock(&meter->lock);
}

/* No further byte will leave: what ends with the connection has finished (an upgrade, a
 * close-delimited answer, whatever was not parsed), any other request was aborted. */
static __always_inline void http1_ends(struct connection *c, __u64 now, int ends_with_it)
{
	__u32 before = __sync_lock_test_and_set(&c->outstanding, ENDED), bucket;
	struct meter *meter;

	if (!before || before & ENDED)
		return;
	meter = meter_of(c);
	if (!meter)
		return;
	bucket = latency_bucket(now - c->since);
	bpf_spin_lock(&meter->lock);
	meter->in_flight--;
	meter->wsum += now;
	if (c->mode != HTTP1) {
		meter->finished++; /* the life of a tunnel is no latency */
	} else if (ends_with_it) {
		meter->finished++;
		meter->latency[bucket]++;
	} else {
		meter->aborted++;
	}
	bpf_spin_unlock(&meter->lock);
}

static __always_inline void upgrade(struct connection *c)
{
	struct meter *meter = meter_of(c);

	c->mode = TUNNEL;
	if (meter)
		count(&meter->upgraded);
}

/* What began with a P was no request but the HTTP/2 preface: as if it had not been counted. */
static __always_inline void http2_begins(struct connection *c)
{
	struct meter *meter = meter_of(c);
	__u32 before = __sync_fetch_and_add(&c->outstanding, -1);

	c->mode = HTTP2;
	if (!meter)
		return;
	count(&meter->http2);
	if (before & ENDED)
		return;
	bpf_spin_lock(&meter->lock);
	meter->in_flight--;
	meter->wsum += c->since;
	meter->started--;
	bpf_spin_unlock(&meter->lock);
}

/* ---- streams ---------------------------------------------------------------------------- */

static __always_inline void stream_closes(struct connection *c, struct streams *open, __u32 id,
					  __u64 now, int aborted)
{
	__u32 bucket, place = OPEN_STREAMS;
	struct meter *meter;
	__u64 since;

#pragma unroll
	for (int i = 0; i < PROBES; i++) {
		__u32 at = ((id >> 1) + i) & (OPEN_STREAMS - 1);

		if (open->id[at] == id)
			place = at;
	}
	if (place >= OPEN_STREAMS)
		return;
	since = open->since[place];
	if (__sync_val_compare_and_swap(&open->id[place], id, 0) != id)
		return;
	__sync_fetch_and_add(&c->outstanding, -1);
	meter = meter_of(c);
	if (!meter)
		return;
	bucket = latency_bucket(now - since);
	bpf_spin_lock(&meter->lock);
	meter->in_flight--;
	meter->wsum += now;
	if (aborted) {
		meter->aborted++;
	} else {
		meter->finished++;
		meter->latency[bucket]++;
	}
	bpf_spin_unlock(&meter->lock);
}

static __always_inline void stream_opens(struct connection *c, struct streams *open, __u32 id,
					 __u64 now)
{
	struct meter *meter = meter_of(c);
	__u32 place = OPEN_STREAMS;

#pragma unroll
	for (int i = 0; i < PROBES; i++) {
		__u32 at = ((id >> 1) + i) & (OPEN_STREAMS - 1);

		if (place == OPEN_STREAMS && !open->id[at])
			place = at;
	}
	if (meter) {
		bpf_spin_lock(&meter->lock);
		meter->started++;
		if (place < OPEN_STREAMS) {
			meter->in_flight++;
			meter->wsum -= now;
		} else {
			meter->finished++;
		}
		bpf_spin_unlock(&meter->lock);
		if (place >= OPEN_STREAMS)
			count(&meter->crowded);
	}
	if (place >= OPEN_STREAMS)
		return;
	__sync_fetch_and_add(&c->outstanding, 1);
	open->since[place] = now;
	__sync_lock_test_and_set(&open->id[place], id);
	if (c->ended) /* and whoever ended it may have looked before this one was there */
		stream_closes(c, open, id, now, 1);
}

/* As give_up(); streams that are open stay so until the connection closes. */
static __always_inline void give_up_streams(struct connection *c, struct streams *open, __u64 now,
					    const int reason)
{
	parse_no_more(c, reason);
	if (!c->outstanding)
		stream_opens(c, open, ~0U, now);
}

struct sweep {
	struct streams *open;
	__u32 above, closed;
};

CALLBACK(sweep_place, i, struct sweep *x)
{
	__u32 at = i & (OPEN_STREAMS - 1), id = x->open->id[at];

	if (id > x->above && __sync_val_compare_and_swap(&x->open->id[at], id, 0) == id)
		x->closed++;
	return 0;
}

/* All streams above a number end without an answer. What was not parsed may have had one. */
static __always_inline void streams_end(struct connection *c, struct streams *open, __u32 above,
					__u64 now)
{
	struct sweep x = {open, above, 0};
	struct meter *meter;

	bpf_loop(OPEN_STREAMS, FUNCTION(sweep_place), &x, 0);
	if (!x.closed)
		return;
	__sync_fetch_and_add(&c->outstanding, -(atomic)x.closed);
	meter = meter_of(c);
	if (!meter)
		return;
	bpf_spin_lock(&meter->lock);
	meter->in_flight -= x.closed;
	meter->wsum += x.closed * now;
	if (c->mode == HTTP2)
		meter->aborted += x.closed;
	else
		meter->finished += x.closed;
	bpf_spin_unlock(&meter->lock);
}

#endif
