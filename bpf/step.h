/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* The loop around the parser: one bounded step after the other over the payload of a segment.
 *
 * All state lives in the connection's storage, so that the verifier sees the same abstract state
 * before every step and bpf_loop() is verified in one pass. Each step is charged to a budget:
 * whoever sends bytes that are costly to parse is no longer parsed (docs/decisions/003). */
#ifndef WEIR_STEP_H
#define WEIR_STEP_H

#include "http1.h"

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

struct step {
	struct __sk_buff *skb;
	struct connection *c;
};

static __always_inline int within_budget(struct stream *s, __u32 state)
{
	__u64 earned;

	if (state < SIZE || state > DATA_END)
		return ++s->head_steps <= HEAD_STEPS;
	if (!s->chunk_steps) {
		earned = (s->now - s->chunk_refill) / CHUNK_STEP_NS;
		s->chunk_steps = earned < CHUNK_BURST ? earned : CHUNK_BURST;
		s->chunk_refill = s->now;
		if (!s->chunk_steps)
			return 0;
	}
	s->chunk_steps--;
	return 1;
}

/* Body and chunk data are not read, however long. */
static __always_inline void hop(struct stream *s)
{
	__u64 n = s->end - s->at;

	if (n > s->left)
		n = s->left;
	s->left -= n;
	s->at += n;
	if (!s->left)
		s->state = s->state == BODY ? END : DATA_END;
}

static __always_inline void after_step(struct connection *c, struct stream *s, const int out)
{
	if (s->state == BODY || s->state == DATA)
		hop(s);
	if (s->state != END)
		return;
	s->state = IDLE;
	s->head_steps = 0;
	if (out)
		answer_ends(c, s->now);
}

/* 1 ends the loop: the segment is used up, or the connection is no longer parsed. */
static __always_inline long step(struct step *x, const int out)
{
	struct connection *c = x->c;
	struct stream *s = out ? &c->out : &c->in;
	__u32 used;
	int place;

	if (s->at >= s->end || c->mode != HTTP1 || s->state >= UNTIL_CLOSE)
		return 1;
	if (!within_budget(s, s->state)) {
		give_up(c, s->now, GIVE_UP_OVER_BUDGET);
		return 1;
	}
	place = window(x->skb, s);
	if (place < 0)
		return 1;
	used = parse(c, s, &s->window[place & (WINDOW - 1)], s->have - place, out);
	if (used == MALFORMED) {
		give_up(c, s->now, GIVE_UP_MALFORMED);
		return 1;
	}
	s->at += used;
	after_step(c, s, out);
	return used == STOP;
}

static long step_in(__u32 i, struct step *x)
{
	return step(x, 0);
}

static long step_out(__u32 i, struct step *x)
{
	return step(x, 1);
}

/* Follow the payload bytes [from, end) of a segment. Every step but the last uses at least one
 * byte, so the limit (beyond any segment) is never what ends the loop. */
static __always_inline void http1_follow(struct __sk_buff *skb, struct connection *c, __u32 payload,
					 __u32 from, __u32 end, const int out)
{
	struct stream *s = out ? &c->out : &c->in;
	struct step x = {skb, c};

	s->payload = payload;
	s->at = from;
	s->end = end;
	s->base = from;
	s->have = 0;
	after_step(c, s, out); /* a body may end within this segment */
	bpf_loop(1 << 20, out ? (void *)step_out : (void *)step_in, &x, 0);
}

#endif
