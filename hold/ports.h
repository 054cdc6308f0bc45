/* The listening sockets of one pod: which, how they are opened, and how every copy of them is made
 * useless. */
#define MAX_PORTS 8

struct ports {
	int fd[MAX_PORTS];
	int count;
};

/* Take what LISTEN_FDS brings, open the rest the environment asks for. Exits with a message on a
 * bad variable. A port that somebody still listens on is waited for; a signal on `signals` ends
 * that, with status 0. */
void ports_open(struct ports *ports, int signals);

/* 1 when the kernel moves waiting connections from a closed listener to another one. */
int ports_can_fence(void);

/* New listeners on the same ports; the old ones, and every copy of them, neither accept nor listen
 * again. Connections that waited are in the new ones. -1 with errno when that can't be done: then
 * nothing may be lent or served. */
int ports_fence(struct ports *ports, int steer_ms);

/* LISTEN_FDS and LISTEN_PID, for exec: the listeners become descriptors 3, 4, ... */
void ports_to_environment(struct ports *ports);

/* For everybody who has a copy. */
void ports_shut(struct ports *ports);

/* A line on stderr: "weir-hold: WHAT: WHY". */
void say(const char *what, const char *why);
