/* Both ends of an adaptor under test: publishes events to the broker and is the sink they reach.
 *
 * One process, so that it knows when an event was published and when it arrived by one clock, and
 * how many are on their way: at full load it keeps OUTSTANDING of them there, whatever the QoS, so
 * nothing has to be dropped and the adaptor is always busy. Costs as little as it can, because it
 * shares the machine with what it measures.
 *
 * usage: rig BROKER_PORT TOPIC TOPICS QOS BYTES RATE OUTSTANDING WARM SECONDS
 *
 * Prints `listening PORT`, publishes now and then until the first event arrives, then at RATE per
 * second (0: full load) for WARM seconds; `start`, SECONDS later `end EVENTS NS P50 P99 LOST`. Then
 * it is a sink until it is killed.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sys/timerfd.h>

#include "mqtt.h"

#define BUCKETS	 200000 /* of 1 us */
#define STALL_NS 2000000000ull

struct connection {
	int fd;
	struct buffer in;
};

static int epoll, broker, listener, timer;
static struct buffer in, out;
static const char *topic;
static int topics, qos;
static size_t bytes;
static long window, in_flight, receive_maximum = 65535;
static unsigned long sent, arrived, lost, before; /* lost before anybody listened */
static unsigned packet_id;
static uint64_t last_arrival;
static int measuring, over;
static unsigned long counted, latencies[BUCKETS];

static void watch(int fd, uint32_t what, void *who, int how)
{
	struct epoll_event event = {.events = what, .data.ptr = who};

	if (epoll_ctl(epoll, how, fd, &event))
		fail("epoll");
}

static void publish(void)
{
	static unsigned char *filler;
	char name[256], stamp[64];
	size_t length;

	if (!filler) {
		filler = malloc(bytes);
		memset(filler, 'x', bytes);
	}
	snprintf(name, sizeof(name), "%s/%lu", topic, sent % (unsigned long)topics);
	length = (size_t)snprintf(stamp, sizeof(stamp), "{\"at\":\"%016llx\",\"x\":\"",
				  (unsigned long long)now_ns());
	put_byte(&out, PUBLISH << 4 | (unsigned)qos << 1);
	put_length(&out, 2 + strlen(name) + (qos ? 2 : 0) + 1 + bytes);
	put_text(&out, name);
	if (qos) {
		packet_id = packet_id % 65535 + 1;
		put_short(&out, packet_id);
		in_flight++;
	}
	put_length(&out, 0);
	put(&out, stamp, length);
	put(&out, filler, bytes - length - 2);
	put(&out, "\"}", 2);
	sent++;
}

static void connack(const unsigned char *body, size_t size)
{
	size_t length, at = get_length(body, 2, size, &length);

	if (body[1])
		fail("the broker refuses us");
	for (size_t end = at + length; at && at < end;) {
		switch (body[at]) {
		case 0x21:
			receive_maximum = body[at + 1] << 8 | body[at + 2];
			at += 3;
			break;
		case 0x13:
		case 0x22:
			at += 3;
			break;
		case 0x11:
		case 0x27:
			at += 5;
			break;
		case 0x24:
		case 0x25:
		case 0x28:
		case 0x29:
		case 0x2a:
			at += 2;
			break;
		default: /* texts */
			at += 3 + ((size_t)body[at + 1] << 8 | body[at + 2]);
		}
	}
}

static void read_packets(void)
{
	const unsigned char *body;
	unsigned flags;
	size_t size;
	int type;

	while ((type = next_packet(&in, &flags, &body, &size))) {
		if (type == CONNACK) {
			connack(body, size);
		} else if (type == PUBACK || type == PUBCOMP) {
			in_flight--;
		} else if (type == PUBREC) {
			put_byte(&out, PUBREL << 4 | 2);
			put_byte(&out, 2);
			put(&out, body, 2);
		} else {
			fail("broker");
		}
	}
}

static void event_came(const unsigned char *body, size_t size)
{
	uint64_t now = now_ns(), us;

	last_arrival = now;
	arrived++;
	if (!measuring)
		return;
	counted++;
	if (size < 24 || memcmp(body, "{\"at\":\"", 7))
		fail("an event's body");
	us = (now - strtoull((const char *)body + 7, NULL, 16)) / 1000;
	latencies[us < BUCKETS ? us : BUCKETS - 1]++;
}

