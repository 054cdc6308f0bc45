/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* What bcc's compiler needs instead of libbpf's headers (bpf/bcc.py). bcc puts every function that
 * isn't static into a section of its own, knows no relocations, and takes no second argument. So a
 * map or a callback is an instruction with a number in it, which the loader replaces. */
#ifndef WEIR_BCC_H
#define WEIR_BCC_H

#ifndef SEC
#define SEC(name) /* the loader reads it from the source */
#endif
#define A_MAP		  __attribute__((section(".maps"), used)) /* so that its types are told whole */
#define __uint(name, val) int(*name)[val]
#define __type(name, val) __typeof__(val) *name

typedef __u64 atomic; /* bcc compiles for the first version of eBPF, which has no other */

#define WEIR_PSEUDO_MAP_FD 1 /* BPF_PSEUDO_MAP_FD, BPF_PSEUDO_FUNC */
#define WEIR_PSEUDO_FUNC   4

#define MAP(name)      ((void *)bpf_pseudo_fd(WEIR_PSEUDO_MAP_FD, NUMBER_##name))
#define FUNCTION(name) ((void *)bpf_pseudo_fd(WEIR_PSEUDO_FUNC, NUMBER_##name))

/* The second argument is where the kernel puts it; the verifier would tell if it weren't. */
#define CALLBACK(name, index, x)                                                                   \
	static __always_inline long name##_body(__u32 index, x);                                   \
	long name(struct __sk_buff *first)                                                         \
	{                                                                                          \
		void *second;                                                                      \
                                                                                                   \
		asm volatile("%0 = r2" : "=r"(second));                                            \
		return name##_body((__u32)(__u64)first, second);                                   \
	}                                                                                          \
	static __always_inline long name##_body(__u32 index, x)

#ifndef offsetof
#define offsetof(type, member) __builtin_offsetof(type, member)
#endif
#ifndef barrier
#define barrier() asm volatile("" ::: "memory")
#endif
#ifndef barrier_var
#define barrier_var(var) asm volatile("" : "+r"(var))
#endif

#ifndef bpf_htons
#define bpf_htons(x) __builtin_bswap16(x)
#define bpf_ntohs(x) __builtin_bswap16(x)
#define bpf_htonl(x) __builtin_bswap32(x)
#define bpf_ntohl(x) __builtin_bswap32(x)
#endif

#endif
