/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* HTTP/1.1 framing, one direction of a connection at a time.
 *
 * Finds where messages begin and end, nothing else: header values other than Content-Length and
 * Transfer-Encoding are skipped a line at a time, bodies are hopped over without being read.
 * All state lives in the connection's storage, so that the verifier sees the same abstract state
 * before every step and bpf_loop() is verified in one pass. Each step is charged to a budget. */
#ifndef WEIR_HTTP1_H
#define WEIR_HTTP1_H

#include "meter.h"

/* A head, with the blank lines before it and the trailers after it, costs one step per line and
 * per 64 bytes of a long line. 64 KB of honest headers stay far below. */
#define HEAD_STEPS 2048
/* Chunk framing costs a step per size line and one per end of data: 8192 at once, then one more
 * per 10 us. A long slow stream of tiny chunks never runs dry, a burst of one-byte chunks does;
 * a chunk that isn't tiny pays for itself (docs/decisions/003). */
#define CHUNK_BURST	8192
#define CHUNK_STEP_NS	10000
#define FAIR_CHUNK	32
#define FAIR_CHUNK_PAYS 4

#define BODY_LIMIT (1ULL << 50)

enum {
	IDLE,	/* between messages */
	STATUS, /* out: the status line was cut before its 12th byte */
	LINE,	/* looking for the end of a line of the head */
	FIELD,	/* first byte of a header line */
	NAME,	/* a header name that the end of a segment may have cut: byte by byte */
	LENGTH, /* value of Content-Length */
	CODING, /* value of Transfer-Encoding */
	HEAD_LF,
	BODY,
	SIZE, /* chunk size */
	EXTENSION,
	DATA,
	DATA_END,
	TRAILER, /* first byte of a trailer line, or of the blank line that ends the message */
	TRAILER_LINE,
	TRAILER_LF,
	/* from here on nothing is parsed */
	UNTIL_CLOSE, /* out: the response ends with the connection */
	LOST,	     /* in: framing lost in a gap; resumes when nothing is outstanding */
};

enum { HAS_LENGTH = 1, CHUNKED = 2, NAME_IS_CODING = 4 };

/* volatile: mergeable string constants make libbpf 1.1 emit BTF that the kernel rejects */
static const volatile char CONTENT_LENGTH[32] = "content-length:";
static const volatile char TRANSFER_ENCODING[32] = "transfer-encoding:";
static const volatile char CHUNKED_CODING[8] = "chunked";
static const volatile char PREFACE[16] = "PRI * HTTP/2.0";

#define BYTES(b) (0x0101010101010101ULL * (b))
/* eight bytes as a little-endian word, letters in lower case */
#define WORD(p)	   (*(const __u64 *)(p) | BYTES(0x20))
#define W_CONTENT  0x2d746e65746e6f63ULL /* content- */
#define W_LENGTH   0x3a6874676e656cULL	 /* length: */
#define W_TRANSFER 0x726566736e617274ULL /* transfer */
#define W_ENCODIN  0x6e69646f636e652dULL /* -encodin */
#define W_CHUNKED  0x64656b6e75686320ULL /* " chunked" */

struct step {
	struct __sk_buff *skb;
	struct connection *c;
};

/* How far the next LF is: 0..63, or LOOK when it isn't that near. */
static __always_inline __u32 find_lf(const __u8 *p)
{
#pragma unroll
	for (int i = 0; i < LOOK / 8; i++) {
		__u64 word = *(const __u64 *)(p + 8 * i) ^ BYTES('\n');
		__u64 zero = (word - BYTES(1)) & ~word & BYTES(0x80);

		/* lowest set bit -> ones in all bytes below it -> their number in the top byte */
		if (zero)
			return 8 * i + (((((zero & -zero) - 1) & BYTES(1)) * BYTES(1)) >> 56) - 1;
	}
	return LOOK;
}

/* Take this line up to its LF if that is visible, and tell so. */
static __always_inline int line_ends(const __u8 *p, __u32 seen, __u32 *used)
{
	__u32 at = find_lf(p);

	if (at < seen && at < LOOK) {
		*used = at + 1;
		return 1;
	}
	*used = seen < LOOK ? seen : LOOK;
	return 0;
}

/* Make the window show the bytes at the cursor: LOOK of them unless the segment ends sooner.
 * Returns their place in it, -1 when the packet can't be read. */