static void serve(struct connection *c)
{
	static const char ok[] = "HTTP/1.1 204 No Content\r\n\r\n";

	if (fill(c->fd, &c->in) <= 0) {
		close(c->fd);
		free(c->in.data);
		free(c);
		return;
	}
	for (;;) {
		unsigned char *start = c->in.data + c->in.start, *end;
		size_t there = c->in.used - c->in.start, head, length;
		char *found;

		end = there ? memmem(start, there, "\r\n\r\n", 4) : NULL;
		if (!end)
			return;
		*end = 0;
		found = strcasestr((char *)start, "\r\ncontent-length:");
		*end = '\r';
		length = found ? strtoul(found + 17, NULL, 10) : 0;
		head = (size_t)(end - start) + 4;
		if (there < head + length)
			return;
		event_came(start + head, length);
		c->in.start += head + length;
		if (write(c->fd, ok, sizeof(ok) - 1) != sizeof(ok) - 1)
			fail("answer");
	}
}

static unsigned long quantile(double part)
{
	unsigned long seen = 0, wanted = (unsigned long)((double)counted * part);

	for (unsigned long us = 0; us < BUCKETS; us++) {
		seen += latencies[us];
		if (seen > wanted)
			return us;
	}
	return BUCKETS;
}

int main(int argc, char **argv)
{
	struct itimerspec every = {{0, 1000000}, {0, 1000000}};
	struct sockaddr_in at = {.sin_family = AF_INET};
	struct epoll_event ready[128];
	socklen_t size = sizeof(at);
	uint64_t began = 0, start = 0, paced_from = 0, first = 0, tried = 0;
	unsigned long paced = 0;
	double rate, warm, seconds;

	if (argc != 10)
		return 2;
	topic = argv[2];
	topics = atoi(argv[3]);
	qos = atoi(argv[4]);
	bytes = strtoul(argv[5], NULL, 10);
	rate = atof(argv[6]);
	window = atol(argv[7]);
	warm = atof(argv[8]);
	seconds = atof(argv[9]);

	epoll = epoll_create1(0);
	at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	listener = socket(AF_INET, SOCK_STREAM, 0);
	if (bind(listener, (struct sockaddr *)&at, size) || listen(listener, 512))
		fail("listen");
	getsockname(listener, (struct sockaddr *)&at, &size);
	watch(listener, EPOLLIN, &listener, EPOLL_CTL_ADD);
	broker = dial(atoi(argv[1]));
	put_connect(&out, "bench-rig");
	flush(broker, &out);
	fcntl(broker, F_SETFL, O_NONBLOCK);
	watch(broker, EPOLLIN, &broker, EPOLL_CTL_ADD);
	timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
	timerfd_settime(timer, 0, &every, NULL);
	watch(timer, EPOLLIN, &timer, EPOLL_CTL_ADD);
	printf("listening %d\n", ntohs(at.sin_port));
	fflush(stdout);

	for (;;) {
		int count = epoll_wait(epoll, ready, 128, -1), writable = !out.used;
		uint64_t now = now_ns(), ticks;

		for (int i = 0; i < count; i++) {
			void *who = ready[i].data.ptr;

			if (who == &broker) {
				if (ready[i].events & EPOLLIN && fill(broker, &in) < 0)
					return 1;
				read_packets();
			} else if (who == &listener) {
				struct connection *c = calloc(1, sizeof(*c));

				c->fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
				setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
				watch(c->fd, EPOLLIN, c, EPOLL_CTL_ADD);
			} else if (who == &timer) {
				if (read(timer, &ticks, sizeof(ticks)) < 0 && errno != EAGAIN)
					fail("timer");
			} else {
				serve(who);
			}
		}
		if (over) {
			/* nothing more is published; what is on its way may arrive */
		} else if (!first) {
			if (arrived)
				first = began = paced_from = last_arrival = now,
				before = lost = sent - arrived;
			else if (now - tried > 20000000)
				publish(), tried = now;
		} else if (rate > 0) {
			unsigned long due =
			    (unsigned long)((double)(now - paced_from) / 1e9 * rate);

			for (; paced < due && in_flight < receive_maximum; paced++)
				publish();
		} else {
			if (now > last_arrival + STALL_NS) {
				lost = sent - arrived;
				last_arrival = now;
			}
			while ((long)(sent - arrived - lost) < window &&
			       in_flight < receive_maximum && out.used - out.start < 1 << 20)
				publish();
		}
		if (out.used) {
			int all = flush(broker, &out);

			if (all != writable)
				watch(broker, all ? EPOLLIN : EPOLLIN | EPOLLOUT, &broker,
				      EPOLL_CTL_MOD);
		}
		if (first && !measuring && !over && now - began > warm * 1e9) {
			measuring = 1;
			start = now;
			printf("start\n");
			fflush(stdout);
		}
		if (measuring && now - start > seconds * 1e9) {
			printf("end %lu %llu %lu %lu %lu\n", counted,
			       (unsigned long long)(now - start), quantile(0.5), quantile(0.99),
			       lost - before);
			fflush(stdout);
			measuring = 0;
			over = 1;
		}
	}
}
