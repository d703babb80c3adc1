// SPDX-License-Identifier: BSD-2-Clause
#include "tests/parity/table.h"

#include <array>

#include "tests/parity/checks.h"

namespace parity {
namespace {

constexpr const char* refused = "ECONNREFUSED at once, and no packet leaves the machine";
constexpr const char* in_between = "the proxy is an end of its own to both sides";
constexpr const char* local_vips = "the proxy's VIPs are addresses of this machine, with all of their ports";
constexpr const char* accepted_first = "the proxy has accepted before it knows the backend";
constexpr const char* by_client = "the hook knows who asks; to the proxy, a client is where a connection comes from";

// clang-format off
constexpr std::array table{
  Row{"BackendAnswers", "connect to a VIP", "a backend answers", "", "", backend_answers},
  Row{"BackendAnswersOverIpv6", "the same over IPv6", "a backend answers; the peer is the VIP", "", "", backend_answers_over_ipv6},
  Row{"MappedAddress", "connect to `::ffff:VIP` from an IPv6 socket", "a backend of the IPv4 service answers; the peer is `::ffff:VIP`", "", "", mapped_address_reaches_the_vip},
  Row{"RandomDrawsByWeight", "`random`", "backends in proportion to their weights", "", "", random_draws_by_weight},
  Row{"RoundRobinTakesTurns", "`round_robin`", "in each turn, each backend as often as it weighs", "", "", round_robin_takes_turns},
  Row{"LeastConnPrefersTheIdle", "`least_conn`, one backend busy, one idle", "the idle one", "", "", least_conn_prefers_the_idle},
  Row{"MaglevKeepsAClient", "`maglev`", "a client's backend is always the same; with `client = \"socket\"` each socket is a client", "", "", maglev_keeps_a_client},
  Row{"AffinityKeeps", "`affinity`", "the same backend, until it leaves", "", "", affinity_keeps_until_the_backend_leaves},
  Row{"AffinityExpires", "`affinity` has expired", "any backend", "", "", affinity_expires},
  Row{"PeerIsTheVip", "getpeername()", "the VIP", "", "", peer_is_the_vip},
  Row{"NoBackend", "a service without backends, `refuse`", refused, "", "", no_backend_is_refused},
  Row{"UnservedPort", "a port of a VIP that no service has", refused, "", "", unserved_port_is_refused},
  Row{"OtherAddress", "an address that is no VIP", "what it would be without clusterip", "", "", other_address_is_untouched},
  Row{"HalfClose", "half-close, then the reply", "the whole reply", "", "", half_close_gets_the_whole_reply},
  Row{"Reset", "the backend resets", "ECONNRESET", "", "", reset_arrives},
  Row{"LiveConnectionOutlivesItsBackend", "a reload without the backend of a live connection, `drain` and `keep`", "the connection goes on; new ones avoid the backend", "", "", live_connection_outlives_its_backend},
  Row{"Drain", "a backend with `state = \"drain\"`", "new connections avoid it; those that it has go on", "", "", draining_backend_keeps_what_it_has},
  Row{"MistakeChangesNothing", "a reload with a mistake", "nothing changes; the log has file, line and column", "", "", mistake_changes_nothing},
  Row{"ConnectionsAreCounted", "the status of `least_conn`", "connections that were made, and those that live", "", "", connections_are_counted},
  Row{"EjectedIsSkipped", "`eject`: so many failed connects in a row", "the backend is skipped, and tried no more", "", "", ejected_backend_is_skipped},
  Row{"EjectedIsTriedAgain", "`eject`: its time is over, and the backend is back", "it answers again, and not before", "", "", ejected_backend_is_tried_again},
  Row{"EjectedTwice", "`eject`: its time is over, and the backend fails again", "it is skipped for twice as long", "", "", ejected_again_for_twice_as_long},
  Row{"HealthTakesTheDeadOut", "`health`", "no connection to a backend that is down; it is chosen again once it is up", "", "", health_takes_the_dead_out},
  Row{"AllDown", "`health` finds all backends down", "ECONNREFUSED", "", "", all_down_is_refused},
  Row{"Panic", "the same with `panic = true`", "all are tried: one that answers is reached", "", "", panic_tries_what_is_down},
  Row{"DatagramAnswer", "UDP question and answer, connected or not", "the answer comes from the VIP", "", "", answer_comes_from_the_vip},
  Row{"DatagramAnswerOverIpv6", "the same over IPv6", "the answer comes from the VIP", "", "", answer_comes_from_the_vip_over_ipv6},
  Row{"MappedDatagramAnswer", "the same to `::ffff:VIP` from an IPv6 socket", "a backend of the IPv4 service answers, from `::ffff:VIP`", "", "", answer_comes_from_the_mapped_vip},
  Row{"DatagramsOfASocket", "datagrams of one UDP socket", "one backend, whatever the policy", "", "", datagrams_of_a_socket_go_to_one_backend},
  Row{"UnconnectedSocketMoves", "an unconnected UDP socket whose backend leaves", "the next datagram goes to another", "", "", unconnected_socket_is_given_another_backend},

  Row{"BackendSees", "what the backend sees", "the application's own address", "the proxy's", in_between, backend_sees_whom},
  Row{"DeadBackend", "a dead backend among others", "ECONNREFUSED", "another backend answers", "the hook runs before the connection is tried, and cannot try again (a host that is gone is a timeout; `eject` and `health` make either rare)", dead_backend},
  Row{"AllBackendsDead", "no backend takes the connection", "ECONNREFUSED", "connected, then ECONNRESET", accepted_first, all_backends_dead},
  Row{"UnreachableAndPass", "a service without backends, `unreachable` or `pass`", "EHOSTUNREACH; what it would be without clusterip", "ECONNREFUSED", local_vips, unreachable_and_pass},
  Row{"UnservedPortWildcard", "a port of a VIP that no service has, and something of the machine listens there on all addresses", "ECONNREFUSED", "that listener answers", local_vips, unserved_port_with_a_wildcard_listener},
  Row{"WildcardOnThePort", "something of the machine listens on the service's port on all addresses", "a backend answers", "that listener answers; the status has the reason", local_vips, wildcard_listener_on_the_port},
  Row{"OnRemoveReset", "`on_remove = \"reset\"`, and the backend leaves", "ECONNABORTED", "ECONNRESET", "the kernel ends the application's socket itself; the proxy ends its own", on_remove_reset_ends_connections},
  Row{"PeerNamesOff", "getpeername() with `peer_names = false`", "the backend", "the VIP", in_between, peer_names_off},
  Row{"Mark", "`mark`", "the application's socket has it", "nothing has it", "the proxy cannot reach the application's socket", mark_is_set},
  Row{"ClientIsWhom", "several addresses in one cgroup, `client = \"cgroup\"`", "one client", "a client each", by_client, client_is_whom},
  Row{"ClientIsANamespace", "several addresses and cgroups in one network namespace, `client = \"netns\"`", "one client; each other namespace is another", "a client each; other namespaces have no VIPs", by_client, client_is_a_namespace},
  Row{"DatagramWithoutBackend", "connect() of a UDP socket, no backend", "ECONNREFUSED from connect()", "ECONNREFUSED after the first datagram", "without a hook, a UDP connect() asks nobody", datagram_without_backend},
  Row{"ConnectedSocketWhoseBackendLeaves", "a connected UDP socket whose backend leaves", "ECONNABORTED from recv(): connect again", "the next datagram goes to another backend", "the kernel holds on to the peer of a connected socket; the proxy is the peer", connected_socket_whose_backend_leaves},
};
// clang-format on

}  // namespace

std::span<const Row> rows() { return table; }

std::string same_rows_as_markdown() {
  std::string text = "| what happens | what the application sees, on either engine |\n| --- | --- |\n";
  for (const Row& row : table)
    if (!row.differs()) text += std::string("| ") + row.what + " | " + row.seen + " |\n";
  return text;
}

std::string differing_rows_as_markdown() {
  std::string text = "| what happens | fast path | userspace engine | why |\n| --- | --- | --- | --- |\n";
  for (const Row& row : table)
    if (row.differs())
      text += std::string("| ") + row.what + " | " + row.seen + " | " + row.userspace + " | " + row.reason + " |\n";
  return text;
}

}  // namespace parity
