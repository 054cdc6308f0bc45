/* weir-hold: owns a pod's listening sockets and lends them to the node agent, or becomes the
 * sidecar.
 *
 * This file owns the loop, the lease's messages and the way into the sidecar. What happens when is
 * the table in lease.h; which ports and how a fence works is ports.c. Why all of it:
 * docs/decisions/022.
 *
 * usage: weir-hold [COMMAND [ARGUMENT...]], the sidecar's command.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "lease.h"
#include "ports.h"

#define NAME(name, ...) name,
enum state { LEASE_STATES(NAME) };
enum event { NOTHING, LEASE_EVENTS(NAME) };
#define NUMBER(name) N_##name,
enum { LEASE_ACTIONS(NUMBER) };
#define BIT(name) name = 1 << N_##name,
enum action { LEASE_ACTIONS(BIT) };

static const struct row {
	enum state state;
	enum event event;
	enum state next;
	unsigned actions;
} table[] = {
#define ROW(state, event, next, actions) {state, event, next, actions},
    LEASE_TABLE(ROW)};

static enum state state = WAITING;
static struct ports ports;
static int lease = -1;
static int signals;
static long deadline;	 /* of silence, ms */
static long bound;	 /* of ENDING, ms */
static long bound_after; /* SIGTERM */
static char *own_path;
static char **sidecar;

static long now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000L + t.tv_nsec / 1000000;
}

static void fail(const char *what)
{
	say(what, strerror(errno));
	ports_shut(&ports);
	_exit(1);
}

/* Nothing waits for an agent that does not read: a full socket counts as gone. */
static int tell(const char *word, const int *fds, int count)
{
	struct iovec text = {(void *)word, strlen(word)};
	union {
		struct cmsghdr head;
		char room[CMSG_SPACE(sizeof(int) * MAX_PORTS)];
	} control = {0};
	struct msghdr message = {.msg_iov = &text, .msg_iovlen = 1};

	if (count) {
		message.msg_control = &control;
		message.msg_controllen = CMSG_SPACE(sizeof(int) * count);
		control.head.cmsg_level = SOL_SOCKET;
		control.head.cmsg_type = SCM_RIGHTS;
		control.head.cmsg_len = CMSG_LEN(sizeof(int) * count);
		memcpy(CMSG_DATA(&control.head), fds, sizeof(int) * count);
	}
	return sendmsg(lease, &message, MSG_NOSIGNAL | MSG_DONTWAIT) < 0 ? -1 : 0;
}

/* One packet. `passed` is the first descriptor that came with it, -1 without; any others are
 * closed. */
static int hear(int fd, char *word, int room, int *passed)
{
	struct iovec text = {word, room - 1};
	union {
		struct cmsghdr head;
		char room[CMSG_SPACE(sizeof(int) * 8)];
	} control;
	struct msghdr message = {.msg_iov = &text,
				 .msg_iovlen = 1,
				 .msg_control = &control,
				 .msg_controllen = sizeof(control)};
	int length = recvmsg(fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);

	*passed = -1;
	if (length < 0)
		return -1;
	word[length] = 0;
	for (struct cmsghdr *c = CMSG_FIRSTHDR(&message); c; c = CMSG_NXTHDR(&message, c)) {
		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		int count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		for (int i = 0; i < count; i++) {
			int got;
			memcpy(&got, CMSG_DATA(c) + i * sizeof(int), sizeof(int));
			if (*passed < 0)
				*passed = got;
			else
				close(got);
		}
	}
	return length;
}

static enum event on_door(void)
{
	char word[32];
	int passed;

	if (hear(DOOR, word, sizeof(word), &passed) < 0 || strcmp(word, WORD_RING) || passed < 0) {
		if (passed >= 0)
			close(passed);
		return NOTHING;
	}
	lease = passed;
	if (!ports_can_fence()) {
		tell(WORD_UNSAFE, NULL, 0);
		close(lease);
		lease = -1;
		return NOTHING;
	}
	return RING;
}

static enum event on_lease(void)
{
	char word[32];
	int passed;
	int length = hear(lease, word, sizeof(word), &passed);

	if (passed >= 0)
		close(passed);
	if (length < 0)
		return errno == EAGAIN || errno == EINTR ? NOTHING : BROKEN;
	if (!strcmp(word, WORD_BEAT)) {
		deadline = now_ms() + SILENCE_MS;
		return NOTHING;
	}
	if (!strcmp(word, WORD_RELEASED))
		return RELEASED;
	if (!strcmp(word, WORD_DONE) && state == ENDING)
		return DONE;
	return BROKEN; /* EOF, nonsense, or a drain that nobody asked for */
}

static enum event on_signal(void)
{
	struct signalfd_siginfo info;

