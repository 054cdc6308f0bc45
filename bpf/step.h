/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* The loop around the parser: one bounded step after the other over the payload of a segment.
 *
 * All state lives in the connection's storage, so that the verifier sees the same abstract state
 * before every step and bpf_loop() is verified in one pass. Each step is charged to a budget. */
#ifndef WEIR_STEP_H
#define WEIR_STEP_H

#include "http2.h"

struct step {
	struct __sk_buff *skb;
	struct connection *c;
	struct streams *open; /* HTTP/2 only */
};

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
	if (s->state >= SIZE && s->state <= DATA_END ? !chunk_step(chunks_of(c, out), s->now)
						     : !head_step(s)) {
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
	return used == STOP || s->at >= s->end;
}

CALLBACK(step_in, i, struct step *x)
{
	return step(x, 0);
}

CALLBACK(step_out, i, struct step *x)
{
	return step(x, 1);
}

/* Follow what is left of a segment. Every step but the last uses at least one byte, so the limit
 * (beyond any segment) is never what ends the loop. */
static __always_inline void http1_follow(struct __sk_buff *skb, struct connection *c, const int out)
{
	struct step x = {skb, c, NULL};

	after_step(c, out ? &c->out : &c->in, out); /* a body may end within this segment */
	bpf_loop(1 << 20, out ? FUNCTION(step_out) : FUNCTION(step_in), &x, 0);
}

/* ---- HTTP/2 ----------------------------------------------------------------------------- */

static __always_inline void hop_frame(struct connection *c, struct streams *open, struct stream *s,
				      const int out)
{
	__u64 n = s->end - s->at;

	if (s->state != PAYLOAD)
		return;
	if (n > s->left)
		n = s->left;
	s->left -= n;
	s->at += n;
	if (!s->left)
		frame_ends(c, open, s, out);
}

static __always_inline long step2(struct step *x, const int out)
{
	struct connection *c = x->c;
	struct stream *s = out ? &c->out : &c->in;
	__u32 used;
	int place;

	if (s->at >= s->end || c->mode != HTTP2 || s->state >= UNTIL_CLOSE)
		return 1;
	place = window(x->skb, s);
	if (place < 0)
		return 1;
	used = frame(c, x->open, s, &s->window[place & (WINDOW - 1)], s->have - place, out);
	if (!used)
		return 1;
	s->at += used;
	hop_frame(c, x->open, s, out);
	return s->at >= s->end;
}

CALLBACK(step2_in, i, struct step *x)
{
	return step2(x, 0);
}

CALLBACK(step2_out, i, struct step *x)
{
	return step2(x, 1);
}

static __always_inline void http2_follow(struct __sk_buff *skb, struct connection *c,
					 struct streams *open, const int out)
{
	struct stream *s = out ? &c->out : &c->in;
	struct step x = {skb, c, open};

	if (s->state < FRAME) { /* the first that the server says */
		s->state = FRAME;
		s->match = 0;
	}
	hop_frame(c, open, s, out);
	bpf_loop(1 << 20, out ? FUNCTION(step2_out) : FUNCTION(step2_in), &x, 0);
}

/* ---- a segment -------------------------------------------------------------------------- */

static __always_inline struct streams *streams_of(struct bpf_sock *sk, const int make)
{
	return bpf_sk_storage_get(MAP(open_streams), sk, NULL,
				  make ? BPF_SK_STORAGE_GET_F_CREATE : 0);
}

/* Follow the payload bytes [from, end), in whatever is spoken; that may change on the way. */
static __always_inline void follow(struct __sk_buff *skb, struct bpf_sock *sk, struct connection *c,
				   __u32 payload, __u32 from, __u32 end, const int out)
{
	struct stream *s = out ? &c->out : &c->in;
	struct streams *open;

	s->payload = payload;
	s->at = from;
	s->end = end;
	s->base = from;
	s->have = 0;
	if (c->mode == HTTP1)
		http1_follow(skb, c, out);
	if (c->mode != HTTP2)
		return;
	open = streams_of(sk, !out);
	if (open)
		http2_follow(skb, c, open, out);
	else
		parse_no_more(c, GIVE_UP_OVER_BUDGET); /* no memory for a table of streams */
}

#endif
