/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* HTTP/1.1 framing, one direction of a connection at a time.
 *
 * Finds where messages begin and end, nothing else: of the header only Content-Length and
 * Transfer-Encoding are read, lines of no interest are skipped. parse() takes what it can from
 * the bytes in view; step.h brings them into view and hops over bodies, which are never read. */
#ifndef WEIR_HTTP1_H
#define WEIR_HTTP1_H

#include "budget.h"
#include "meter.h"
#include "scan.h"

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
	/* HTTP/2 */
	FRAME,	   /* the nine bytes before a frame */
	PAYLOAD,   /* of a frame, hopped over */
	GOAWAY_ID, /* out */
	/* from here on nothing is parsed */
	UNTIL_CLOSE, /* out: the response ends with the connection */
	LOST,	     /* in: framing lost in a gap; resumes when nothing is outstanding */
	HEAD_END,    /* all lines of the head were seen */
	END, /* the message is complete; these two are never left standing between two steps */
};

/* what a parser function returns instead of the number of bytes it used */
enum { STOP = 0, MALFORMED = ~0U, SCAN = ~1U /* on to the next line that matters */ };

#define PREFACE_REST 10 /* behind "PRI * HTTP/2.0" */
#define NOT_A_FRAME  255

enum { HAS_LENGTH = 1, CHUNKED = 2, NAME_IS_CODING = 4 };

/* see WORD() in scan.h */
#define W_LENGTH  0x3a6874676e656cULL	/* length: */
#define W_ENCODIN 0x6e69646f636e652dULL /* -encodin */
#define W_G	  0x3a67ULL		/* g: */
#define W_CHUNKED 0x64656b6e75686320ULL /* " chunked" */
#define W_PREFACE 0x5448202a20495250ULL /* PRI * HT */
#define W_VERSION 0x302e322f5054ULL	/* TP/2.0 */

/* Byte number i of a text in three words: a constant in memory would need a relocation. */
static __always_inline __u8 letter(__u64 first, __u64 second, __u64 third, __u32 i)
{
	__u64 word = i < 8 ? first : i < 16 ? second : third;

	return word >> (i & 7) * 8;
}

static __always_inline void head_ends(struct connection *c, struct stream *s, const int out)
{
	if (out && s->status == 101) {
		upgrade(c);
	} else if (out && s->status >= 100 && s->status < 200) {
		s->state = IDLE; /* interim: the answer is still to come, on the same budget */
	} else if (out && (s->status == 204 || s->status == 304 || answers_head(c))) {
		s->state = END;
	} else if (s->flags & CHUNKED) {
		s->state = SIZE;
		s->left = 0;
	} else if (s->flags & HAS_LENGTH) {
		s->state = s->left ? BODY : END;
	} else {
		s->state = out ? UNTIL_CLOSE : END;
	}
}

/* ---- one function per state: the number of bytes used, STOP or MALFORMED ---------------- */

/* Up to the next line that matters. The blank line that ends a head goes along if it is in view. */
static __always_inline __u32 lines(struct stream *s, const __u8 *p, __u32 seen)
{
	__u32 used;
	__u64 at;

	if (!skip_lines(p, seen, &used))
		return used;
	if (s->state == TRAILER_LINE) {
		s->state = TRAILER;
		return used;
	}
	s->state = FIELD;
	at = used;
	barrier_var(
	    at); /* the compiler knows its bound and would drop the check, the verifier needs it */
	if (at > LOOK || at + 2 > seen || p[at] != '\r' || p[at + 1] != '\n')
		return used;
	s->state = HEAD_END;
	return used + 2;
}

static __always_inline __u32 request_line(struct connection *c, struct stream *s, const __u8 *p,
					  __u32 seen)
{
	if (p[0] == '\r' || p[0] == '\n')
		return 1;
	request_begins(c, s->now, p[0] == 'H' && (seen < 2 || p[1] == 'E'));
	if (p[0] < 'A' || p[0] > 'Z')
		return MALFORMED;
	s->flags = 0;
	s->left = 0;
	s->state = LINE;
	s->match = p[0] == 'P' && c->asked == 1;
	if (s->match)
		return 1; /* a byte at a time as long as it may be the HTTP/2 preface */
	return SCAN;
}

/* The connection's first line began with P: is it "PRI * HTTP/2.0"? */
static __always_inline __u32 preface(struct connection *c, struct stream *s, const __u8 *p)
{
	__u32 i = s->match & 15;

	if (p[0] != letter(W_PREFACE, W_VERSION, 0, i)) {
		s->match = 0;
		return 0;
	}
	s->match = i + 1;
	if (s->match == sizeof("PRI * HTTP/2.0") - 1) {
		http2_begins(c);
		s->state = PAYLOAD; /* the rest of the preface, hopped over like one */
		s->left = PREFACE_REST;
		s->type = NOT_A_FRAME;
		s->match = 0;
	}
	return 1;
}

static __always_inline __u32 status_line(struct connection *c, struct stream *s, const __u8 *p,
					 __u32 seen)
{
	if (p[0] == '\r' || p[0] == '\n')
		return 1;
	if (!awaits_answer(c))
		return STOP; /* unsolicited: a 408 before the close */
	if (p[0] != 'H')
		return MALFORMED;
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
	s->state = LINE;
	return SCAN;
}

