// SPDX-License-Identifier: BSD-2-Clause
//
// The only place that speaks HTTP and TLS to an API server.
#include "kubernetes/client.h"

#include <fmt/format.h>
#include <netinet/tcp.h>
#include <openssl/ssl.h>
#include <openssl/x509.h>

#include <algorithm>
#include <array>
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/ssl.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/http/basic_parser.hpp>
#include <boost/json.hpp>
#include <charconv>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <unordered_set>
#include <utility>
#include <vector>

#include "config/fail.h"
#include "config/printable.h"
#include "config/read_config.h"
#include "config/values.h"
#include "kubernetes/resolver.h"
#include "kubernetes/selector.h"
#include "kubernetes/splitter.h"

namespace kubernetes {
namespace {

namespace asio = boost::asio;
namespace http = boost::beast::http;
namespace ssl = boost::asio::ssl;
using asio::awaitable;
using asio::ip::tcp;
using boost::system::error_code;
using Clock = std::chrono::steady_clock;
using namespace std::chrono_literals;

constexpr auto use_tuple = asio::as_tuple(asio::use_awaitable);

constexpr std::size_t max_error_text = 16384;
constexpr auto watch_grace = 30s;  // beyond the time that the server was asked to end a watch after

struct KindNames {
  const char* plural;
  const char* group;
  const char* path;  // before the namespace
};

constexpr KindNames names_of(Kind kind) {
  return kind == Kind::service
             ? KindNames{.plural = "services", .group = "", .path = "/api/v1"}
             : KindNames{.plural = "endpointslices", .group = "discovery.k8s.io", .path = "/apis/discovery.k8s.io/v1"};
}

/// Hands on what comes, and keeps nothing but the status.
class Answer final : public http::basic_parser<false> {
 public:
  /// `body` returns false when it can do nothing with the text.
  Answer(std::function<void(unsigned status)> begun, std::function<bool(unsigned status, std::string_view)> body)
      : begun_(std::move(begun)), body_(std::move(body)) {
    eager(true);
    body_limit(boost::none);
    header_limit(32768);
  }
  [[nodiscard]] unsigned status() const { return status_; }

 private:
  using Text = boost::beast::string_view;

  void take(Text text, error_code& error) {
    if (!body_(status_, std::string_view(text.data(), text.size())))
      error = http::make_error_code(http::error::bad_value);
  }

  void on_request_impl(http::verb, Text, Text, int, error_code&) override {}
  void on_response_impl(int code, Text, int, error_code&) override { status_ = static_cast<unsigned>(code); }
  void on_field_impl(http::field, Text, Text, error_code&) override {}
  void on_header_impl(error_code&) override { begun_(status_); }
  void on_body_init_impl(const boost::optional<std::uint64_t>&, error_code&) override {}
  std::size_t on_body_impl(Text text, error_code& error) override {
    take(text, error);
    return text.size();
  }
  void on_chunk_header_impl(std::uint64_t, Text, error_code&) override {}
  std::size_t on_chunk_body_impl(std::uint64_t, Text text, error_code& error) override {
    take(text, error);
    return text.size();
  }
  void on_finish_impl(error_code&) override {}

  const std::function<void(unsigned)> begun_;
  const std::function<bool(unsigned, std::string_view)> body_;
  unsigned status_ = 0;
};

/// One connection, with a bound for how long whatever is being waited for may take.
class Connection : public std::enable_shared_from_this<Connection> {
 public:
  Connection(asio::io_context& io, ssl::context* tls) : socket_(io), deadline_(io), silence_(io) {
    if (tls != nullptr) stream_.emplace(socket_, *tls);
  }

  void limit(Clock::duration time) { arm(deadline_, time); }
  /// From now on, nor may nothing come for so long.
  void limit_silence(Clock::duration time) {
    max_silence_ = time;
    arm(silence_, time);
  }

  /// Empty: connected. Else what went wrong, with the last address.
  awaitable<std::string> connect(std::span<const tcp::endpoint> addresses, const Pace& pace) {
    const auto until = Clock::now() + pace.patience;
    std::string problem;
    for (const tcp::endpoint& address : addresses) {
      const auto left = until - Clock::now();
      if (left <= 0s) break;
      error_code ignored;
      socket_.close(ignored);
      is_late_ = false;
      limit(addresses.size() == 1 ? left : std::min<Clock::duration>(left, pace.connect_time));
      const auto [refused] = co_await socket_.async_connect(address, use_tuple);
      if (!refused && !is_late_) co_return std::string();
      problem = what(refused);
    }
    co_return problem;
  }

