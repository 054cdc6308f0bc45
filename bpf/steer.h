/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Steering: a connection to the pod's direct port goes to whatever listens on its user port.
 *
 * Nothing listens on the direct port itself, so doing nothing means a RST, and the caller falls
 * back to the data port. That is always right, only slower: every doubt ends there. */
#ifndef WEIR_STEER_H
#define WEIR_STEER_H

#include "maps.h"

#define TCP_STATE_LISTEN  10
#define ERR_NOT_SUPPORTED 95   /* EOPNOTSUPP */
#define ERR_EXISTS	  17   /* EEXIST */
#define NEXT_PROGRAM	  (-1) /* TCX_NEXT, and TC_ACT_UNSPEC under clsact */

/* The pod that owns a local address and takes direct connections now, or NULL. */
static __always_inline struct pod *steered_pod(const struct address *local, __u32 port,
					       __u64 *netns)
{
	__u64 *owner = bpf_map_lookup_elem(MAP(addresses), local);
	struct pod *pod;

	if (!owner)
		return NULL;
	*netns = *owner;
	pod = bpf_map_lookup_elem(MAP(pods), netns);
	if (!pod || !pod->enabled || port != pod->direct_port)
		return NULL;
	return pod;
}

static __always_inline void steering_ended(__u64 netns, int found)
{
	struct meter *meter = pod_meter(netns);

	if (meter)
		count(found ? &meter->steered : &meter->missed);
}

/* ---- sk_lookup: listeners that are plain TCP -------------------------------------------- */

static __always_inline int assign(struct bpf_sk_lookup *ctx, const struct listener_key *key)
{
	struct bpf_sock *listener = bpf_map_lookup_elem(MAP(listeners), key);
	long error;

	if (!listener)
		return 0;
	/* refuses an IPv6-only listener for an IPv4 caller. In a SO_REUSEPORT group the kernel
	 * goes on to choose the member, so any living one will do */
	error = bpf_sk_assign(ctx, listener, 0);
	bpf_sk_release(listener);
	return !error;
}

SEC("sk_lookup")
int steer(struct bpf_sk_lookup *ctx)
{
	struct listener_key key = {};
	struct address local = {};
	struct pod *pod;
	int found = 0;

	if (ctx->protocol != IPPROTO_TCP)
		return SK_PASS;
	if (ctx->family == AF_INET) {
		local.word[2] = bpf_htonl(0xffff);
		local.word[3] = ctx->local_ip4;
		/* the context takes only plain 4-byte loads: keep the compiler from merging the
		 * two branches into one load through a computed pointer */
		barrier();
	} else {
		local.word[0] = ctx->local_ip6[0];
		local.word[1] = ctx->local_ip6[1];
		local.word[2] = ctx->local_ip6[2];
		local.word[3] = ctx->local_ip6[3];
		barrier();
	}
	pod = steered_pod(&local, ctx->local_port, &key.netns);
	if (!pod)
		return SK_PASS;
	key.port = pod->user_port;
	for (int slot = 0; slot < LISTENER_SLOTS && !found; slot++) {
		key.slot = slot;
		key.family = ctx->family;
		found = assign(ctx, &key);
		if (found || ctx->family != AF_INET)
			continue;
		/* a dual-stack [::] listener takes IPv4, too; AF_INET never takes IPv6 */
		key.family = AF_INET6;
		found = assign(ctx, &key);
	}
	steering_ended(key.netns, found);
	return SK_PASS;
}

/* ---- sockops: listeners enter the map by themselves ------------------------------------- */

static __always_inline void listener_opened(struct bpf_sock_ops *ctx)
{
	struct listener_key key = {};
	struct meter *meter;
	struct pod *pod;
	long error = 0;

	key.netns = bpf_get_netns_cookie(ctx);
	pod = bpf_map_lookup_elem(MAP(pods), &key.netns);
	if (!pod || ctx->local_port != pod->user_port)
		return;
	meter = pod_meter(key.netns);
	if (!meter)
		return;
	key.port = ctx->local_port;
	key.family = ctx->family;
	for (int slot = 0; slot < LISTENER_SLOTS; slot++) {
		key.slot = slot;
		error = bpf_sock_hash_update(ctx, MAP(listeners), &key, BPF_NOEXIST);
		if (error != -ERR_EXISTS)
			break;
	}
	if (!error)
		count(&meter->listeners);
	else if (error == -ERR_NOT_SUPPORTED)
		count(&meter->refused);
	bpf_ringbuf_output(MAP(bell), &key.netns, sizeof(key.netns), BPF_RB_FORCE_WAKEUP);
}

/* ---- tc: listeners that a SOCKHASH refuses (MPTCP, the default of Go since 1.24) -------- */

static __always_inline struct bpf_sock *listening(struct __sk_buff *skb,
						  struct bpf_sock_tuple *tuple, __u32 size)
{
	struct bpf_sock *sk = bpf_skc_lookup_tcp(skb, tuple, size, BPF_F_CURRENT_NETNS, 0);

