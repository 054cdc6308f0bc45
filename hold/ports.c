/* Which ports, and the fence (docs/decisions/022). Rules of the ports: docs/hold.md; the full ones
 * are in proxy/sidecar.py, and the sidecar or the agent opens what is not opened here. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>
#include <linux/filter.h>

#include "ports.h"

#define BACKLOG	     4096
#define FIRST	     3
#define RETRY_MS     50
#define CERTIFICATES "/var/lib/knative/certs/"
#define MIGRATE	     "/proc/sys/net/ipv4/tcp_migrate_req"

union address {
	struct sockaddr any;
	struct sockaddr_in v4;
	struct sockaddr_in6 v6;
};

void say(const char *what, const char *why)
{
	struct iovec parts[] = {{"weir-hold: ", 11},
				{(void *)what, strlen(what)},
				{": ", 2},
				{(void *)why, strlen(why)},
				{"\n", 1}};
	if (writev(2, parts, 5) < 0)
		return; /* nobody to tell */
}

static int has_ipv6(void)
{
	return access("/proc/net/if_inet6", F_OK) == 0;
}

/* `beside`: share the port with a listener that does, too. -1 with errno. */
static int open_port(int port, int beside)
{
	int on = 1, off = 0, v6 = has_ipv6();
	union address at = {0};
	int fd = socket(v6 ? AF_INET6 : AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

	if (fd < 0)
		return -1;
	if (v6) {
		at.v6.sin6_family = AF_INET6;
		at.v6.sin6_port = htons(port);
		setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off));
	} else {
		at.v4.sin_family = AF_INET;
		at.v4.sin_port = htons(port);
	}
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	if (beside)
		setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &on, sizeof(on));
	if (bind(fd, &at.any, v6 ? sizeof(at.v6) : sizeof(at.v4)) < 0 || listen(fd, BACKLOG) < 0) {
		int error = errno;
		close(fd);
		errno = error;
		return -1;
	}
	return fd;
}

static int port_of(int fd)
{
	union address at;
	socklen_t size = sizeof(at);

	if (getsockname(fd, &at.any, &size) < 0)
		return -1;
	/* both families have it in the same place */
	return ntohs(at.v4.sin_port);
}

static void add(struct ports *ports, int port, int signals, int may_fail)
{
	for (int i = 0; i < ports->count; i++)
		if (port_of(ports->fd[i]) == port)
			return; /* brought along */
	for (int told = 0;;) {
		int fd = open_port(port, 0);
		if (fd >= 0) {
			ports->fd[ports->count++] = fd;
			return;
		}
		char text[40];
		snprintf(text, sizeof(text), "listening on port %d", port);
		if (errno == EADDRINUSE && !may_fail) {
			/* an agent that outlived another hold, and will see so: to serve beside it
			 * would be two */
			if (!told++)
				say(text, "somebody still does, waiting");
			struct pollfd stop = {.fd = signals, .events = POLLIN};
			if (poll(&stop, 1, RETRY_MS) > 0)
				_exit(0);
			continue;
		}
		say(text, strerror(errno));
		if (may_fail)
			return;
		_exit(1);
	}
}

static int port_in(const char *name)
{
	const char *text = getenv(name);
	long port = 0;

	if (!text) {
		say("required key missing value", name);
		_exit(1);
	}
	for (const char *c = text; *c; c++) {
		if (*c < '0' || *c > '9' || c - text > 4) {
			port = 0;
			break;
		}
		port = port * 10 + (*c - '0');
	}
	if (port < 1 || port > 65535) {
		say(name, "is not a port; 1 to 65535 is allowed");
		_exit(1);
	}
	return (int)port;
}

static int given(const char *name)
{
	const char *text = getenv(name);

	return text && *text;
}

/* The default metrics port, where it can be told without reading JSON in C. */
static int wants_metrics(void)
{
	const char *backend = getenv("SERVING_REQUEST_METRICS_BACKEND");

	return !getenv("OBSERVABILITY_CONFIG") && backend && !strcmp(backend, "prometheus") &&
	       !given("METRICS_COLLECTOR_ADDRESS") && !given("OTEL_EXPORTER_PROMETHEUS_PORT") &&
	       !given("OTEL_EXPORTER_PROMETHEUS_HOST");
}

static void take_passed(struct ports *ports)
{
	const char *passed = getenv("LISTEN_FDS"), *whose = getenv("LISTEN_PID");

	if (!passed || !whose || strtol(whose, NULL, 10) != getpid())
		return;
	long count = strtol(passed, NULL, 10);
	for (int fd = FIRST; fd < FIRST + count && ports->count < MAX_PORTS; fd++) {
		int listens = 0;
		socklen_t size = sizeof(listens);
		if (getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &size) < 0 || !listens)
			continue;
		fcntl(fd, F_SETFD, FD_CLOEXEC);
		ports->fd[ports->count++] = fd;
	}
}