static __always_inline int window(struct __sk_buff *skb, struct stream *s)
{
	__u32 offset = s->at - s->base, shown = s->base + s->have, n = s->end - s->at;

	if (offset < s->have && (s->at + LOOK <= shown || shown == s->end))
		return offset & (WINDOW - 1);
	if (n > WINDOW)
		n = WINDOW;
	barrier_var(n);
	if (n < 1 || n > WINDOW)
		return -1;
	if (bpf_skb_load_bytes(skb, s->payload + s->at, s->window, n))
		return -1;
	s->base = s->at;
	s->have = n;
	return 0;
}

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

static __always_inline void message_ends(struct connection *c, struct stream *s, const int out)
{
	s->state = IDLE;
	s->head_steps = 0;
	if (out)
		answer_ends(c, s->now);
}

static __always_inline void head_ends(struct connection *c, struct stream *s, const int out)
{
	if (out && s->status == 101) {
		upgrade(c);
		return;
	}
	if (out && s->status >= 100 && s->status < 200) {
		s->state = IDLE; /* interim: the answer is still to come, on the same budget */
		return;
	}
	if (out && (s->status == 204 || s->status == 304 || answers_head(c))) {
		message_ends(c, s, out);
		return;
	}
	if (s->flags & CHUNKED) {
		s->state = SIZE;
		s->left = 0;
	} else if (s->flags & HAS_LENGTH) {
		s->state = BODY;
		if (!s->left)
			message_ends(c, s, out);
	} else if (out) {
		s->state = UNTIL_CLOSE;
	} else {
		message_ends(c, s, out);
	}
}

/* ---- one function per state: bytes used, 0 when nothing more can be made of them -------- */

static __always_inline __u32 request_begins_at(struct connection *c, struct stream *s,
					       const __u8 *p, __u32 seen)
{
	__u32 used;

	if (p[0] == '\r' || p[0] == '\n')
		return 1;
	request_begins(c, s->now, p[0] == 'H' && (seen < 2 || p[1] == 'E'));
	if (p[0] < 'A' || p[0] > 'Z') {
		give_up(c, s->now, GIVE_UP_MALFORMED);
		return 0;
	}
	s->flags = 0;
	s->left = 0;
	s->match = p[0] == 'P' && c->asked == 1;
	s->state = LINE;
	if (s->match) /* may be the HTTP/2 preface: see method() */
		return 1;
	if (line_ends(p, seen, &used))
		s->state = FIELD;
	return used;
}

/* The connection's first line began with P: is it "PRI * HTTP/2.0"? */
static __always_inline __u32 preface(struct connection *c, struct stream *s, const __u8 *p)
{
	__u32 i = s->match & 15;

	if (p[0] != PREFACE[i]) {
		s->match = 0;
		return 0;
	}
	s->match = i + 1;
	/* HTTP/2 has its place here: frames would be followed from this byte on, a request per
	 * stream. Until then the connection counts as one request until it closes. */
	if (s->match == sizeof("PRI * HTTP/2.0") - 1)
		http2_begins(c);
	return 1;
}

static __always_inline __u32 answer_begins(struct connection *c, struct stream *s, const __u8 *p,
					   __u32 seen)
{
	__u32 used;

	if (p[0] == '\r' || p[0] == '\n')
		return 1;
	if (!awaits_answer(c))
		return 0; /* unsolicited: 408 before a close, or our view of the requests is late */
	if (p[0] != 'H') {
		give_up(c, s->now, GIVE_UP_MALFORMED);
		return 0;
	}
	s->flags = 0;
	s->left = 0;
	if (seen < 12) {
		s->status = 0;
		s->match = 1;
		s->state = STATUS;
		return 1;
	}
	/* "HTTP/1.1 200" */
	s->status = (p[9] - '0') * 100 + (p[10] - '0') * 10 + (p[11] - '0');
	s->state = line_ends(p, seen, &used) ? FIELD : LINE;
	return used;
}

static __always_inline __u32 status(struct stream *s, const __u8 *p)
{
	if (s->match >= 9)
		s->status = s->status * 10 + (p[0] - '0');
	if (++s->match == 12)
		s->state = LINE;
	return 1;
}

static __always_inline __u32 line(struct stream *s, const __u8 *p, __u32 seen, __u32 next)
{
	__u32 used;

	if (line_ends(p, seen, &used))
		s->state = next;
	return used;
}

