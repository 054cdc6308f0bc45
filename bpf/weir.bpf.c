// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/* Weir in the kernel: one object, attached once per pod.
 *
 *   sk_lookup, tc, getpeername   steer.h   a connection to the direct port reaches the app
 *   cgroup_skb                   track.h   its requests are counted
 *                                          (step.h, http1.h, scan.h, budget.h, meter.h)
 *   sockops                      below     listeners and connections come and go
 */
#include "steer.h"
#include "track.h"

#ifndef WEIR_BCC
char LICENSE[] SEC("license") = "GPL"; /* what the kernel accepts; see the SPDX line */
#endif

SEC("sockops")
int socket_event(struct bpf_sock_ops *ctx)
{
	switch (ctx->op) {
	case BPF_SOCK_OPS_TCP_LISTEN_CB:
		listener_opened(ctx);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		connection_opened(ctx);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		state_changed(ctx);
		break;
	}
	return 1;
}
