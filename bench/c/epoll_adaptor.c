/* The least that an adaptor can do: the practical limit in the benchmark of the adaptor.
 *
 * MQTT 5 in, one HTTP request with the event's headers per message, PUBACK in the order of arrival
 * after the sink's 2xx, 64 keep-alive connections, a window of 256. No retry, no reconnect, no
 * configuration, no escaping, no counters; whatever goes wrong ends it.
 *
 * usage: epoll_adaptor BROKER_PORT SINK_PORT FILTER QOS
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sys/uio.h>

#include "mqtt.h"

#define CONNECTIONS 64
#define SLOTS	    1024 /* of QoS 0 as well, where no window bounds them */

struct slot {
	unsigned id;
	int done;
	unsigned char *waiting; /* a copy of the packet that found no connection free */
	size_t size;
};

struct connection {
	int fd;
	unsigned slot;
	struct buffer in, out;
};

static struct slot slots[SLOTS];
static unsigned head, tail, next_waiting; /* numbers of slots, ever growing */
static struct connection connections[CONNECTIONS];
static struct connection *idle[CONNECTIONS];
static int idles;
static int epoll, broker, broker_port, sink_port;
static struct buffer in, out;
static unsigned long events;

static void watch(int fd, uint32_t what, void *who, int how)
{
	struct epoll_event event = {.events = what, .data.ptr = who};

	if (epoll_ctl(epoll, how, fd, &event))
		fail("epoll");
}

static void send_event(struct connection *c, unsigned number, unsigned qos,
		       const unsigned char *packet, size_t size)
{
	static char when[32];
	static time_t second;
	char text[2048];
	unsigned topic = (unsigned)packet[0] << 8 | packet[1];
	const char *name = (const char *)packet + 2;
	size_t properties, at = get_length(packet, 2 + topic + (qos ? 2 : 0), size, &properties);
	struct iovec parts[2];
	struct timespec now;
	ssize_t sent;
	int length;

	at += properties;
	clock_gettime(CLOCK_REALTIME, &now);
	if (now.tv_sec != second) {
		struct tm utc;

		second = now.tv_sec;
		strftime(when, sizeof(when), "%FT%T", gmtime_r(&second, &utc));
	}
	length = snprintf(text, sizeof(text),
			  "POST /ev HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nce-specversion: 1.0\r\n"
			  "ce-type: weir.mqtt.message\r\nce-source: mqtt://127.0.0.1:%d\r\n"
			  "ce-subject: %.*s\r\nce-mqtttopic: %.*s\r\nce-mqttqos: %u\r\n"
			  "ce-mqttretain: false\r\nce-mqttdup: false\r\n"
			  "Content-Type: application/json\r\nce-id: %08lx-%016lx\r\n"
			  "ce-time: %s.%06ldZ\r\nContent-Length: %zu\r\n\r\n",
			  sink_port, broker_port, (int)topic, name, (int)topic, name, qos,
			  (unsigned long)getpid(), ++events, when, now.tv_nsec / 1000, size - at);
	c->slot = number;
	parts[0] = (struct iovec){text, (size_t)length};
	parts[1] = (struct iovec){(void *)(packet + at), size - at};
	sent = writev(c->fd, parts, 2);
	if (sent < 0 && errno != EAGAIN)
		fail("writev");
	if (sent < 0)
		sent = 0;
	for (int i = 0; i < 2; i++) {
		size_t part = (size_t)sent < parts[i].iov_len ? (size_t)sent : parts[i].iov_len;

		sent -= (ssize_t)part;
		if (part < parts[i].iov_len)
			put(&c->out, (char *)parts[i].iov_base + part, parts[i].iov_len - part);
	}
	if (c->out.used)
		watch(c->fd, EPOLLIN | EPOLLOUT, c, EPOLL_CTL_MOD);
}