/* The blank line: its length, 1 with `*half` set when only its CR is visible, 0 if it is none. */
static __always_inline __u32 blank_line(const __u8 *p, __u32 seen, int *half)
{
	*half = 0;
	if (p[0] == '\n')
		return 1;
	if (p[0] != '\r')
		return 0;
	if (seen < 2) {
		*half = 1;
		return 1;
	}
	return p[1] == '\n' ? 2 : 0;
}

static __always_inline __u32 field(struct connection *c, struct stream *s, const __u8 *p,
				   __u32 seen, const int out)
{
	__u8 first = p[0] | 0x20;
	int half;
	__u32 used = blank_line(p, seen, &half);

	if (used) {
		if (half)
			s->state = HEAD_LF;
		else
			head_ends(c, s, out);
		return used;
	}
	if (first != 'c' && first != 't') {
		s->state = LINE;
		return line(s, p, seen, FIELD);
	}
	if (seen < 18) {
		s->flags = first == 't' ? s->flags | NAME_IS_CODING : s->flags & ~NAME_IS_CODING;
		s->match = 1;
		s->state = NAME;
		return 1;
	}
	if (WORD(p) == W_CONTENT && (WORD(p + 8) & (~0ULL >> 8)) == W_LENGTH) {
		s->flags &= ~HAS_LENGTH; /* repeated: they must be equal, the last one counts */
		s->state = LENGTH;
		return 15;
	}
	if (WORD(p) == W_TRANSFER && WORD(p + 8) == W_ENCODIN && (p[16] | 0x20) == 'g' &&
	    p[17] == ':') {
		s->match = 0;
		s->state = CODING;
		return 18;
	}
	s->state = LINE;
	return line(s, p, seen, FIELD);
}

static __always_inline __u32 name(struct stream *s, const __u8 *p)
{
	__u32 i = s->match & 31;
	__u8 want = s->flags & NAME_IS_CODING ? TRANSFER_ENCODING[i] : CONTENT_LENGTH[i];

	if (p[0] == '\n') {
		s->state = FIELD;
	} else if (p[0] == ':' && want == ':') {
		s->match = 0;
		s->state = s->flags & NAME_IS_CODING ? CODING : LENGTH;
		if (s->state == LENGTH)
			s->flags &= ~HAS_LENGTH;
	} else if ((p[0] | 0x20) == want) {
		s->match = i + 1;
	} else {
		s->state = LINE;
	}
	return 1;
}

static __always_inline __u32 length(struct connection *c, struct stream *s, const __u8 *p,
				    __u32 seen)
{
	__u32 i;

#pragma unroll
	for (i = 0; i < 8; i++) {
		__u32 digit = p[i] - '0';

		if (i >= seen)
			break;
		if (digit > 9) {
			if ((p[i] == ' ' || p[i] == '\t') && !(s->flags & HAS_LENGTH))
				continue;
			s->state = p[i] == '\n' ? FIELD : LINE;
			return i + 1;
		}
		if (!(s->flags & HAS_LENGTH))
			s->left = 0;
		s->flags |= HAS_LENGTH;
		s->left = s->left * 10 + digit;
		if (s->left >= BODY_LIMIT) {
			give_up(c, s->now, GIVE_UP_MALFORMED);
			return 0;
		}
	}
	return i;
}

static __always_inline __u32 coding(struct stream *s, const __u8 *p, __u32 seen)
{
	__u32 i = s->match & 7;

	if (seen >= 8 && !i && WORD(p) == W_CHUNKED) {
		s->flags |= CHUNKED;
		s->state = LINE;
		return 8;
	}
	if (p[0] == '\n') {
		s->state = FIELD;
	} else if ((p[0] | 0x20) != CHUNKED_CODING[i]) {
		s->match = (p[0] | 0x20) == 'c';
	} else if (i + 1 < sizeof("chunked") - 1) {
		s->match = i + 1;
	} else {
		s->flags |= CHUNKED;
		s->state = LINE;
	}
	return 1;
}

static __always_inline void size_ends(struct stream *s)
{
	if (s->left >= FAIR_CHUNK && s->chunk_steps < CHUNK_BURST)
		s->chunk_steps += FAIR_CHUNK_PAYS;
	s->state = s->left ? DATA : TRAILER;
}

