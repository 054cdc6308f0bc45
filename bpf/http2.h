/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* HTTP/2 framing, one direction of a connection at a time.
 *
 * Reads the nine bytes before each frame and hops over what they announce: a stream is opened by
 * the client's first HEADERS with its number, and ends with the END_STREAM of the answer or an
 * RST_STREAM of either side. Header blocks are never decoded. */
#ifndef WEIR_HTTP2_H
#define WEIR_HTTP2_H

#include "http1.h"

#define FRAME_HEADER 9

enum { FRAME_DATA, FRAME_HEADERS, FRAME_RST_STREAM = 3, FRAME_SETTINGS, FRAME_GOAWAY = 7 };
enum { END_STREAM = 1 };

/* A GOAWAY begins with the last stream that will be answered. */
static __always_inline void goaway(struct connection *c, struct streams *open, struct stream *s)
{
	c->refused_above = s->id & 0x7fffffff;
	streams_end(c, open, c->refused_above, s->now);
}

static __always_inline void frame_ends(struct connection *c, struct streams *open, struct stream *s,
				       const int out)
{
	s->state = FRAME;
	if (out && s->flags & END_STREAM && s->type <= FRAME_HEADERS)
		stream_closes(c, open, s->id, s->now, 0);
}

/* 0: the connection is no longer parsed */
static __always_inline int frame_begins(struct connection *c, struct streams *open,
					struct stream *s, const int out)
{
	__u32 id = s->id &= 0x7fffffff;

	s->match = 0;
	/* what the server answers and ingress lost (see unseen_in()) is opened by its answer */
	if (s->type == FRAME_HEADERS && id & 1 && id > c->last_stream &&
	    (!out || c->in.state == LOST)) {
		if (!stream_step(c, s->now, out)) {
			give_up_streams(c, open, s->now, GIVE_UP_OVER_BUDGET);
			return 0;
		}
		c->last_stream = id;
		if (!c->refused_above || id <= c->refused_above)
			stream_opens(c, open, id, s->now);
	} else if (s->type == FRAME_RST_STREAM) {
		stream_closes(c, open, id, s->now, 1);
	} else if (out && s->type == FRAME_GOAWAY && s->left >= 8) {
		s->state = GOAWAY_ID;
		s->left -= 4;
		s->id = 0;
		return 1;
	}
	s->state = PAYLOAD;
	return 1;
}

/* The bytes used; 0 ends the parsing. */
static __always_inline __u32 frame(struct connection *c, struct streams *open, struct stream *s,
				   const __u8 *p, __u32 seen, const int out)
{
	__u32 i = s->match;

	if (s->state == GOAWAY_ID) {
		s->id = s->id << 8 | p[0];
		if (++s->match == 4) {
			s->match = 0;
			s->state = PAYLOAD;
			goaway(c, open, s);
			s->type = NOT_A_FRAME;
		}
		return 1;
	}
	if (!i && seen >= FRAME_HEADER) {
		s->left = p[0] << 16 | p[1] << 8 | p[2];
		s->type = p[3];
		s->flags = p[4];
		s->id = (__u32)p[5] << 24 | p[6] << 16 | p[7] << 8 | p[8];
		return frame_begins(c, open, s, out) ? FRAME_HEADER : 0;
	}
	if (i < 3)
		s->left = (i ? s->left << 8 : 0) | p[0];
	else if (i == 3)
		s->type = p[0];
	else if (i == 4)
		s->flags = p[0];
	else
		s->id = s->id << 8 | p[0];
	s->match = i + 1;
	if (s->match == FRAME_HEADER && !frame_begins(c, open, s, out))
		return 0;
	return 1;
}

#endif
