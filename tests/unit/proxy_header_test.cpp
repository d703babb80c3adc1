// SPDX-License-Identifier: BSD-2-Clause
#include "fallback_proxy/proxy_header.h"

#include <gtest/gtest.h>

#include <boost/asio/ip/address.hpp>
#include <string>

namespace {

using boost::asio::ip::make_address;
using config::ProxyProtocol;
using userspace::proxy_header;
using userspace::SocketAddress;

const SocketAddress client4(make_address("192.0.2.7"), 51000);
const SocketAddress vip4(make_address("10.96.0.1"), 80);
const SocketAddress client6(make_address("2001:db8::7"), 51000);
const SocketAddress vip6(make_address("2001:db8::1"), 80);

const std::string signature("\r\n\r\n\0\r\nQUIT\n", 12);
const std::string ports("\xc7\x38\0\x50", 4);

TEST(ProxyHeader, Version1OfIpv4) {
  EXPECT_EQ(proxy_header(ProxyProtocol::v1, client4, vip4), "PROXY TCP4 192.0.2.7 10.96.0.1 51000 80\r\n");
}

TEST(ProxyHeader, Version1OfIpv6) {
  EXPECT_EQ(proxy_header(ProxyProtocol::v1, client6, vip6), "PROXY TCP6 2001:db8::7 2001:db8::1 51000 80\r\n");
}

TEST(ProxyHeader, Version1IsNeverLongerThanReadersMustExpect) {
  const SocketAddress longest(make_address("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"), 65535);
  EXPECT_LE(proxy_header(ProxyProtocol::v1, longest, longest).size(), 107U);
}

TEST(ProxyHeader, Version2OfIpv4) {
  EXPECT_EQ(proxy_header(ProxyProtocol::v2, client4, vip4),
            signature + std::string("\x21\x11\0\x0c\xc0\0\x02\x07\x0a\x60\0\x01", 12) + ports);
}

TEST(ProxyHeader, Version2OfIpv6) {
  const std::string prefix("\x20\x01\x0d\xb8", 4);
  const std::string zeros(11, '\0');
  EXPECT_EQ(proxy_header(ProxyProtocol::v2, client6, vip6),
            signature + std::string("\x21\x21\0\x24", 4) + prefix + zeros + '\x07' + prefix + zeros + '\x01' + ports);
}

}  // namespace