static __always_inline __u32 size(struct connection *c, struct stream *s, const __u8 *p, __u32 seen)
{
	__u32 i;

#pragma unroll
	for (i = 0; i < 8; i++) {
		__u32 digit = p[i] - '0';

		if (i >= seen)
			break;
		if (digit > 9) {
			digit = (p[i] | 0x20) - 'a';
			digit = digit < 6 ? digit + 10 : 16;
		}
		if (digit < 16) {
			s->left = s->left * 16 + digit;
			if (s->left >= BODY_LIMIT) {
				give_up(c, s->now, GIVE_UP_MALFORMED);
				return 0;
			}
			continue;
		}
		if (p[i] == '\n') {
			size_ends(s);
			return i + 1;
		}
		if (p[i] == '\r' && i + 1 < seen && p[i + 1] == '\n') {
			size_ends(s);
			return i + 2;
		}
		s->state = EXTENSION;
		return i + 1;
	}
	return i;
}

static __always_inline __u32 extension(struct stream *s, const __u8 *p, __u32 seen)
{
	__u32 used;

	if (line_ends(p, seen, &used))
		size_ends(s);
	return used;
}

static __always_inline __u32 data_end(struct connection *c, struct stream *s, const __u8 *p,
				      __u32 seen)
{
	int half;
	__u32 used = blank_line(p, seen, &half);

	if (!used)
		give_up(c, s->now, GIVE_UP_MALFORMED);
	if (half)
		return used; /* its LF is still to come: the same state takes it */
	s->state = SIZE;
	s->left = 0;
	return used;
}

static __always_inline __u32 trailer(struct connection *c, struct stream *s, const __u8 *p,
				     __u32 seen, const int out)
{
	int half;
	__u32 used = blank_line(p, seen, &half);

	if (!used) {
		s->state = TRAILER_LINE;
		return line(s, p, seen, TRAILER);
	}
	if (half)
		s->state = TRAILER_LF;
	else
		message_ends(c, s, out);
	return used;
}

static __always_inline __u32 lf(struct connection *c, struct stream *s, const __u8 *p,
				const int out)
{
	if (p[0] != '\n') {
		give_up(c, s->now, GIVE_UP_MALFORMED);
		return 0;
	}
	if (s->state == HEAD_LF)
		head_ends(c, s, out);
	else
		message_ends(c, s, out);
	return 1;
}

/* ---- the loop --------------------------------------------------------------------------- */

/* Body and chunk data are not read, however long. */
static __always_inline void hop(struct connection *c, struct stream *s, const int out)
{
	__u64 n = s->end - s->at;

	if (n > s->left)
		n = s->left;
	s->left -= n;
	s->at += n;
	if (s->left)
		return;
	if (s->state == BODY)
		message_ends(c, s, out);
	else
		s->state = DATA_END;
}

static __always_inline __u32 parse(struct connection *c, struct stream *s, const __u8 *p,
				   __u32 seen, const int out)
{
	switch (s->state) {
	case IDLE:
		if (out)
			return answer_begins(c, s, p, seen);
		return request_begins_at(c, s, p, seen);
	case STATUS:
		return status(s, p);
	case LINE:
		if (!out && s->match && preface(c, s, p))
			return 1;
		return line(s, p, seen, FIELD);
	case FIELD:
		return field(c, s, p, seen, out);
	case NAME:
		return name(s, p);
	case LENGTH:
		return length(c, s, p, seen);
	case CODING:
		return coding(s, p, seen);
	case SIZE:
		return size(c, s, p, seen);
	case EXTENSION:
		return extension(s, p, seen);
	case DATA_END:
		return data_end(c, s, p, seen);
	case TRAILER:
		return trailer(c, s, p, seen, out);
	case TRAILER_LINE:
		return line(s, p, seen, TRAILER);
	default:
		return lf(c, s, p, out);
	}
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
	if (s->state == BODY || s->state == DATA) {
		hop(c, s, out);
		return 0;
	}
	if (!within_budget(s, s->state)) {
		give_up(c, s->now, GIVE_UP_OVER_BUDGET);
		return 1;
	}
	place = window(x->skb, s);
	if (place < 0) {
		give_up(c, s->now, GIVE_UP_FRAMING_LOST);
		return 1;
	}
	used = parse(c, s, &s->window[place & (WINDOW - 1)], s->have - place, out);
	s->at += used;
	return !used;
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
	bpf_loop(1 << 20, out ? (void *)step_out : (void *)step_in, &x, 0);
}

#endif
