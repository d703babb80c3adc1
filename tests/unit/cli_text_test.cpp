// SPDX-License-Identifier: BSD-2-Clause
#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "cli/endpoint.h"
#include "cli/outcome.h"
#include "cli/table.h"
#include "cli/text.h"

namespace cli {
namespace {

using enum Table::Align;

TEST(Table, AlignsNumbersRightAndLeavesNoTrailingBlanks) {
  Table table({{.title = "NAME"}, {.title = "COUNT", .align = right}, {.title = "REASON"}});
  table.add({{.text = "a"}, {.text = "7"}, {.text = ""}});
  table.add({{.text = "longer"}, {.text = "1234567"}, {.text = "why"}});
  EXPECT_EQ(table.render(false),
            "NAME      COUNT  REASON\n"
            "a             7\n"
            "longer  1234567  why\n");
}

TEST(Table, ColourDoesNotChangeTheAlignment) {
  Table table({{.title = "STATE"}, {.title = "N", .align = right}});
  table.add({{.text = "drain", .colour = Colour::yellow}, {.text = "1"}});
  EXPECT_EQ(table.render(true), "STATE  N\n\x1b[33mdrain\x1b[0m  1\n");
  EXPECT_EQ(table.render(false), "STATE  N\ndrain  1\n");
}

TEST(Table, ShowsControlCharactersHarmless) {
  Table table({{.title = "NAME"}, {.title = "N"}});
  table.add({{.text = "a\x1b[2J\nb"}, {.text = "1"}});
  EXPECT_EQ(table.render(false), "NAME     N\na?[2J?b  1\n");
}

TEST(Table, MeasuresCodePointsNotBytes) {
  Table table({{.title = "NAME"}, {.title = "N"}});
  table.add({{.text = "\u00e9\u00e9\u00e9\u00e9\u00e9"}, {.text = "1"}});
  EXPECT_EQ(table.render(false), "NAME   N\n\u00e9\u00e9\u00e9\u00e9\u00e9  1\n");
}

TEST(Endpoint, ReadsIpv4WithTcpAsTheDefault) {
  const auto endpoint = parse_endpoint("192.10.100.100:5201");
  ASSERT_TRUE(endpoint);
  EXPECT_EQ(endpoint->address, "192.10.100.100");
  EXPECT_EQ(endpoint->port, 5201);
  EXPECT_EQ(endpoint->protocol, IPPROTO_TCP);
  ASSERT_EQ(endpoint->length, sizeof(sockaddr_in));
  sockaddr_in socket_address{};
  std::memcpy(&socket_address, &endpoint->socket_address, sizeof socket_address);
  EXPECT_EQ(socket_address.sin_family, AF_INET);
  EXPECT_EQ(ntohl(socket_address.sin_addr.s_addr), 0xc00a6464U);
  EXPECT_EQ(ntohs(socket_address.sin_port), 5201);
}

TEST(Endpoint, ReadsIpv6InBracketsWithUdp) {
  const auto endpoint = parse_endpoint("[2001:DB8:0::1]:53/udp");
  ASSERT_TRUE(endpoint);
  EXPECT_EQ(endpoint->address, "2001:db8::1");
  EXPECT_EQ(endpoint->port, 53);
  EXPECT_EQ(endpoint->protocol, IPPROTO_UDP);
  EXPECT_EQ(endpoint->length, sizeof(sockaddr_in6));
  EXPECT_EQ(address_and_port(endpoint->address, endpoint->port), "[2001:db8::1]:53");
}

TEST(Endpoint, RefusesWhatIsNoAddressAndPort) {
  for (const char* text : {"",
                           ":",
                           "10.0.0.1",
                           "10.0.0.1:",
                           ":80",
                           "10.0.0.1:0",
                           "10.0.0.1:65536",
                           "10.0.0.1:-1",
                           "10.0.0.1:+1",
                           "10.0.0.1: 80",
                           "10.0.0.1:80x",
                           "10.0.0.1:80/",
                           "10.0.0.1:80/sctp",
                           "10.0.0.1:80/UDP",
                           "10.0.0.300:80",
                           "10.0.0:80",
                           "2001:db8::1:80",
                           "[2001:db8::1]",
                           "[10.0.0.1]:80",
                           "[]:80",
                           "[fe80::1%lo]:80",
                           "localhost:80"}) {
    EXPECT_FALSE(parse_endpoint(text)) << text;
  }
}

TEST(ExitCode, TellsConfigurationFromWhatTheMachineCannot) {
  EXPECT_EQ(exit_for(0), Exit::fine);
  EXPECT_EQ(exit_for(-EBADMSG), Exit::configuration);
  for (const int error : {EOPNOTSUPP, EPERM, EACCES, ENOSYS, ENOENT, ENOTDIR, ENODEV}) {
    EXPECT_EQ(exit_for(-error), Exit::unsupported) << strerrorname_np(error);
  }
  EXPECT_EQ(exit_for(-EBUSY), Exit::failed);
  EXPECT_EQ(exit_for(-ENOMEM), Exit::failed);
}

TEST(ExitCode, InvalidArgumentIsAboutThePathsAtOpenOnly) {
  EXPECT_EQ(exit_for(-EINVAL, Call::open), Exit::unsupported);
  EXPECT_EQ(exit_for(-EINVAL, Call::other), Exit::failed);
}

TEST(Text, CountsInPlainEnglish) {
  EXPECT_EQ(count(0, "service"), "0 services");
  EXPECT_EQ(count(1, "service"), "1 service");
  EXPECT_EQ(count(2, "service"), "2 services");
}

}  // namespace
}  // namespace cli