	if (read(signals, &info, sizeof(info)) != sizeof(info))
		return NOTHING;
	return SIGTERM_;
}

/* The sidecar gets the listeners by systemd's convention, and the way back into this program. */
static void become_sidecar(void)
{
	signal(SIGPIPE, SIG_DFL);
	signal(SIGCHLD, SIG_DFL);
	ports_to_environment(&ports);
	setenv("WEIR_HOLD", own_path, 1);
	execvp(sidecar[0], sidecar);
	fail(sidecar[0]);
}

static void carry_out(unsigned actions, int status)
{
	if (actions & FENCE && ports_fence(&ports, STEER_MS) < 0)
		fail("fencing the listeners");
	if (actions & HANG_UP) {
		close(lease);
		lease = -1;
	}
	if (actions & TELL)
		tell(WORD_END, NULL, 0); /* who can't be told is found silent */
	if (actions & RAISE)
		kill(getpid(), SIGTERM); /* blocked: it is there when the sidecar asks */
	if (actions & EXEC)
		become_sidecar();
	if (actions & CLOSE) {
		ports_shut(&ports);
		_exit(status);
	}
}

static void happened(enum event event)
{
	for (unsigned i = 0; i < sizeof(table) / sizeof(*table); i++) {
		const struct row *row = &table[i];
		if (row->state != state || row->event != event)
			continue;
		if (row->next == ENDING && state != ENDING)
			bound = now_ms() + bound_after;
		/* a second signal ends everything at once, as it does in the sidecar */
		carry_out(row->actions, state == ENDING && event == SIGTERM_);
		state = row->next;
		if (state == WAITING)
			deadline = now_ms() + GRACE_MS;
		if (row->actions & GRANT) {
			deadline = now_ms() + FIRST_BEAT_MS;
			/* sent or not, from here on there may be copies */
			if (tell(WORD_GRANT, ports.fd, ports.count) < 0)
				happened(BROKEN);
		}
		return;
	}
}

static void serve(void)
{
	for (;;) {
		struct pollfd fds[] = {{.fd = signals, .events = POLLIN},
				       {.fd = lease, .events = POLLIN},
				       {.fd = state == WAITING ? DOOR : -1, .events = POLLIN}};
		long until = deadline;

		if (state == ENDING && bound < until)
			until = bound;
		long wait = until - now_ms();
		int ready = poll(fds, 3, wait > 0 ? (int)wait : 0);

		/* one event a round: what follows may close what the next would be about */
		if (ready > 0 && fds[0].revents)
			happened(on_signal());
		else if (ready > 0 && fds[1].revents)
			happened(on_lease());
		else if (ready > 0 && fds[2].revents)
			happened(on_door());
		else if (ready == 0 && state == ENDING && now_ms() >= bound)
			happened(BOUND);
		else if (ready == 0 && now_ms() >= deadline)
			happened(SILENCE);
	}
}

static void make_door(void)
{
	int pair[2];

	if (fcntl(DOOR, F_GETFD) >= 0 && getenv("WEIR_HOLD"))
		return; /* back from the sidecar: rings may wait there */
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, pair) < 0 ||
	    dup2(pair[0], BELL) < 0 || dup2(pair[1], DOOR) < 0)
		fail("making the door");
	close(pair[0]);
	close(pair[1]);
}

int main(int count, char **arguments)
{
	static char *usual[] = {"/opt/weir/bin/weir", "sidecar", NULL};
	static char path[4096];
	const char *limit = getenv("REVISION_TIMEOUT_SECONDS");
	sigset_t ours;

	sigemptyset(&ours);
	sigaddset(&ours, SIGTERM);
	sigaddset(&ours, SIGINT);
	sigprocmask(SIG_BLOCK, &ours, NULL);
	signal(SIGPIPE, SIG_IGN);
	signal(SIGCHLD, SIG_IGN); /* as process 1 we are given orphans; the kernel reaps them */
	prctl(PR_SET_NAME, "weir-hold");
	sidecar = count > 1 ? arguments + 1 : usual;
	ssize_t length = readlink("/proc/self/exe", path, sizeof(path) - 1);
	if (length < 0)
		fail("/proc/self/exe");
	own_path = path;
	/* the pod's termination grace period is the revision's timeout */
	long seconds = limit ? strtol(limit, NULL, 10) : 0;
	bound_after = (seconds > 0 && seconds < 1000000 ? seconds : 300) * 1000L;

	signals = signalfd(-1, &ours, SFD_CLOEXEC | SFD_NONBLOCK);
	if (signals < 0)
		fail("signalfd");
	make_door();
	ports_open(&ports, signals);
	deadline = now_ms() + GRACE_MS;
	serve();
}
