// SPDX-License-Identifier: BSD-2-Clause
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <string_view>

namespace kubernetes {

/// Cuts JSON text into objects as it arrives, and holds no more than one of them. It knows strings and brackets only:
/// whether an object is valid, its parser tells.
class Splitter {
 public:
  enum class Form {
    values,  // a watch: one object behind the other
    items,   // a list: the elements of "items"; the rest is the envelope
  };
  static constexpr std::size_t max_object = std::size_t{8} * 1024 * 1024;  // etcd takes 1.5 MiB
  static constexpr std::size_t max_envelope = std::size_t{64} * 1024;
  static constexpr std::size_t beginning = 4096;  // of an object that is too large

  /// `visit` gets each object; of one that is too large its beginning, and false.
  Splitter(Form form, std::function<void(std::string_view object, bool is_whole)> visit)
      : form_(form), visit_(std::move(visit)) {}

  /// False: this is no text of that form. Nothing more may be fed then.
  bool feed(std::string_view text);

  /// The list without its items, once all of it has come.
  [[nodiscard]] const std::string& envelope() const { return envelope_; }
  /// No object has begun that has not ended.
  [[nodiscard]] bool is_between() const { return depth_ == 0; }

 private:
  bool take(char c);
  void keep(std::string_view text);
  void end_object();

  const Form form_;
  const std::function<void(std::string_view, bool)> visit_;
  std::string object_;
  std::string envelope_;
  std::string key_;  // the last string of the envelope's first level
  int depth_ = 0;
  bool is_in_object_ = false;
  bool is_in_items_ = false;
  bool is_in_string_ = false;
  bool is_escaped_ = false;
  bool is_too_large_ = false;
};

}  // namespace kubernetes