	if (!sk)
		return NULL;
	if (sk->state == TCP_STATE_LISTEN)
		return sk;
	bpf_sk_release(sk);
	return NULL;
}

static __always_inline struct bpf_sock *listener4(struct __sk_buff *skb, struct iphdr *ip,
						  struct tcphdr *tcp, __u16 port)
{
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *sk;

	tuple.ipv4.saddr = ip->saddr;
	tuple.ipv4.daddr = bpf_htonl(INADDR_LOOPBACK);
	tuple.ipv4.sport = tcp->source;
	tuple.ipv4.dport = bpf_htons(port);
	sk = listening(skb, &tuple, sizeof(tuple.ipv4));
	if (sk)
		return sk;
	tuple.ipv4.daddr = ip->daddr; /* bound to the pod's address only */
	return listening(skb, &tuple, sizeof(tuple.ipv4));
}

static __always_inline struct bpf_sock *listener6(struct __sk_buff *skb, struct ipv6hdr *ip,
						  struct tcphdr *tcp, __u16 port)
{
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *sk;

	__builtin_memcpy(tuple.ipv6.saddr, &ip->saddr, sizeof(tuple.ipv6.saddr));
	tuple.ipv6.daddr[3] = bpf_htonl(1); /* ::1 */
	tuple.ipv6.sport = tcp->source;
	tuple.ipv6.dport = bpf_htons(port);
	sk = listening(skb, &tuple, sizeof(tuple.ipv6));
	if (sk)
		return sk;
	__builtin_memcpy(tuple.ipv6.daddr, &ip->daddr, sizeof(tuple.ipv6.daddr));
	return listening(skb, &tuple, sizeof(tuple.ipv6));
}

/* Only the SYN is assigned: later packets find the connection by themselves. */
SEC("tc")
int steer_mptcp(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct iphdr *ip4 = data + ETH_HLEN;
	struct ipv6hdr *ip6 = data + ETH_HLEN;
	int v4 = skb->protocol == bpf_htons(ETH_P_IP);
	struct address local = {};
	struct bpf_sock *sk;
	struct tcphdr *tcp;
	struct pod *pod;
	__u64 netns = 0;
	long error = -1;

	if (!v4 && skb->protocol != bpf_htons(ETH_P_IPV6))
		return NEXT_PROGRAM;
	tcp = v4 ? (void *)(ip4 + 1) : (void *)(ip6 + 1);
	if ((void *)(tcp + 1) > end)
		return NEXT_PROGRAM;
	if (v4 ? ip4->protocol != IPPROTO_TCP || ip4->ihl != 5 : ip6->nexthdr != IPPROTO_TCP)
		return NEXT_PROGRAM;
	if (!tcp->syn || tcp->ack)
		return NEXT_PROGRAM;
	if (v4) {
		local.word[2] = bpf_htonl(0xffff);
		local.word[3] = ip4->daddr;
	} else {
		__builtin_memcpy(&local, &ip6->daddr, sizeof(local));
	}
	pod = steered_pod(&local, bpf_ntohs(tcp->dest), &netns);
	if (!pod)
		return NEXT_PROGRAM;
	sk = v4 ? listener4(skb, ip4, tcp, pod->user_port)
		: listener6(skb, ip6, tcp, pod->user_port);
	if (sk) {
		error = bpf_sk_assign(skb, sk, 0);
		bpf_sk_release(sk);
	}
	/* sk_lookup runs for what was not assigned here, and counts that miss */
	if (!error)
		steering_ended(netns, 1);
	return NEXT_PROGRAM;
}

/* ---- what the app is told about its peer ------------------------------------------------ */

/* Behind a queue-proxy every peer is 127.0.0.1, and servers trust X-Forwarded-* from there only:
 * accept() and getpeername() say so on the direct port, too. */
static __always_inline int on_direct_port(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	__u64 netns = bpf_get_netns_cookie(ctx);
	struct pod *pod = bpf_map_lookup_elem(MAP(pods), &netns);

	return sk && pod && sk->src_port == pod->direct_port;
}

SEC("cgroup/getpeername4")
int peer_is_local4(struct bpf_sock_addr *ctx)
{
	if (on_direct_port(ctx))
		ctx->user_ip4 = bpf_htonl(INADDR_LOOPBACK);
	return 1;
}

SEC("cgroup/getpeername6")
int peer_is_local6(struct bpf_sock_addr *ctx)
{
	if (!on_direct_port(ctx))
		return 1;
	/* ::ffff:127.0.0.1, what a dual-stack listener shows for a local IPv4 caller */
	ctx->user_ip6[0] = 0;
	ctx->user_ip6[1] = 0;
	ctx->user_ip6[2] = bpf_htonl(0xffff);
	ctx->user_ip6[3] = bpf_htonl(INADDR_LOOPBACK);
	return 1;
}

#endif