  /// Of one that is connected, likewise.
  awaitable<std::string> prepare(const Access& access) {
    error_code ignored;
    socket_.set_option(tcp::no_delay(true), ignored);
    // A watch may be silent for long: find out when the other side is gone.
    socket_.set_option(asio::socket_base::keep_alive(true), ignored);
    using Idle = asio::detail::socket_option::integer<IPPROTO_TCP, TCP_KEEPIDLE>;
    using Interval = asio::detail::socket_option::integer<IPPROTO_TCP, TCP_KEEPINTVL>;
    using Count = asio::detail::socket_option::integer<IPPROTO_TCP, TCP_KEEPCNT>;
    socket_.set_option(Idle(15), ignored);
    socket_.set_option(Interval(5), ignored);
    socket_.set_option(Count(3), ignored);
    if (!stream_) co_return std::string();

    const std::string& name = access.server_name.empty() ? access.host : access.server_name;
    const bool is_address = config::parse_address(name).has_value();
    X509_VERIFY_PARAM* expected = SSL_get0_param(stream_->native_handle());
    if (is_address) {
      X509_VERIFY_PARAM_set1_ip_asc(expected, name.c_str());
    } else {
      SSL_set_tlsext_host_name(stream_->native_handle(), name.c_str());
      X509_VERIFY_PARAM_set1_host(expected, name.c_str(), name.size());
    }
    const auto [error] = co_await stream_->async_handshake(ssl::stream_base::client, use_tuple);
    if (!error) co_return std::string();
    const long verdict = SSL_get_verify_result(stream_->native_handle());
    if (verdict == X509_V_ERR_HOSTNAME_MISMATCH || verdict == X509_V_ERR_IP_ADDRESS_MISMATCH)
      co_return fmt::format("its certificate is not for {}", name);
    if (verdict != X509_V_OK)
      co_return fmt::format("its certificate is not trusted: {} (authorities: {})",
                            X509_verify_cert_error_string(verdict),
                            access.ca_source.empty() ? "the system's" : config::printable(access.ca_source));
    co_return "TLS: " + what(error);
  }

  awaitable<std::string> write(std::string_view text) {
    const auto [error, length] = stream_ ? co_await asio::async_write(*stream_, asio::buffer(text), use_tuple)
                                         : co_await asio::async_write(socket_, asio::buffer(text), use_tuple);
    co_return error ? what(error) : std::string();
  }

  /// Reads one answer. Empty: all of it came.
  awaitable<std::string> read(Answer& answer, std::uint64_t& bytes) {
    is_reusable_ = false;
    for (;;) {
      while (begin_ < end_ && !answer.is_done()) {
        error_code error;
        begin_ += answer.put(asio::buffer(buffer_.data() + begin_, end_ - begin_), error);
        if (error == http::error::need_more) break;
        if (error == http::error::bad_value) co_return "what it sends is no list and no watch";
        if (error) co_return fmt::format("what it sends is no HTTP: {}", error.message());
      }
      if (answer.is_done()) {
        is_reusable_ = answer.keep_alive();
        co_return std::string();
      }
      std::copy(buffer_.begin() + static_cast<std::ptrdiff_t>(begin_),
                buffer_.begin() + static_cast<std::ptrdiff_t>(end_), buffer_.begin());
      end_ -= std::exchange(begin_, 0);
      if (end_ == buffer_.size()) co_return "what it sends is no HTTP: a line without an end";
      const auto room = asio::buffer(buffer_.data() + end_, buffer_.size() - end_);
      const auto [error, length] = stream_ ? co_await stream_->async_read_some(room, use_tuple)
                                           : co_await socket_.async_read_some(room, use_tuple);
      bytes += length;
      end_ += length;
      if (!error && max_silence_) arm(silence_, *max_silence_);
      if (!error) continue;
      if (error == asio::error::eof || error == ssl::error::stream_truncated) {
        error_code incomplete;
        if (answer.got_some()) answer.put_eof(incomplete);
        co_return answer.is_done() && !incomplete ? "" : "the connection ended";
      }
      co_return what(error);
    }
  }

  /// The last answer came to its end, and the server has not said that it closes.
  [[nodiscard]] bool is_reusable() const { return is_reusable_; }

 private:
  void arm(asio::steady_timer& timer, Clock::duration time) {
    timer.expires_after(time);
    timer.async_wait([weak = weak_from_this(), &timer](const error_code& cancelled) {
      const auto self = weak.lock();  // the connection may have ended at the same moment
      if (cancelled || !self || timer.expiry() > Clock::now()) return;
      self->is_late_ = true;
      error_code ignored;
      self->socket_.close(ignored);
    });
  }

