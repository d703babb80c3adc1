/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * A planted fault, included before clusterip.bpf.c: the value of Service_Map is the block itself and is changed in place,
 * without a record in between. in_place_publication.cpp is its other half.
 */
#include "widen.h"

#define LOOK_UP(key_, service_)                                                        \
	({                                                                             \
		enum verdict verdict_ = PASS;                                          \
		__u32 *value_ = bpf_map_lookup_elem(&Service_Map, key_);               \
		if (value_) {                                                          \
			WIDEN_WINDOW();                                                \
			__u32 header_ = *(volatile __u32 *)value_;                     \
			union block_entry *block_ = bpf_map_lookup_elem(&Slot_Map, &header_); \
			if (block_) {                                                  \
				(service_)->record = block_->header.record;            \
				(service_)->header = header_;                          \
				(service_)->slots = block_->header.mark;             \
				verdict_ = REWRITTEN;                                  \
			}                                                              \
		}                                                                      \
		verdict_;                                                              \
	})
