/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* What parsing may cost. Most bytes cost about a nanosecond; some that a hostile peer may send
 * (lines of two bytes, chunks of one) cost ten times that. Whoever sends more of them than fits
 * the budget is no longer parsed, and counts as one request until it closes. */
#ifndef WEIR_BUDGET_H
#define WEIR_BUDGET_H

#include "maps.h"

/* A head, with the blank lines before it and the trailers after it, costs one step per 64 bytes
 * and one per line that begins like a name of interest. 64 KB of honest headers stay below. */
#define HEAD_STEPS 2048
/* Chunk framing costs a step per size line and one per end of data: 8192 at once, then one more
 * per 10 us. A long slow stream of tiny chunks never runs dry, a burst of one-byte chunks does;
 * a chunk that isn't tiny pays for itself (docs/decisions/003). */
#define CHUNK_BURST	8192
#define CHUNK_STEP_NS	10000
#define FAIR_CHUNK	32
#define FAIR_CHUNK_PAYS 4

/* 0: over budget */
static __always_inline int head_step(struct stream *s)
{
	return ++s->head_steps <= HEAD_STEPS;
}

static __always_inline struct chunk_budget *chunks_of(struct connection *c, const int out)
{
	return out ? &c->out_chunks : &c->in_chunks;
}

/* A token bucket that is refilled only when it has run dry, which bounds the rate all the same. */
static __always_inline int chunk_step(struct chunk_budget *b, __u64 now)
{
	__u64 earned;

	if (!b->steps) {
		earned = (now - b->refill) / CHUNK_STEP_NS;
		b->steps = earned < CHUNK_BURST ? earned : CHUNK_BURST;
		b->refill = now;
		if (!b->steps)
			return 0;
	}
	b->steps--;
	return 1;
}

/* A stream that opens and ends costs a third of a microsecond, mostly for the meter's lock: two of
 * them are one chunk step, so a connection may open 200 000 a second without end. */
static __always_inline int stream_step(struct connection *c, __u64 now, const int out)
{
	return c->asked++ & 1 || chunk_step(chunks_of(c, out), now);
}

static __always_inline void chunk_pays(struct chunk_budget *b, __u64 size)
{
	if (size >= FAIR_CHUNK && b->steps < CHUNK_BURST)
		b->steps += FAIR_CHUNK_PAYS;
}

#endif