void ports_open(struct ports *ports, int signals)
{
	int data = port_in("QUEUE_SERVING_PORT"), tls = port_in("QUEUE_SERVING_TLS_PORT");

	take_passed(ports);
	add(ports, data, signals, 0);
	add(ports, 8022, signals, 0);
	add(ports, 9090, signals, 0);
	if (access(CERTIFICATES "tls.crt", F_OK) == 0 && access(CERTIFICATES "tls.key", F_OK) == 0)
		add(ports, tls, signals, 0);
	if (wants_metrics())
		add(ports, 9091, signals, 1); /* not fatal, as upstream */
}

int ports_can_fence(void)
{
	char value = '0';
	int fd = open(MIGRATE, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return 0;
	ssize_t got = read(fd, &value, 1);
	close(fd);
	return got == 1 && value == '1';
}

/* New connections go to the second of the group: the old one only ends the handshakes it has begun.
 */
static void steer(int fd)
{
	struct sock_filter second[] = {{BPF_RET | BPF_K, 0, 0, 1}};
	struct sock_fprog program = {1, second};

	setsockopt(fd, SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, &program, sizeof(program));
}

/* A socket that is connected can't listen again, whoever asks: a copy in a process that wakes up is
 * just dead. It is connected to a listener of ours, whose end is reset at once. */
static int spoil(int fd)
{
	union address at = {0};
	socklen_t size;
	struct linger reset = {1, 0};
	int v6 = has_ipv6(), end = -1, done = -1;
	int trap = socket(v6 ? AF_INET6 : AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (trap < 0)
		return -1;
	if (v6) {
		at.v6.sin6_family = AF_INET6;
		at.v6.sin6_addr.s6_addr[10] = at.v6.sin6_addr.s6_addr[11] =
		    0xff; /* ::ffff:127.0.0.1 */
		at.v6.sin6_addr.s6_addr[12] = 127;
		at.v6.sin6_addr.s6_addr[15] = 1;
	} else {
		at.v4.sin_family = AF_INET;
		at.v4.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	}
	size = v6 ? sizeof(at.v6) : sizeof(at.v4);
	if (bind(trap, &at.any, size) == 0 && listen(trap, 1) == 0 &&
	    getsockname(trap, &at.any, &size) == 0) {
		/* over loopback the handshake is over when connect returns, blocking or not */
		int made = connect(fd, &at.any, size);
		if (made == 0 || errno == EINPROGRESS) {
			end = accept4(trap, NULL, NULL, SOCK_CLOEXEC);
			done = end < 0 ? -1 : 0;
		}
	}
	int error = errno;
	if (end >= 0) {
		setsockopt(end, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
		close(end);
	}
	close(trap);
	errno = error;
	return done;
}

int ports_fence(struct ports *ports, int steer_ms)
{
	int fresh[MAX_PORTS], on = 1, off = 0;

	for (int i = 0; i < ports->count; i++) {
		setsockopt(ports->fd[i], SOL_SOCKET, SO_REUSEPORT, &on, sizeof(on));
		fresh[i] = open_port(port_of(ports->fd[i]), 1);
		if (fresh[i] < 0)
			return -1;
		steer(fresh[i]);
	}
	poll(NULL, 0, steer_ms);
	for (int i = 0; i < ports->count; i++) {
		if (shutdown(ports->fd[i], SHUT_RDWR) < 0 || spoil(ports->fd[i]) < 0)
			return -1;
		close(ports->fd[i]);
		setsockopt(fresh[i], SOL_SOCKET, SO_REUSEPORT, &off, sizeof(off));
		ports->fd[i] = fresh[i];
	}
	return 0;
}

void ports_to_environment(struct ports *ports)
{
	char number[24];

	/* first out of the way, so that none is overwritten before it moved */
	for (int i = 0; i < ports->count; i++) {
		int moved = fcntl(ports->fd[i], F_DUPFD_CLOEXEC, FIRST + MAX_PORTS);
		if (moved >= 0)
			ports->fd[i] = moved;
	}
	for (int i = 0; i < ports->count; i++)
		ports->fd[i] = dup2(ports->fd[i], FIRST + i); /* survives exec */
	snprintf(number, sizeof(number), "%d", ports->count);
	setenv("LISTEN_FDS", number, 1);
	snprintf(number, sizeof(number), "%d", (int)getpid());
	setenv("LISTEN_PID", number, 1);
}

void ports_shut(struct ports *ports)
{
	for (int i = 0; i < ports->count; i++)
		shutdown(ports->fd[i], SHUT_RDWR);
}