static void publish_came(unsigned flags, const unsigned char *packet, size_t size)
{
	unsigned qos = flags >> 1 & 3, topic = (unsigned)packet[0] << 8 | packet[1];
	struct slot *slot = &slots[tail % SLOTS];

	slot->id = qos ? (unsigned)packet[2 + topic] << 8 | packet[3 + topic] : 0;
	slot->done = 0;
	slot->waiting = NULL;
	if (idles) {
		send_event(idle[--idles], tail, qos, packet, size);
		if (next_waiting == tail)
			next_waiting++;
	} else {
		slot->waiting = malloc(size);
		if (!slot->waiting)
			fail("memory");
		slot->size = size;
		memcpy(slot->waiting, packet, size);
	}
	tail++;
}

static void answered(struct connection *c)
{
	slots[c->slot % SLOTS].done = 1;
	while (next_waiting != tail && !slots[next_waiting % SLOTS].waiting)
		next_waiting++;
	if (next_waiting != tail) {
		struct slot *slot = &slots[next_waiting % SLOTS];

		send_event(c, next_waiting++, slot->id != 0, slot->waiting, slot->size);
		free(slot->waiting);
		slot->waiting = NULL;
	} else {
		idle[idles++] = c;
	}
	for (; head != tail && slots[head % SLOTS].done; head++) {
		if (!slots[head % SLOTS].id)
			continue;
		put_byte(&out, PUBACK << 4);
		put_byte(&out, 2);
		put_short(&out, slots[head % SLOTS].id);
	}
}

static void serve(struct connection *c, uint32_t what)
{
	if (what & EPOLLOUT && flush(c->fd, &c->out))
		watch(c->fd, EPOLLIN, c, EPOLL_CTL_MOD);
	if (!(what & (EPOLLIN | EPOLLHUP)))
		return;
	if (fill(c->fd, &c->in) < 0)
		fail("the sink closed a connection");
	if (!memmem(c->in.data + c->in.start, c->in.used - c->in.start, "\r\n\r\n", 4))
		return;
	if (memcmp(c->in.data + c->in.start, "HTTP/1.1 2", 10))
		fail("the sink refused");
	c->in.start = c->in.used = 0; /* 204: no body */
	answered(c);
}

static void read_packets(void)
{
	const unsigned char *body;
	unsigned flags;
	size_t size;
	int type;

	while (tail - head < SLOTS && (type = next_packet(&in, &flags, &body, &size))) {
		if (type == PUBLISH)
			publish_came(flags, body, size);
		else if (type != CONNACK && type != SUBACK)
			fail("broker");
	}
}

int main(int argc, char **argv)
{
	struct epoll_event ready[128];
	int asked = EPOLLIN, all = 1;

	if (argc != 5)
		return 2;
	broker_port = atoi(argv[1]);
	sink_port = atoi(argv[2]);
	epoll = epoll_create1(0);
	for (int i = 0; i < CONNECTIONS; i++) {
		connections[i].fd = dial(sink_port);
		fcntl(connections[i].fd, F_SETFL, O_NONBLOCK);
		watch(connections[i].fd, EPOLLIN, &connections[i], EPOLL_CTL_ADD);
		idle[idles++] = &connections[i];
	}
	broker = dial(broker_port);
	put_connect(&out, "bench-epoll");
	put_byte(&out, SUBSCRIBE << 4 | 2);
	put_length(&out, 2 + 1 + 2 + strlen(argv[3]) + 1);
	put_short(&out, 1);
	put_length(&out, 0);
	put_text(&out, argv[3]);
	put_byte(&out, (unsigned)atoi(argv[4]));
	fcntl(broker, F_SETFL, O_NONBLOCK);
	watch(broker, EPOLLIN, NULL, EPOLL_CTL_ADD);
	flush(broker, &out);
	for (;;) {
		int count = epoll_wait(epoll, ready, 128, -1);

		for (int i = 0; i < count; i++) {
			if (ready[i].data.ptr)
				serve(ready[i].data.ptr, ready[i].events);
			else if (ready[i].events & EPOLLIN && fill(broker, &in) < 0)
				return 0;
		}
		read_packets();
		all = flush(broker, &out);
		if (asked != ((tail - head < SLOTS ? EPOLLIN : 0) | (all ? 0 : EPOLLOUT))) {
			asked = (tail - head < SLOTS ? EPOLLIN : 0) | (all ? 0 : EPOLLOUT);
			watch(broker, (uint32_t)asked, NULL, EPOLL_CTL_MOD);
		}
	}
}