static __always_inline __u32 status(struct stream *s, const __u8 *p)
{
	if (s->match >= 9)
		s->status = s->status * 10 + (p[0] - '0');
	if (++s->match == 12)
		s->state = LINE;
	return 1;
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

static __always_inline __u32 length(struct stream *s, const __u8 *p, __u32 seen)
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
			if (p[i] != '\r' || i + 1 >= seen || p[i + 1] != '\n')
				return i + 1;
			s->state = FIELD;
			return i + 2;
		}
		if (!(s->flags & HAS_LENGTH))
			s->left = 0;
		s->flags |= HAS_LENGTH;
		s->left = s->left * 10 + digit;
		if (s->left >= BODY_LIMIT)
			return MALFORMED;
	}
	return i;
}

static __always_inline __u32 field(struct stream *s, const __u8 *p, __u32 seen)
{
	__u8 first = p[0] | 0x20;
	int half;
	__u32 used = blank_line(p, seen, &half);

	if (used) {
		s->state = half ? HEAD_LF : HEAD_END;
		return used;
	}
	if (first != 'c' && first != 't') {
		s->state = LINE;
		return SCAN;
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
		used = seen > 15 ? length(s, p + 15, seen - 15) : 0;
		return used == MALFORMED ? used : used + 15;
	}
	if (WORD(p) == W_TRANSFER && WORD(p + 8) == W_ENCODIN && (p[16] | 0x20) == 'g' &&
	    p[17] == ':') {
		s->match = 0;
		s->state = CODING;
		return 18;
	}
	s->state = LINE;
	return SCAN;
}

static __always_inline __u32 name(struct stream *s, const __u8 *p)
{
	__u32 i = s->match & 31;
	__u8 want = s->flags & NAME_IS_CODING ? letter(W_TRANSFER, W_ENCODIN, W_G, i)
					      : letter(W_CONTENT, W_LENGTH, 0, i);

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
	} else if ((p[0] | 0x20) != letter(W_CHUNKED >> 8, 0, 0, i)) {
		s->match = (p[0] | 0x20) == 'c';
	} else if (i + 1 < sizeof("chunked") - 1) {
		s->match = i + 1;
	} else {
		s->flags |= CHUNKED;
		s->state = LINE;
	}
	return 1;
}

static __always_inline void size_ends(struct connection *c, struct stream *s, const int out)
{
	chunk_pays(chunks_of(c, out), s->left);
	s->state = s->left ? DATA : TRAILER;
}

static __always_inline __u32 size(struct connection *c, struct stream *s, const __u8 *p, __u32 seen,
				  const int out)
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
			if (s->left >= BODY_LIMIT)
				return MALFORMED;
			continue;
		}
		if (p[i] == '\n') {
			size_ends(c, s, out);
			return i + 1;
		}
		if (p[i] == '\r' && i + 1 < seen && p[i + 1] == '\n') {
			size_ends(c, s, out);
			return i + 2;
		}
		s->state = EXTENSION;
		return i + 1;
	}
	return i;
}

static __always_inline __u32 extension(struct connection *c, struct stream *s, const __u8 *p,
				       __u32 seen, const int out)
{
	__u32 at = find_lf(p);

	if (at >= seen || at >= LOOK)
		return seen < LOOK ? seen : LOOK;
	size_ends(c, s, out);
	return at + 1;
}

static __always_inline __u32 data_end(struct stream *s, const __u8 *p, __u32 seen)
{
	int half;
	__u32 used = blank_line(p, seen, &half);

	if (!used)
		return MALFORMED;
	if (half)
		return used; /* its LF is still to come: the same state takes it */
	s->state = SIZE;
	s->left = 0;
	return used;
}

static __always_inline __u32 trailer(struct stream *s, const __u8 *p, __u32 seen)
{
	int half;
	__u32 used = blank_line(p, seen, &half);

	s->state = !used ? TRAILER_LINE : half ? TRAILER_LF : END;
	return used ? used : SCAN;
}

static __always_inline __u32 parse_state(struct connection *c, struct stream *s, const __u8 *p,
					 __u32 seen, const int out)
{
	switch (s->state) {
	case IDLE:
		return out ? status_line(c, s, p, seen) : request_line(c, s, p, seen);
	case STATUS:
		return status(s, p);
	case LINE:
		return !out && s->match && preface(c, s, p) ? 1 : SCAN;
	case FIELD:
		return field(s, p, seen);
	case NAME:
		return name(s, p);
	case LENGTH:
		return length(s, p, seen);
	case CODING:
		return coding(s, p, seen);
	case SIZE:
		return size(c, s, p, seen, out);
	case EXTENSION:
		return extension(c, s, p, seen, out);
	case DATA_END:
		return data_end(s, p, seen);
	case TRAILER:
		return trailer(s, p, seen);
	case TRAILER_LINE:
		return SCAN;
	}
	/* the LF of a blank line that was cut */
	if (p[0] != '\n')
		return MALFORMED;
	s->state = s->state == HEAD_LF ? HEAD_END : END;
	return 1;
}

static __always_inline __u32 parse(struct connection *c, struct stream *s, const __u8 *p,
				   __u32 seen, const int out)
{
	__u32 used = parse_state(c, s, p, seen, out);

	if (used == SCAN)
		used = lines(s, p, seen);
	if (s->state == HEAD_END)
		head_ends(c, s, out);
	return used;
}

#endif
