/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Looking at the bytes of a segment: a window onto its payload, and line ends found eight bytes
 * at a time. Knows nothing of messages, only which first letters of a line are worth a stop. */
#ifndef WEIR_SCAN_H
#define WEIR_SCAN_H

#include "maps.h"

#define BYTES(b) (0x0101010101010101ULL * (b))

/* 0x80 in each byte of `word` that is zero, exactly. */
static __always_inline __u64 zero_bytes(__u64 word)
{
	return ~(((word & BYTES(0x7f)) + BYTES(0x7f)) | word | BYTES(0x7f));
}

/* Number of the lowest byte marked in a result of zero_bytes(). */
static __always_inline __u32 lowest(__u64 marks)
{
	/* lowest set bit -> ones in all bytes below it -> their number in the top byte */
	return (((((marks & -marks) - 1) & BYTES(1)) * BYTES(1)) >> 56) - 1;
}

/* How far the next LF is: 0..63, or LOOK when it isn't that near. */
static __always_inline __u32 find_lf(const __u8 *p)
{
#pragma unroll
	for (int i = 0; i < LOOK / 8; i++) {
		__u64 lf = zero_bytes(*(const __u64 *)(p + 8 * i) ^ BYTES('\n'));

		if (lf)
			return 8 * i + lowest(lf);
	}
	return LOOK;
}

/* Eight bytes as a little-endian word, letters in lower case. */
#define WORD(p)	   (*(const __u64 *)(p) | BYTES(0x20))
#define W_CONTENT  0x2d746e65746e6f63ULL /* content- */
#define W_TRANSFER 0x726566736e617274ULL /* transfer */

/* Does a line matter that begins here: a blank one, or a name of interest? */
static __always_inline int matters(const __u8 *p)
{
	return p[0] == '\r' || p[0] == '\n' || WORD(p) == W_CONTENT || WORD(p) == W_TRANSFER;
}

/* The same for the next LF behind which a line begins that matters or that is cut before it can
 * be told. Whole lines of no interest cost nothing but their length; of two that end within the
 * same eight bytes the second is left to the caller. */
static __always_inline __u32 find_line(const __u8 *p, __u32 seen)
{
#pragma unroll
	for (int i = 0; i < LOOK / 8; i++) {
		__u64 lf = zero_bytes(*(const __u64 *)(p + 8 * i) ^ BYTES('\n'));

		if (lf) {
			__u32 at = 8 * i + lowest(lf);

			if (at + 9 > seen || matters(p + (at & (LOOK - 1)) + 1))
				return at;
			lf &= lf - 1;
			if (lf)
				return 8 * i + lowest(lf);
		}
	}
	return LOOK;
}

/* Skip to the next line that may matter: 1 when the cursor will stand at its first byte. */
static __always_inline int skip_lines(const __u8 *p, __u32 seen, __u32 *used)
{
	__u32 at = find_line(p, seen);

	if (at + 1 < seen && at < LOOK) {
		*used = at + 1;
		return 1;
	}
	*used = seen < LOOK ? seen : LOOK;
	/* what follows the last visible byte isn't known to be of no interest */
	return p[(*used - 1) & (LOOK - 1)] == '\n' && *used == seen;
}

/* Make the window show the bytes at the cursor: LOOK of them unless the segment ends sooner.
 * Returns their place in it, -1 when the packet can't be read. */
static __always_inline int window(struct __sk_buff *skb, struct stream *s)
{
	__u32 offset = s->at - s->base, shown = s->base + s->have;
	__u64 n = s->end - s->at; /* 1 or more; in one register, so that its bounds are known */

	if (offset < s->have && (s->at + LOOK <= shown || shown == s->end))
		return offset & (WINDOW - 1);
	if (n > WINDOW)
		n = WINDOW;
	barrier_var(n);
	n = ((n - 1) & (WINDOW - 1)) + 1; /* before Linux 6.8 "!= 0" is no bound */
	if (bpf_skb_load_bytes(skb, s->payload + s->at, s->window, n))
		return -1;
	s->base = s->at;
	s->have = n;
	return 0;
}

#endif
