// SPDX-License-Identifier: BSD-2-Clause
//
// TOML -> model. One list of fields per table says which keys there are and how each is read.
#include "config/read_config.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <concepts>
#include <limits>
#include <optional>
#include <span>
#include <utility>

#include "config/did_you_mean.h"
#include "config/mistakes.h"
#include "config/names.h"
#include "config/nesting.h"
#include "config/printable.h"
#include "config/read_full_config.h"
#include "config/unsupported.h"
#include "config/validate.h"
#include "config/values.h"

// The parser asserts, or even lets the optimizer assume, what does not hold for every text ("a = [}"), before it
// reports the mistake. Without assertions it only reports it.
#pragma push_macro("NDEBUG")
#undef NDEBUG
#define TOML_ASSERT(expr) static_assert(true)
#include <toml++/toml.h>
#pragma pop_macro("NDEBUG")

namespace config {
namespace {

using namespace std::chrono_literals;
using std::chrono::milliseconds;

constexpr std::uint32_t max_limit = 4'194'304;  // for each of [limits]: 2^22 services take 768 MiB of records
constexpr std::size_t max_path = 4095;          // PATH_MAX without the NUL
constexpr std::size_t max_socket_path = 107;    // sockaddr_un::sun_path without the NUL

Position position_of(const toml::source_region& source) { return {source.begin.line, source.begin.column}; }

/// Where a value stands in the tree of tables. Its text is only made when there is a mistake to report.
struct Path {
  const Path* parent = nullptr;
  std::string_view key;              // empty: an element of an array
  std::size_t index = 0;             // of an element
  const Service* service = nullptr;  // an element of [[service]]

  [[nodiscard]] bool is_root() const { return !parent && key.empty() && !service; }

  [[nodiscard]] std::string text() const {
    if (service) return service_label(*service, index);
    if (key.empty()) return fmt::format("{}[{}]", parent->text(), index);
    if (!parent) return std::string(key);
    return fmt::format("{}{}{}", parent->text(), parent->service ? ": " : ".", key);
  }
};

/// What a field is read from. `node` is null for a key that is required and missing; then the position is its table's.
struct Value {
  toml::node* node;
  Position position;
  const Path& path;
};

std::string shown(const toml::node* node) {
  if (!node) return "nothing";
  if (const auto* text = node->as_string()) return quoted(text->get());
  if (const auto* number = node->as_integer()) return fmt::format("{}", number->get());
  if (const auto* number = node->as_floating_point()) return fmt::format("the float {}", number->get());
  if (const auto* flag = node->as_boolean()) return flag->get() ? "true" : "false";
  if (node->is_array()) return "an array";
  return node->is_table() ? "a table" : "a date or time";
}

/// Shown as TOML would need it to be written.
std::string shown_key(std::string_view key) {
  const auto is_bare = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '-';
  };
  const bool bare = !key.empty() && key.size() <= 60 && std::ranges::all_of(key, is_bare);
  return bare ? std::string(key) : quoted(key);
}

std::string joined(std::span<const std::string_view> words) {
  std::string result;
  for (std::size_t i = 0; i < words.size(); ++i)
    result += fmt::format("{}{}", i == 0 ? "" : i + 1 == words.size() ? " or " : ", ", words[i]);
  return result;
}

Parsed<std::string> parse_cgroup(std::string_view text) {
  if (text == "auto") return std::string();
  auto path = parse_path(text, max_path);
  if (!path) return std::unexpected("auto or " + path.error());
  return path;
}

// The parser's words are "Error while parsing string: encountered end-of-file", and may repeat a key of any length.
std::string syntax_error(std::string_view description) {
  constexpr std::string_view prefix = "Error while parsing ";
  constexpr std::size_t max_length = 300;
  const bool in = description.starts_with(prefix);
  if (in) description.remove_prefix(prefix.size());
  return fmt::format("syntax error{}{}", in ? " in " : ": ", printable(description.substr(0, max_length)));
}

class Reader;

template <class T>
struct Field {
  std::string_view key;
  void (*read)(Reader&, const Value&, T&);
  bool required = false;
};

class Reader {
 public:
  explicit Reader(bool refuse_unsupported) : refuse_unsupported_(refuse_unsupported) {}

  std::expected<Config, std::vector<Mistake>> read(std::string_view text);

  void mistake(const Value& value, std::string_view expected) {
    mistakes_.add(value.position, value.path.text(), fmt::format("expected {}, got {}", expected, shown(value.node)));
  }

  /// A string that one of the functions of values.h parses.
  template <class T, class Parse>
  bool parsed(const Value& value, Parse parse, T& out) {
    const auto* text = value.node ? value.node->as_string() : nullptr;
    auto result = parse(text ? std::string_view(text->get()) : std::string_view());
    if (!text || !result) {
      mistake(value, result.error());
      return false;
    }
    out = std::move(*result);
    return true;
  }