  std::string what(const error_code& error) const { return is_late_ ? "it does not answer in time" : error.message(); }

  tcp::socket socket_;
  std::optional<ssl::stream<tcp::socket&>> stream_;
  asio::steady_timer deadline_;
  asio::steady_timer silence_;
  std::optional<Clock::duration> max_silence_;
  bool is_late_ = false;
  bool is_reusable_ = false;
  std::vector<char> buffer_ = std::vector<char>(65536);
  std::size_t begin_ = 0;  // of what is in the buffer and was not parsed
  std::size_t end_ = 0;
};

/// "default/web" of an object's beginning, as far as that can be told.
std::string name_in(std::string_view text) {
  const auto after = [&text](std::string_view key, std::size_t from) -> std::string {
    const std::size_t found = text.find(key, from);
    if (found == std::string_view::npos) return {};
    const std::size_t begin = found + key.size();
    return std::string(text.substr(begin, std::min(text.find('"', begin), text.size()) - begin));
  };
  const std::size_t metadata = text.find("\"metadata\"");
  if (metadata == std::string_view::npos) return {};
  const std::string name = after("\"name\":\"", metadata);
  const std::string space = after("\"namespace\":\"", metadata);
  return name.empty() || space.empty() ? std::string() : fmt::format("{}/{}", space, name);
}

std::string string_at(const boost::json::object& object, std::initializer_list<std::string_view> path) {
  const boost::json::object* in = &object;
  const boost::json::value* value = nullptr;
  for (const std::string_view key : path) {
    if (in == nullptr) return {};
    value = in->if_contains(key);
    in = value != nullptr ? value->if_object() : nullptr;
  }
  return value != nullptr && value->is_string() ? std::string(value->get_string()) : std::string();
}

std::string percent_encoded(std::string_view text) {
  std::string result;
  for (const char c : text) {
    const bool is_plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' ||
                          c == '.' || c == '_' || c == '~';
    result += is_plain ? std::string(1, c) : fmt::format("%{:02X}", static_cast<unsigned char>(c));
  }
  return result;
}

std::uint64_t number(std::string_view text) {
  std::uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc{} && end == text.data() + text.size() ? value : 0;
}

/// How a list or a watch ended. Empty: as it should.
struct End {
  std::string problem;
  bool is_expired = false;  // 410: list again
  bool is_cut = false;      // a watch that stood: what was on its way comes again
  bool is_refused = false;  // the server has something against this watch, and may have it against the next
  bool is_doubted = false;  // ended from here: what comes may not be all; list again
  [[nodiscard]] bool is_good() const { return problem.empty() && !is_expired && !is_doubted; }
};

class Watcher final : public Client {
 public:
  Watcher(asio::io_context& io, Access access, std::shared_ptr<Plugin> plugin, std::string space, std::string selector,
          const Pace& pace, Store& store, Handlers handlers)
      : io_(io),
        access_(std::move(access)),
        plugin_(std::move(plugin)),
        resolver_(io, access_.host, access_.port),
        space_(std::move(space)),
        selector_text_(std::move(selector)),
        selector_(selector_text_),
        pace_(pace),
        store_(store),
        handlers_(std::move(handlers)) {}

  config::Result<void> prepare() {
    // Only one that is asked for: the library initializes itself with the first.
    if (!access_.is_tls) return {};
    tls_.emplace(ssl::context::tls_client);
    SSL_CTX_set_min_proto_version(tls_->native_handle(), TLS1_2_VERSION);
    tls_->set_verify_mode(ssl::verify_peer);
    error_code error;
    if (access_.ca_source.empty())
      tls_->set_default_verify_paths(error);
    else if (access_.ca.empty())  // no others instead of those that were asked for
      error = make_error_code(boost::system::errc::no_message);
    else
      tls_->add_certificate_authority(asio::buffer(access_.ca), error);
    if (error)
      return config::fail(-EINVAL, fmt::format("{}: expected certificates in PEM form: {}",
                                               config::printable(access_.ca_source), error.message()));
    return use_certificate(access_.certificate, access_.key);
  }

  void start() {
    for (Follower& follower : followers_) {
      asio::co_spawn(io_, follow(follower), [](const std::exception_ptr& bug) {
        if (bug) std::rethrow_exception(bug);
      });
    }
  }

