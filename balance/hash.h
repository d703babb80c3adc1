/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * The hash of whatever is looked up in a Maglev table, and where it falls: the one definition, for the kernel side (as
 * C) and for user space (as C++, in namespace balance). Not meant to resist somebody who chooses the keys.
 */
#ifndef CLUSTERIP_BALANCE_HASH_H
#define CLUSTERIP_BALANCE_HASH_H

#include <linux/types.h>

#ifdef __cplusplus
#define HASH_FUNCTION constexpr
namespace balance {
#else
#define HASH_FUNCTION static inline __attribute__((always_inline))
#endif

/*
 * One step of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014), with the
 * constants of Vigna's public-domain splitmix64.c: a bijection, in which each input bit changes each output bit with a
 * probability close to one half.
 */
HASH_FUNCTION __u64 hash_mix(__u64 key)
{
	key += 0x9e3779b97f4a7c15ull;
	key = (key ^ (key >> 30)) * 0xbf58476d1ce4e5b9ull;
	key = (key ^ (key >> 27)) * 0x94d049bb133111ebull;
	return key ^ (key >> 31);
}

/* Of two words, in this order; longer keys by nesting: hash_pair(hash_pair(a, b), c). */
HASH_FUNCTION __u64 hash_pair(__u64 first, __u64 second)
{
	return hash_mix(hash_mix(first) ^ second);
}

/* The slot of a table of `slots` that a hash falls into: its high half, scaled. No division, and any size will do. */
HASH_FUNCTION __u32 hash_slot(__u64 hash, __u32 slots)
{
	return (__u32)(((hash >> 32) * slots) >> 32);
}

#ifdef __cplusplus
} // namespace balance
#endif
#undef HASH_FUNCTION

#endif
