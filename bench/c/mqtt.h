/* What both programs of the adaptor's benchmark need of MQTT 5, of sockets and of buffers.
 *
 * No more than that: a broker that says something unexpected ends the program. Sizes are bounded by
 * what the benchmark sends.
 */
#ifndef BENCH_MQTT_H
#define BENCH_MQTT_H

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define RECEIVE_MAXIMUM 256

enum { CONNECT = 1, CONNACK, PUBLISH, PUBACK, PUBREC, PUBREL, PUBCOMP, SUBSCRIBE, SUBACK };

struct buffer {
	unsigned char *data;
	size_t size, used, start; /* [start, used) is what is there */
};

static inline void fail(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, errno ? strerror(errno) : "unexpected");
	exit(1);
}

static inline uint64_t now_ns(void)
{
	struct timespec at;

	clock_gettime(CLOCK_MONOTONIC, &at);
	return (uint64_t)at.tv_sec * 1000000000ull + (uint64_t)at.tv_nsec;
}

/* Room for `more` bytes behind what is there. */
static inline unsigned char *room(struct buffer *b, size_t more)
{
	if (b->start == b->used)
		b->start = b->used = 0;
	if (b->used + more > b->size) {
		if (b->start) {
			memmove(b->data, b->data + b->start, b->used - b->start);
			b->used -= b->start;
			b->start = 0;
		}
		if (b->used + more > b->size) {
			b->size = (b->used + more) * 2;
			b->data = realloc(b->data, b->size);
			if (!b->data)
				fail("memory");
		}
	}
	return b->data + b->used;
}

static inline void put(struct buffer *b, const void *data, size_t size)
{
	memcpy(room(b, size), data, size);
	b->used += size;
}

static inline void put_byte(struct buffer *b, unsigned value)
{
	*room(b, 1) = (unsigned char)value;
	b->used++;
}

static inline void put_short(struct buffer *b, unsigned value)
{
	put_byte(b, value >> 8);
	put_byte(b, value & 0xff);
}

static inline void put_length(struct buffer *b, size_t length)
{
	do {
		put_byte(b, (length & 0x7f) | (length > 0x7f ? 0x80 : 0));
		length >>= 7;
	} while (length);
}

static inline void put_text(struct buffer *b, const char *text)
{
	put_short(b, (unsigned)strlen(text));
	put(b, text, strlen(text));
}

/* As much as the socket takes now; 1 when nothing is left. */
static inline int flush(int fd, struct buffer *b)
{
	while (b->start < b->used) {
		ssize_t n = write(fd, b->data + b->start, b->used - b->start);

		if (n < 0 && errno == EAGAIN)
			return 0;
		if (n < 0)
			fail("write");
		b->start += (size_t)n;
	}
	b->start = b->used = 0;
	return 1;
}

/* One read; 0 when there is nothing (more). */
static inline int fill(int fd, struct buffer *b)
{
	ssize_t n = read(fd, room(b, 65536), 65536);

	if (n < 0 && errno == EAGAIN)
		return 0;
	if (n <= 0)
		return -1;
	b->used += (size_t)n;
	return 1;
}

static inline int dial(int port)
{
	struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
	int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1;

	to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	if (fd < 0 || connect(fd, (struct sockaddr *)&to, sizeof(to)))
		fail("connect");
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	return fd;
}

/* Position of a variable byte integer's end, and its value; 0: not all there. */
static inline size_t get_length(const unsigned char *data, size_t at, size_t end, size_t *value)
{
	*value = 0;
	for (int shift = 0; at < end && shift < 28; shift += 7) {
		*value |= (size_t)(data[at] & 0x7f) << shift;
		if (!(data[at++] & 0x80))
			return at;
	}
	return 0;
}

/* The next whole packet: its type, flags, body and size. 0: not all there. */
static inline int next_packet(struct buffer *b, unsigned *flags, const unsigned char **body,
			      size_t *size)
{
	size_t at, length;
	int type;

	if (b->used - b->start < 2)
		return 0;
	at = get_length(b->data, b->start + 1, b->used, &length);
	if (!at || b->used - at < length)
		return 0;
	type = b->data[b->start] >> 4;
	*flags = b->data[b->start] & 0xf;
	*body = b->data + at;
	*size = length;
	b->start = at + length;
	return type;
}

static inline void put_connect(struct buffer *b, const char *client)
{
	put_byte(b, CONNECT << 4);
	put_length(b, 10 + 1 + 3 + 2 + strlen(client));
	put_text(b, "MQTT");
	put_byte(b, 5);
	put_byte(b, 2);	 /* clean start */
	put_short(b, 0); /* no keep-alive */
	put_length(b, 3);
	put_byte(b, 0x21);
	put_short(b, RECEIVE_MAXIMUM);
	put_text(b, client);
}

#endif