  bool is_current() const override {
    return std::ranges::all_of(followers_, [](const Follower& one) { return one.is_watching; });
  }
  Clock::time_point last_current() const override {
    const auto time = [](const Follower& one) { return one.is_watching ? Clock::now() : one.lost; };
    return std::min(time(followers_[0]), time(followers_[1]));
  }
  std::string problem() const override {
    for (const Follower& one : followers_)
      if (!one.problem.empty()) return one.problem;
    return {};
  }
  Counts counts() const override { return counts_; }

 private:
  struct Follower {
    Follower(asio::io_context& io, Kind which) : kind(which), pause(io), proof(io) {}
    const Kind kind;
    asio::steady_timer pause;
    std::shared_ptr<Connection> connection;
    std::string version;      // to watch from; empty: list first
    std::uint64_t seen = 0;   // the highest version of the server's data
    std::uint64_t issue = 0;  // whose credentials it has sent
    std::size_t failures = 0;
    std::string problem;
    Clock::time_point lost = Clock::now();
    // This watch
    bool is_watching = false;
    bool has_brought_news = false;
    bool has_bookmarks = false;
    bool is_doubted = false;
    Clock::time_point watch_began;
    asio::steady_timer proof;  // that it is one
    // In a row
    int expirations = 0;
    int refusals = 0;
    Clock::time_point next_doubt;  // not before
    bool has_told_of_strangers = false;
  };

  config::Result<void> use_certificate(const std::string& certificate, const std::string& key) {
    if (certificate.empty()) return {};
    error_code error;
    tls_->use_certificate_chain(asio::buffer(certificate), error);
    if (!error) tls_->use_private_key(asio::buffer(key), ssl::context::pem, error);
    if (error)
      return config::fail(-EINVAL, fmt::format("client certificate and key: expected PEM: {}", error.message()));
    return {};
  }

  // One coroutine for each kind: list, watch, and again from where the watch ended.
  awaitable<void> follow(Follower& follower) {
    co_await asio::post(io_, asio::use_awaitable);  // whoever creates this has it before it is told of anything
    std::chrono::milliseconds pause = pace_.first_pause;
    for (;;) {
      End end = co_await session(follower);
      const bool has_watched = std::exchange(follower.is_watching, false);
      follower.proof.cancel();
      // An answer that begins well is no watch yet: it may be cut or end at once, each time.
      const bool has_brought_news = has_watched && follower.has_brought_news;
      const bool is_proven = has_brought_news || (has_watched && Clock::now() - follower.watch_began >= pace_.proof);
      if (is_proven) {
        follower.lost = Clock::now();
        follower.expirations = 0;
        pause = pace_.first_pause;
      }
      if (has_brought_news || (is_proven && end.is_good())) follower.refusals = 0;
      if (end.is_doubted) follower.version.clear();
      if (end.is_doubted || (end.is_good() && is_proven)) continue;
      if (!end.problem.empty()) {
        ++counts_.failures;
        ++follower.failures;
      }
      if (has_watched && !is_proven && (end.is_good() || end.is_cut))
        end = {.problem = "a watch ends as soon as it has begun"};
      if (end.is_expired) {
        follower.version.clear();
        if (++follower.expirations > 1) end.problem = "410: what was listed is forgotten before it is watched";
      }
      // Once is bad luck; a version that the server cannot go on from would be refused for ever.
      if (end.is_refused && ++follower.refusals % 2 == 0) follower.version.clear();
      if (!end.problem.empty() && !(end.is_cut && is_proven)) tell_problem(follower, end.problem);
      follower.pause.expires_after(with_chance(pause));
      co_await follower.pause.async_wait(use_tuple);
      pause = std::min(2 * pause, pace_.max_pause);
    }
  }

  std::chrono::milliseconds with_chance(std::chrono::milliseconds pause) {
    return pause / 2 + std::chrono::milliseconds(std::uniform_int_distribution<long>(0, pause.count() / 2)(random_));
  }

  /// Each problem once, until all is well again.
  void tell_problem(Follower& follower, const std::string& problem) {
    if (follower.problem == problem) return;
    follower.problem = problem;
    handlers_.tell(true, fmt::format("kubernetes: {}: {}: {}", access_.origin, what_of(follower.kind),
                                     config::printable(problem)));
  }

  void begin_watch(Follower& follower) {
    follower.is_watching = true;
    follower.has_bookmarks = false;
    follower.has_brought_news = false;
    follower.watch_began = Clock::now();
    if (follower.problem.empty()) return;
    follower.proof.expires_after(pace_.proof);
    follower.proof.async_wait([this, &follower](const error_code& cancelled) {
      if (!cancelled && follower.is_watching && Clock::now() >= follower.watch_began + pace_.proof)
        all_is_well(follower);
    });
  }