  void duration(const Value& value, milliseconds min, milliseconds& out) {
    if (parsed(value, parse_duration, out) && out < min) mistake(value, "a duration above zero");
  }

  void path(const Value& value, std::size_t max_length, std::string& out) {
    parsed(value, [&](std::string_view text) { return parse_path(text, max_length); }, out);
  }

  void flag(const Value& value, bool& out) {
    if (const auto* flag = value.node->as_boolean())
      out = flag->get();
    else
      mistake(value, "true or false");
  }

  template <std::unsigned_integral T>
  void integer(const Value& value, T min, T max, T& out) {
    const auto* number = value.node ? value.node->as_integer() : nullptr;
    if (number && std::cmp_greater_equal(number->get(), min) && std::cmp_less_equal(number->get(), max))
      out = static_cast<T>(number->get());
    else
      mistake(value, integer_range(min, max));
  }

  template <class Enum, std::size_t count>
  void one_of(const Value& value, const Name<Enum> (&names)[count], Enum& out) {
    const auto* text = value.node->as_string();
    std::array<std::string_view, count> words;
    for (std::size_t i = 0; i < count; ++i) {
      if (text && text->get() == names[i].text) {
        out = names[i].value;
        return;
      }
      words[i] = names[i].text;
    }
    mistakes_.add(value.position, value.path.text(),
                  fmt::format("expected {}, got {}{}", joined(words), shown(value.node),
                              text ? did_you_mean(text->get(), words) : ""));
  }

  /// An address of one end of a connection; `fault` says what else is wrong with it.
  void unicast(const Value& value, std::string (*fault)(const Address&), Address& out) {
    Address address;
    if (!parsed(value, parse_address, address)) return;
    if (const std::string expected = fault(address); expected.empty())
      out = address;
    else
      mistake(value, expected);
  }

  void backend_text(const Value& value, Backend& out) {
    Endpoint endpoint;
    if (!parsed(value, parse_endpoint, endpoint)) return;
    out.address = endpoint.address;
    out.port = endpoint.port;
    if (const std::string expected = unicast_fault(endpoint.address); !expected.empty()) mistake(value, expected);
  }

  void networks(const Value& value, std::vector<std::string>& out) {
    elements(value, "an array of networks",
             [&](const Value& element) { parsed(element, parse_network, out.emplace_back()); });
  }

  void backends(const Value& value, std::vector<Backend>& out);
  void services(const Value& value, Config& out);

  template <class T>
  void table(const Value& value, std::span<const Field<T>> fields, T& out);

 private:
  template <class Function>
  void elements(const Value& value, std::string_view expected, Function function) {
    toml::array* array = value.node ? value.node->as_array() : nullptr;
    if (!array) return mistake(value, expected);
    for (std::size_t i = 0; i < array->size(); ++i) {
      toml::node& node = (*array)[i];
      function(Value{&node, position_of(node.source()), Path{&value.path, {}, i}});
    }
  }

