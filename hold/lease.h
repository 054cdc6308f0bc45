/* The lease on a pod's listening sockets, seen from hold: states, events, what follows, words,
 * times.
 *
 * The table is the only definition of hold's behaviour: hold.c obeys it, the model in tests/hold
 * reads it. An event that a state has no row for can't happen there (the door is not read while a
 * lease is out, for one).
 */
/* clang-format off */
#define LEASE_TABLE(ROW) \
	/*  state    event     next     actions */ \
	ROW(WAITING, RING,     LENT,    GRANT) \
	ROW(WAITING, SILENCE,  SIDECAR, EXEC) \
	ROW(WAITING, SIGTERM_, SIDECAR, RAISE | EXEC) \
	ROW(LENT,    RELEASED, WAITING, HANG_UP) \
	ROW(LENT,    SILENCE,  WAITING, FENCE | HANG_UP) \
	ROW(LENT,    BROKEN,   WAITING, FENCE | HANG_UP) \
	ROW(LENT,    SIGTERM_, ENDING,  TELL) \
	ROW(ENDING,  DONE,     GONE,    CLOSE) \
	ROW(ENDING,  BOUND,    GONE,    CLOSE) \
	ROW(ENDING,  SIGTERM_, GONE,    CLOSE) \
	ROW(ENDING,  RELEASED, SIDECAR, HANG_UP | RAISE | EXEC) \
	ROW(ENDING,  SILENCE,  SIDECAR, FENCE | HANG_UP | RAISE | EXEC) \
	ROW(ENDING,  BROKEN,   SIDECAR, FENCE | HANG_UP | RAISE | EXEC)

/* carried out in this order */
#define LEASE_ACTIONS(ACTION) \
	ACTION(FENCE)   /* copies of the listeners that anybody has die; what waits in them moves to new ones */ \
	ACTION(HANG_UP) /* close our end of the lease: whoever has the other reads EOF */ \
	ACTION(GRANT)   /* send the listeners */ \
	ACTION(TELL)    /* say that the pod ends */ \
	ACTION(RAISE)   /* make the SIGTERM pending again, for the sidecar */ \
	ACTION(EXEC)    /* become the sidecar */ \
	ACTION(CLOSE)   /* shut the listeners, for everybody, and exit */

#define LEASE_STATES(STATE) STATE(WAITING) STATE(LENT) STATE(ENDING) STATE(SIDECAR) STATE(GONE)
#define LEASE_EVENTS(EVENT) \
	EVENT(RING) EVENT(RELEASED) EVENT(DONE) EVENT(BROKEN) EVENT(SILENCE) EVENT(SIGTERM_) EVENT(BOUND)
/* clang-format on */

/* what is said, one word a packet: the agent's, then hold's */
#define WORD_RING     "weir1 ring" /* on the door, with the lease */
#define WORD_BEAT     "beat"
#define WORD_RELEASED "released" /* every copy is closed */
#define WORD_DONE     "done"	 /* the same, and the pod has drained */
#define WORD_GRANT    "grant"	 /* with the listeners */
#define WORD_END      "end"	 /* SIGTERM came: drain */
#define WORD_UNSAFE   "unsafe"	 /* nothing is lent while tcp_migrate_req is 0 */

#define GRACE_MS      500  /* in which an agent may ring before the sidecar serves */
#define FIRST_BEAT_MS 1000 /* after a grant */
#define SILENCE_MS    3000 /* without a beat, afterwards; agents beat every BEAT_MS */
#define BEAT_MS	      1000
#define STEER_MS      20 /* in which handshakes with the old listeners end before the shutdown */

#define BELL 62 /* descriptors: for borrowing */
#define DOOR 63 /* where rings arrive; readable while one waits */