  void all_is_well(Follower& follower) {
    if (follower.problem.empty()) return;
    follower.problem.clear();
    handlers_.tell(false, fmt::format("kubernetes: {}: {}: watched again", access_.origin, what_of(follower.kind)));
  }

  std::string what_of(Kind kind) const {
    return space_.empty() ? names_of(kind).plural : fmt::format("{} of {}", names_of(kind).plural, space_);
  }

  std::string target(Kind kind, const std::string& query, bool is_selecting = true) const {
    const KindNames names = names_of(kind);
    std::string result = access_.path + names.path;
    if (!space_.empty()) result += "/namespaces/" + space_;
    result += fmt::format("/{}?{}", names.plural, query);
    // Slices have the labels of their service only when Kubernetes made them.
    if (kind == Kind::service && is_selecting && !selector_text_.empty())
      result += "&labelSelector=" + percent_encoded(selector_text_);
    return result;
  }

  /// Lists if need be, and watches until something ends that.
  awaitable<End> session(Follower& follower) {
    follower.connection.reset();
    auto header = co_await authorization(follower);
    if (!header) co_return End{.problem = header.error().message};
    if (!follower.version.empty()) {
      End end = co_await check(follower, *header);
      if (!end.is_good()) co_return end;
    }
    if (follower.version.empty()) {
      End end = co_await list(follower, *header);
      if (!end.is_good()) co_return end;
    }
    co_return co_await watch(follower, *header);
  }

  /// The header, with its line end; empty without a token.
  awaitable<config::Result<std::string>> authorization(Follower& follower) {
    std::string token = access_.token;
    if (plugin_) {
      const auto issue = co_await plugin_->credentials();
      if (!issue) co_return std::unexpected(issue.error());
      follower.issue = issue->number;
      if (tls_ && issue->number != used_issue_) {
        if (auto used = use_certificate(issue->credentials.certificate, issue->credentials.key); !used) {
          plugin_->reject(issue->number);
          co_return std::unexpected(used.error());
        }
        used_issue_ = issue->number;
      }
      token = issue->credentials.token;
    } else if (!access_.token_file.empty()) {
      auto text = config::read_file(access_.token_file);
      if (!text) co_return std::unexpected(text.error());
      token = std::move(*text);
      while (token.ends_with('\n') || token.ends_with('\r') || token.ends_with(' ')) token.pop_back();
      if (token.empty() || token.find_first_of("\r\n") != std::string::npos)
        co_return config::fail(-EINVAL, fmt::format("{}: expected a token", config::printable(access_.token_file)));
    }
    co_return token.empty() ? std::string() : fmt::format("Authorization: Bearer {}\r\n", token);
  }

  std::string request(const std::string& target, const std::string& authorization) const {
    const bool is_v6 = access_.host.contains(':');
    return fmt::format(
        "GET {} HTTP/1.1\r\nHost: {}{}{}:{}\r\nAccept: application/json\r\nUser-Agent: clusterip\r\n{}\r\n", target,
        is_v6 ? "[" : "", access_.host, is_v6 ? "]" : "", access_.port, authorization);
  }

  awaitable<std::string> connect(Follower& follower) {
    follower.connection.reset();
    auto addresses = co_await resolver_.resolve(pace_.patience);
    if (!addresses) co_return addresses.error().message;
    handlers_.resolved(*addresses);
    follower.connection = std::make_shared<Connection>(io_, tls_ ? &*tls_ : nullptr);
    // One that is silent, or takes connections and does not answer, must not be the only one that is ever tried.
    const auto first = addresses->begin() + static_cast<std::ptrdiff_t>(follower.failures % addresses->size());
    std::ranges::rotate(*addresses, first);
    if (std::string problem = co_await follower.connection->connect(*addresses, pace_); !problem.empty())
      co_return problem;
    follower.connection->limit(pace_.patience);
    co_return co_await follower.connection->prepare(access_);
  }

