// SPDX-License-Identifier: BSD-2-Clause
//
// The checks of table.cpp, by subject.
#pragma once

#include "tests/parity/stage.h"

namespace parity {

// connection_rows.cpp
void backend_answers(Stage& stage);
void backend_answers_over_ipv6(Stage& stage);
void mapped_address_reaches_the_vip(Stage& stage);
void no_backend_is_refused(Stage& stage);
void unserved_port_is_refused(Stage& stage);
void other_address_is_untouched(Stage& stage);
void peer_is_the_vip(Stage& stage);
void half_close_gets_the_whole_reply(Stage& stage);
void reset_arrives(Stage& stage);
void live_connection_outlives_its_backend(Stage& stage);
void on_remove_reset_ends_connections(Stage& stage);
void draining_backend_keeps_what_it_has(Stage& stage);
void mistake_changes_nothing(Stage& stage);
void connections_are_counted(Stage& stage);
void backend_sees_whom(Stage& stage);
void unreachable_and_pass(Stage& stage);
void unserved_port_with_a_wildcard_listener(Stage& stage);
void wildcard_listener_on_the_port(Stage& stage);
void peer_names_off(Stage& stage);
void mark_is_set(Stage& stage);

// choice_rows.cpp
void random_draws_by_weight(Stage& stage);
void round_robin_takes_turns(Stage& stage);
void least_conn_prefers_the_idle(Stage& stage);
void maglev_keeps_a_client(Stage& stage);
void affinity_keeps_until_the_backend_leaves(Stage& stage);
void affinity_expires(Stage& stage);
void ejected_backend_is_skipped(Stage& stage);
void ejected_backend_is_tried_again(Stage& stage);
void ejected_again_for_twice_as_long(Stage& stage);
void health_takes_the_dead_out(Stage& stage);
void all_down_is_refused(Stage& stage);
void panic_tries_what_is_down(Stage& stage);
void dead_backend(Stage& stage);
void all_backends_dead(Stage& stage);
void client_is_whom(Stage& stage);
void client_is_a_namespace(Stage& stage);

// datagram_rows.cpp
void answer_comes_from_the_vip(Stage& stage);
void answer_comes_from_the_vip_over_ipv6(Stage& stage);
void answer_comes_from_the_mapped_vip(Stage& stage);
void datagrams_of_a_socket_go_to_one_backend(Stage& stage);
void unconnected_socket_is_given_another_backend(Stage& stage);
void datagram_without_backend(Stage& stage);
void connected_socket_whose_backend_leaves(Stage& stage);

}  // namespace parity