  const bool refuse_unsupported_;
  Mistakes mistakes_;
  std::vector<ServicePositions> service_positions_;
};

constexpr Field<Engine> engine_fields[] = {
    {"mode", [](Reader& r, const Value& v, Engine& e) { r.one_of(v, engine_names, e.mode); }},
    {"cgroup", [](Reader& r, const Value& v, Engine& e) { r.parsed(v, parse_cgroup, e.cgroup); }},
    {"pin", [](Reader& r, const Value& v, Engine& e) { r.path(v, max_path, e.pin); }},
    {"on_exit", [](Reader& r, const Value& v, Engine& e) { r.one_of(v, on_exit_names, e.on_exit); }},
    {"peer_names", [](Reader& r, const Value& v, Engine& e) { r.flag(v, e.peer_names); }},
    {"watch", [](Reader& r, const Value& v, Engine& e) { r.flag(v, e.watch); }},
    {"control", [](Reader& r, const Value& v, Engine& e) { r.path(v, max_socket_path, e.control); }},
};

constexpr Field<Limits> limits_fields[] = {
    {"services", [](Reader& r, const Value& v, Limits& l) { r.integer(v, 1u, max_limit, l.services); }},
    {"backends", [](Reader& r, const Value& v, Limits& l) { r.integer(v, 1u, max_limit, l.backends); }},
    {"flows", [](Reader& r, const Value& v, Limits& l) { r.integer(v, 1u, max_limit, l.flows); }},
};

constexpr Field<Userspace> userspace_fields[] = {
    {"threads", [](Reader& r, const Value& v, Userspace& u) { r.integer(v, 0u, 1024u, u.threads); }},
    {"connect_timeout", [](Reader& r, const Value& v, Userspace& u) { r.duration(v, 1ms, u.connect_timeout); }},
    {"idle_timeout", [](Reader& r, const Value& v, Userspace& u) { r.duration(v, 0ms, u.idle_timeout); }},
    {"drain_timeout", [](Reader& r, const Value& v, Userspace& u) { r.duration(v, 0ms, u.drain_timeout); }},
    {"udp_timeout", [](Reader& r, const Value& v, Userspace& u) { r.duration(v, 1ms, u.udp_timeout); }},
    {"local_vips", [](Reader& r, const Value& v, Userspace& u) { r.flag(v, u.local_vips); }},
    {"allow_from", [](Reader& r, const Value& v, Userspace& u) { r.networks(v, u.allow_from); }},
};

constexpr Field<Metrics> metrics_fields[] = {
    {"listen",
     [](Reader& r, const Value& v, Metrics& m) {
       Endpoint endpoint;
       r.parsed(v, parse_endpoint, endpoint);
       m.listen = to_text(endpoint.address, endpoint.port);
     }},
};

constexpr Field<Health> health_fields[] = {
    {"interval", [](Reader& r, const Value& v, Health& h) { r.duration(v, 1ms, h.interval); }},
    {"timeout", [](Reader& r, const Value& v, Health& h) { r.duration(v, 1ms, h.timeout); }},
    {"rise", [](Reader& r, const Value& v, Health& h) { r.integer(v, 1u, 1000u, h.rise); }},
    {"fall", [](Reader& r, const Value& v, Health& h) { r.integer(v, 1u, 1000u, h.fall); }},
};

constexpr Field<Eject> eject_fields[] = {
    {"failures", [](Reader& r, const Value& v, Eject& e) { r.integer(v, 1u, 1000u, e.failures); }},
    {"time", [](Reader& r, const Value& v, Eject& e) { r.duration(v, 1ms, e.time); }},
};

constexpr std::uint16_t max_port = 65535;

constexpr Field<Backend> backend_fields[] = {
    {"address", [](Reader& r, const Value& v, Backend& b) { r.unicast(v, unicast_fault, b.address); }, true},
    {"port", [](Reader& r, const Value& v, Backend& b) { r.integer(v, std::uint16_t{1}, max_port, b.port); }, true},
    {"weight", [](Reader& r, const Value& v, Backend& b) { r.integer(v, 1u, max_weight, b.weight); }},
    {"state", [](Reader& r, const Value& v, Backend& b) { r.one_of(v, state_names, b.state); }},
};

// `name` comes first: messages about the other keys call the service by it.
constexpr Field<Service> service_fields[] = {
    {"name", [](Reader& r, const Value& v, Service& s) { r.parsed(v, parse_name, s.name); }, true},
    {"vip", [](Reader& r, const Value& v, Service& s) { r.unicast(v, vip_fault, s.vip); }, true},
    {"port", [](Reader& r, const Value& v, Service& s) { r.integer(v, std::uint16_t{1}, max_port, s.port); }, true},
    {"protocol", [](Reader& r, const Value& v, Service& s) { r.one_of(v, protocol_names, s.protocol); }},
    {"policy", [](Reader& r, const Value& v, Service& s) { r.one_of(v, policy_names, s.policy); }},
    {"affinity", [](Reader& r, const Value& v, Service& s) { r.duration(v, 1ms, s.affinity.emplace()); }},
    {"client", [](Reader& r, const Value& v, Service& s) { r.one_of(v, client_names, s.client); }},
    {"panic", [](Reader& r, const Value& v, Service& s) { r.flag(v, s.panic); }},
    {"mark", [](Reader& r, const Value& v,
                Service& s) { r.integer(v, 0u, std::numeric_limits<std::uint32_t>::max(), s.mark); }},
    {"proxy_protocol",
     [](Reader& r, const Value& v, Service& s) { r.one_of(v, proxy_protocol_names, s.proxy_protocol); }},
    {"no_backend", [](Reader& r, const Value& v, Service& s) { r.one_of(v, no_backend_names, s.no_backend); }},
    {"engine", [](Reader& r, const Value& v, Service& s) { r.one_of(v, engine_names, s.engine); }},
    {"health", [](Reader& r, const Value& v, Service& s) { r.table<Health>(v, health_fields, s.health.emplace()); }},
    {"eject", [](Reader& r, const Value& v, Service& s) { r.table<Eject>(v, eject_fields, s.eject.emplace()); }},
    {"on_remove", [](Reader& r, const Value& v, Service& s) { r.one_of(v, on_remove_names, s.on_remove); }},
    {"backends", [](Reader& r, const Value& v, Service& s) { r.backends(v, s.backends); }, true},
};

constexpr Field<Config> config_fields[] = {
    {"engine", [](Reader& r, const Value& v, Config& c) { r.table<Engine>(v, engine_fields, c.engine); }},
    {"limits", [](Reader& r, const Value& v, Config& c) { r.table<Limits>(v, limits_fields, c.limits); }},
    {"userspace", [](Reader& r, const Value& v, Config& c) { r.table<Userspace>(v, userspace_fields, c.userspace); }},
    {"metrics", [](Reader& r, const Value& v, Config& c) { r.table<Metrics>(v, metrics_fields, c.metrics); }},
    {"service", [](Reader& r, const Value& v, Config& c) { r.services(v, c); }},
};

template <class T>
void Reader::table(const Value& value, std::span<const Field<T>> fields, T& out) {
  toml::table* table = value.node->as_table();
  if (!table) return mistake(value, "a table");
  const Path* parent = value.path.is_root() ? nullptr : &value.path;

  std::size_t known = 0;
  for (const auto& field : fields) {
    const Path path{parent, field.key};
    const auto found = table->find(field.key);
    if (found == table->end()) {
      if (field.required) field.read(*this, {nullptr, value.position, path}, out);
      continue;
    }
    ++known;
    const std::size_t before = mistakes_.count();
    field.read(*this, {&found->second, position_of(found->second.source()), path}, out);
    if constexpr (requires { is_unsupported(out, field.key); }) {
      if (refuse_unsupported_ && mistakes_.count() == before && is_unsupported(out, field.key))
        mistakes_.add(position_of(found->first.source()), path.text(), "not supported by this version");
    }
  }
  if (known == table->size()) return;

  std::vector<std::string_view> words;
  for (const auto& field : fields) words.push_back(field.key);
  for (const auto& [key, node] : *table) {
    if (std::ranges::find(words, key.str()) != words.end()) continue;
    const std::string name = shown_key(key.str());
    std::string hint = did_you_mean(key.str(), words);
    if (hint.empty()) hint = fmt::format(", expected {}", joined(words));
    mistakes_.add(position_of(key.source()), Path{parent, name}.text(), "unknown key" + hint);
  }
}

void Reader::backends(const Value& value, std::vector<Backend>& out) {
  const std::string_view expected = "an array of backends";
  if (const auto* array = value.node ? value.node->as_array() : nullptr) out.reserve(array->size());
  elements(value, expected, [&](const Value& element) {
    // What cannot be read stays in the list, so that the others keep their index in messages.
    Backend& backend = out.emplace_back();
    backend.position = element.position;
    if (element.node->is_string())
      backend_text(element, backend);
    else if (element.node->is_table())
      table<Backend>(element, backend_fields, backend);
    else
      mistake(element, "\"address:port\" or a table with address and port");
  });
}

void Reader::services(const Value& value, Config& out) {
  if (const auto* array = value.node->as_array()) {
    out.services.reserve(array->size());
    service_positions_.reserve(array->size());
  }
  elements(value, "tables [[service]]", [&](const Value& element) {
    Service& service = out.services.emplace_back();
    service.position = element.position;
    ServicePositions& positions = service_positions_.emplace_back(element.position, element.position);
    toml::table* table = element.node->as_table();
    if (!table) return mistake(element, "a table [[service]]");
    if (const auto* name = table->get("name")) positions.name = position_of(name->source());
    if (const auto* vip = table->get("vip")) positions.vip = position_of(vip->source());
    this->table<Service>({element.node, element.position, Path{nullptr, {}, element.path.index, &service}},
                         service_fields, service);
    table->clear();  // the parser's tree is several times as large as the model: give it back while that grows
  });
}

std::expected<Config, std::vector<Mistake>> Reader::read(std::string_view text) {
  const auto refused = [](Position position, std::string message) {
    return std::unexpected(std::vector{Mistake{position, std::move(message)}});
  };
  if (text.size() > max_text_size)
    return refused({1, 1}, fmt::format("expected at most {} bytes, got {}", max_text_size, text.size()));
  if (const auto deep = find_deep_nesting(text))
    return refused(*deep, fmt::format("syntax error: expected at most {} levels of nesting, got more", max_nesting));

  toml::parse_result parsed = toml::parse(text);
  if (!parsed) return refused(position_of(parsed.error().source()), syntax_error(parsed.error().description()));
  // An empty file is what a crash leaves of one, rather than what somebody wrote.
  if (parsed.table().empty()) return refused({1, 1}, "expected a table such as [[service]], got an empty text");

  Config config;
  table<Config>({&parsed.table(), {1, 1}, Path{}}, config_fields, config);
  parsed = toml::parse_result{};
  validate(config, service_positions_, mistakes_);
  if (mistakes_.count() != 0) return std::unexpected(mistakes_.take());
  return config;
}

}  // namespace

std::expected<Config, std::vector<Mistake>> read_config(std::string_view text) { return Reader(true).read(text); }

std::expected<Config, std::vector<Mistake>> read_full_config(std::string_view text) { return Reader(false).read(text); }

}  // namespace config