  /// Sends a request, and feeds `splitter` with its answer until something is `found` in it, which is how it ends then;
  /// or says what the server has against it.
  awaitable<End> get(Follower& follower, const std::string& verb, const std::string& target,
                     const std::string& authorization, Splitter& splitter, const End& found,
                     const std::function<void()>& granted) {
    if (!follower.connection || !follower.connection->is_reusable()) {
      if (std::string problem = co_await connect(follower); !problem.empty())
        co_return End{.problem = std::move(problem)};
    }
    Connection& connection = *follower.connection;
    connection.limit(pace_.patience);
    if (std::string problem = co_await connection.write(request(target, authorization)); !problem.empty())
      co_return End{.problem = std::move(problem)};
    std::string error_text;
    Answer answer(
        [&](unsigned status) {
          if (status == 200) granted();
        },
        [&](unsigned status, std::string_view text) {
          if (status == 200) return splitter.feed(text) && found.is_good();
          error_text.append(text.substr(0, max_error_text - std::min(error_text.size(), max_error_text)));
          return true;
        });
    std::string problem = co_await connection.read(answer, counts_.bytes);
    if (!found.is_good()) {
      follower.connection.reset();  // more of it may be on the way
      co_return found;
    }
    if (!answer.is_header_done()) co_return End{.problem = problem.empty() ? "no answer" : std::move(problem)};
    if (answer.status() == 200) co_return End{.problem = std::move(problem), .is_cut = true};
    co_return refusal(follower, verb, answer.status(), error_text);
  }

  End refusal(const Follower& follower, const std::string& verb, unsigned status, const std::string& text) {
    error_code error;
    const auto value = boost::json::parse(text, error);
    const std::string said = !error && value.is_object() ? string_at(value.get_object(), {"message"}) : std::string();
    const std::string why = said.empty() ? std::string() : fmt::format(" ({})", said);
    const KindNames names = names_of(follower.kind);
    if (status == 410) return {.problem = {}, .is_expired = true};
    if (status == 401) {
      if (plugin_) plugin_->reject(follower.issue);
      return {.problem = fmt::format("401: it does not accept the credentials{}: {}", why, credentials_source())};
    }
    if (status == 403)
      return {.problem = fmt::format("403: missing permission: verb {} on {} of the API group \"{}\" in {}{}", verb,
                                     names.plural, names.group,
                                     space_.empty() ? "all namespaces" : fmt::format("the namespace {}", space_), why)};
    // Too many requests, and being unavailable, say nothing about this one.
    return {.problem = fmt::format("{}: it does not answer with {}{}", status, names.plural, why),
            .is_refused = status != 429 && status != 503};
  }

  std::string credentials_source() const {
    if (access_.exec) return fmt::format("those that {} prints", config::printable(access_.exec->command.front()));
    if (!access_.token_file.empty())
      return fmt::format("the token in {} has expired, or is another cluster's", config::printable(access_.token_file));
    if (!access_.token.empty()) return "the token of the kubeconfig";
    return access_.certificate.empty() ? "there are none" : "the client certificate of the kubeconfig";
  }

  struct Envelope {
    std::string next;  // where the list goes on; empty: it ends
    std::string version;
  };

  static std::optional<Envelope> read_envelope(const Splitter& splitter) {
    error_code error;
    const auto envelope = boost::json::parse(splitter.envelope(), error);
    if (error || !envelope.is_object()) return {};
    return Envelope{.next = string_at(envelope.get_object(), {"metadata", "continue"}),
                    .version = string_at(envelope.get_object(), {"metadata", "resourceVersion"})};
  }

  /// Before a watch goes on: a server whose data was restored would be silent until its versions have come to where
  /// they were, and never tell what is different. One object is enough to know the version of all.
  awaitable<End> check(Follower& follower, const std::string& authorization) {
    Splitter splitter(Splitter::Form::items, [](std::string_view, bool) {});
    const std::string what = target(follower.kind, "limit=1", false);
    const End none;
    End end = co_await get(follower, "list", what, authorization, splitter, none, [] {});
    end.is_cut = false;
    if (!end.is_good()) co_return end;
    const auto envelope = read_envelope(splitter);
    if (!envelope) co_return End{.problem = "what it sends is no list"};
    const std::uint64_t version = number(envelope->version);
    if (version != 0 && version < number(follower.version)) follower.version.clear();
    co_return End{};
  }

  awaitable<End> list(Follower& follower, const std::string& authorization) {
    const Kind kind = follower.kind;
    store_.begin_list(kind);
    const std::size_t max_pages = 16 + 2 * pace_.max_objects / pace_.page;
    std::size_t pages = 0;
    std::size_t objects = 0;
    std::unordered_set<std::size_t> seen;  // hashes
    Envelope envelope;
    End found;
    const auto endless = [](std::string how) { return End{.problem = "the list does not end: " + std::move(how)}; };
    do {
      Splitter splitter(Splitter::Form::items, [&](std::string_view text, bool is_whole) {
        if (++objects > pace_.max_objects) found = endless(fmt::format("more than {} objects", pace_.max_objects));
        if (!found.is_good()) return;
        const auto object = parse(text, is_whole, kind);
        if (object && is_asked_for(follower, *object)) store_.list(kind, *object);
      });
      std::string query = fmt::format("limit={}", pace_.page);
      if (!envelope.next.empty()) query += "&continue=" + percent_encoded(envelope.next);
      End end = co_await get(follower, "list", target(kind, query), authorization, splitter, found, [] {});
      end.is_cut = false;
      if (found.is_good() && !end.is_good()) co_return end;
      if (found.is_good()) {
        auto read = read_envelope(splitter);
        if (!read) co_return End{.problem = "what it sends is no list"};
        envelope = std::move(*read);
        if (!envelope.next.empty() && !seen.insert(std::hash<std::string>()(envelope.next)).second)
          found = endless("it names the same page twice");
        else if (++pages >= max_pages && !envelope.next.empty())
          found = endless(fmt::format("more than {} pages", max_pages));
      }
      if (!found.is_good()) {
        store_.give_up_list(kind);
        co_return found;
      }
    } while (!envelope.next.empty());
    if (envelope.version.empty()) co_return End{.problem = "the list has no resourceVersion"};
    const std::uint64_t version = number(envelope.version);
    store_.end_list(kind, version);
    if (version != 0 && version < follower.seen)
      handlers_.tell(true,
                     fmt::format("kubernetes: {}: {}: its data is older than before (version {} after {}): it was "
                                 "restored, and is taken as it is now",
                                 access_.origin, what_of(kind), version, follower.seen));
    follower.seen = version;
    follower.version = std::move(envelope.version);
    ++counts_.lists;
    handlers_.changed();
    co_return End{};
  }

  awaitable<End> watch(Follower& follower, const std::string& authorization) {
    const Kind kind = follower.kind;
    const auto time = pace_.watch_time +
                      std::chrono::seconds(std::uniform_int_distribution<long>(0, pace_.watch_time.count())(random_));
    follower.is_doubted = false;
    End found;
    Splitter splitter(Splitter::Form::values, [&](std::string_view text, bool is_whole) {
      if (found.is_good()) take_event(follower, text, is_whole, found);
    });
    const std::string query = fmt::format("watch=1&allowWatchBookmarks=true&resourceVersion={}&timeoutSeconds={}",
                                          percent_encoded(follower.version), time.count());
    End end = co_await get(follower, "watch", target(kind, query), authorization, splitter, found, [&] {
      begin_watch(follower);
      follower.connection->limit(time + watch_grace);
    });
    if (!end.is_expired && follower.is_doubted) co_return End{.problem = {}, .is_doubted = true};
    // Its time is over, or the connection was cut: either way it goes on from the version that came last.
    co_return end;
  }

  void take_event(Follower& follower, std::string_view text, bool is_whole, End& found) {
    ++counts_.events;
    const auto event = parse(text, is_whole, follower.kind);
    if (!event) return handlers_.changed();
    const std::string type = string_at(*event, {"type"});
    const auto* object_value = event->if_contains("object");
    const auto* object = object_value != nullptr ? object_value->if_object() : nullptr;
    if (string_at(*event, {"kind"}) == "Status") object = &*event;
    if (object == nullptr) {
      found = {.problem = "an event without an object", .is_refused = true};
      return;
    }
    if (type == "ERROR" || object == &*event) {
      const auto* code = object->if_contains("code");
      if (code != nullptr && code->is_int64() && code->get_int64() == 410)
        found.is_expired = true;
      else
        found = {.problem = fmt::format("the watch failed: {}", string_at(*object, {"message"})), .is_refused = true};
      return;
    }
    const bool is_bookmark = type == "BOOKMARK";
    if (!is_bookmark && type != "ADDED" && type != "MODIFIED" && type != "DELETED") {
      found = {.problem = fmt::format("an event of the unknown type {}", config::quoted(type)), .is_refused = true};
      return;
    }
    const std::string version_text = string_at(*object, {"metadata", "resourceVersion"});
    const std::uint64_t version = number(version_text);
    if (version != 0 && version < number(follower.version)) doubt(follower, found);
    const std::size_t count = follower.kind == Kind::service ? store_.services() : store_.slices();
    if (!is_bookmark && type != "DELETED" && count > pace_.max_objects) {
      found = {.problem = fmt::format("more than {} objects", pace_.max_objects), .is_refused = true};
      return;
    }
    if (is_bookmark) {
      store_.bookmark(follower.kind, version);
      if (!std::exchange(follower.has_bookmarks, true)) follower.connection->limit_silence(pace_.max_silence);
    } else if (type == "DELETED" || is_asked_for(follower, *object))
      store_.apply(follower.kind,
                   type == "ADDED"      ? Event::added
                   : type == "MODIFIED" ? Event::modified
                                        : Event::deleted,
                   *object);
    // An old event that comes late must not lead back.
    if (!version_text.empty() && (version == 0 || version > number(follower.version))) {
      follower.version = version_text;
      follower.seen = std::max(follower.seen, version);
      follower.has_brought_news = true;
      all_is_well(follower);
    }
    if (!is_bookmark) handlers_.changed();
  }

  /// What comes is older than what has come, as an API server never sends it: something between here and there is out
  /// of order, or the server's data was restored. A list tells; but not all the time.
  void doubt(Follower& follower, End& found) {
    const auto now = Clock::now();
    if (now >= follower.next_doubt) {
      follower.next_doubt = now + pace_.max_pause;
      found.is_doubted = true;
    } else if (!std::exchange(follower.is_doubted, true)) {
      follower.connection->limit(follower.next_doubt - now);
    }
  }

  /// A server may answer with more than it was asked for: that is nobody's business here. The first such object is
  /// told.
  bool is_asked_for(Follower& follower, const boost::json::object& object) {
    const std::string space = string_at(object, {"metadata", "namespace"});
    const bool is_elsewhere = !space_.empty() && space != space_;
    const auto has_labels = [&] {
      const auto* metadata = object.if_contains("metadata");
      const auto* labels =
          metadata != nullptr && metadata->is_object() ? metadata->get_object().if_contains("labels") : nullptr;
      return selector_.matches(labels != nullptr && labels->is_object() ? labels->get_object() : boost::json::object());
    };
    if (!is_elsewhere && (follower.kind == Kind::slice || has_labels())) return true;
    const std::string name = fmt::format("{}/{}", space, string_at(object, {"metadata", "name"}));
    if (!std::exchange(follower.has_told_of_strangers, true))
      handlers_.tell(true,
                     fmt::format("kubernetes: {}: {} {}: expected {}, as was asked for: this and its like is ignored",
                                 access_.origin, follower.kind == Kind::service ? "service" : "endpointslice",
                                 config::printable(name),
                                 is_elsewhere ? fmt::format("one of the namespace {}", space_)
                                              : fmt::format("the labels {}", config::printable(selector_text_))));
    // One that had the labels before would be left as it was then.
    if (!is_elsewhere) store_.drop(follower.kind, name);
    return false;
  }

  /// Empty: it cannot be read. Then it is as if it were not there, and the log says so.
  std::optional<boost::json::object> parse(std::string_view text, bool is_whole, Kind kind) {
    error_code error;
    boost::json::parse_options options;
    options.allow_invalid_utf8 = true;  // in an annotation; names are looked at closely
    options.max_depth = 100;
    if (is_whole) {
      auto value = boost::json::parse(text, error, {}, options);
      if (!error && value.is_object()) return std::move(value.get_object());
    }
    const std::string name = name_in(text.substr(0, Splitter::beginning));
    const std::string called = name.empty() ? fmt::format("that begins {}", config::quoted(text.substr(0, 200), 200))
                                            : config::printable(name);
    handlers_.tell(
        true, fmt::format("kubernetes: {} {}: {}: skipped", kind == Kind::service ? "service" : "endpointslice", called,
                          is_whole ? fmt::format("expected JSON: {}", error.message())
                                   : fmt::format("expected at most {} MiB", Splitter::max_object / 1048576)));
    if (!name.empty()) store_.drop(kind, name);
    return {};
  }

  asio::io_context& io_;
  const Access access_;
  const std::shared_ptr<Plugin> plugin_;
  Resolver resolver_;
  const std::string space_;
  const std::string selector_text_;
  const Selector selector_;
  const Pace pace_;
  Store& store_;
  const Handlers handlers_;
  std::optional<ssl::context> tls_;
  std::uint64_t used_issue_ = 0;  // of the plugin, whose certificate is used
  Counts counts_;
  std::minstd_rand random_{std::random_device{}()};
  std::array<Follower, 2> followers_{{{io_, Kind::service}, {io_, Kind::slice}}};
};

}  // namespace

config::Result<std::unique_ptr<Client>> Client::create(boost::asio::io_context& io, Access access,
                                                       std::shared_ptr<Plugin> plugin, const std::string& space,
                                                       const std::string& selector, const Pace& pace, Store& store,
                                                       Handlers handlers) {
  auto watcher = std::make_unique<Watcher>(io, std::move(access), std::move(plugin), space, selector, pace, store,
                                           std::move(handlers));
  if (auto prepared = watcher->prepare(); !prepared) return std::unexpected(prepared.error());
  watcher->start();
  return watcher;
}

}  // namespace kubernetes
