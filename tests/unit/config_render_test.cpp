// SPDX-License-Identifier: BSD-2-Clause
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <sstream>
#include <string>
#include <vector>

#include "config/read_config.h"

namespace config {
namespace {

std::string rendered(std::string_view text, std::uint32_t line, std::uint32_t column) {
  return render({{line, column}, "key: expected this, got that"}, text, "f.toml");
}

TEST(Render, ShowsTheLineAndACaretUnderTheColumn) {
  EXPECT_EQ(rendered("first\nport = 0\nlast\n", 2, 8),
            "f.toml:2:8: key: expected this, got that\n"
            "port = 0\n"
            "       ^");
}

TEST(Render, ShowsTheMessageOfARealMistake) {
  const std::string text = "[engine]\nmode = \"bfp\"\n";
  EXPECT_EQ(render(read_config(text).error().at(0), text, "clusterip.toml"),
            "clusterip.toml:2:8: engine.mode: expected auto, bpf or userspace, got \"bfp\", did you mean \"bpf\"?\n"
            "mode = \"bfp\"\n"
            "       ^");
}

TEST(Render, KeepsTabsSoThatTheCaretAligns) {
  EXPECT_EQ(rendered("\tport\t= 0", 1, 9),
            "f.toml:1:9: key: expected this, got that\n"
            "\tport\t= 0\n"
            "\t    \t  ^");
}

TEST(Render, CountsCharactersNotBytes) {
  const std::string text = "# \xc3\xa4\xe2\x82\xac\n\"\xc3\xb6\xf0\x9f\x98\x80\" = 1 # \xc3\xa4";
  EXPECT_EQ(rendered(text, 2, 8),
            "f.toml:2:8: key: expected this, got that\n"
            "\"\xc3\xb6\xf0\x9f\x98\x80\" = 1 # \xc3\xa4\n"
            "       ^");
}

TEST(Render, PointsAtTheParsersColumnBehindUtf8) {
  const std::string text = "\xef\xbb\xbf\"\xc3\xb6\" = { \xc3\xa4 }";
  const std::string shown = render(read_config(text).error().at(0), text, "f");
  EXPECT_THAT(shown, testing::EndsWith("\n\"\xc3\xb6\" = { \xc3\xa4 }\n        ^"));
}

TEST(Render, ReplacesWhatATerminalMustNotSee) {
  const std::string text = "a\x1b[31m\x07\x7f\xff\xe2\x80\xae\xc2\x9b = 1\r\nb";
  EXPECT_EQ(rendered(text, 1, 13),
            "f.toml:1:13: key: expected this, got that\n"
            "a?[31m????? = 1\n"
            "            ^");
  EXPECT_EQ(render({{0, 0}, "m"}, "", "a\x1b"), "a?: m");
}

TEST(Render, CutsLongLinesAroundTheColumn) {
  const std::string line = std::string(500, 'a') + "X" + std::string(500, 'b');
  for (const std::uint32_t column : {1u, 60u, 501u, 990u, 1001u, 1002u}) {
    std::istringstream shown(rendered("\n" + line + "\n", 2, column));
    std::string head, source, caret;
    std::getline(shown, head);
    std::getline(shown, source);
    std::getline(shown, caret);
    ASSERT_LE(source.size(), 120u) << column;
    ASSERT_EQ(caret.find('^') + 1, caret.size());
    ASSERT_LE(caret.size(), 120u);
    if (column > line.size()) continue;
    EXPECT_EQ(source.at(caret.size() - 1), line.at(column - 1)) << column;
    if (column > 1 && column < 1001) {
      EXPECT_EQ(source.at(caret.size()), line.at(column)) << column;
    }
  }
  EXPECT_THAT(rendered(line, 1, 501), testing::HasSubstr("\n...aaa"));
  EXPECT_THAT(rendered(line, 1, 501), testing::HasSubstr("bbb...\n"));
}

TEST(Render, CutsAHugeLineAroundTheColumn) {
  constexpr std::size_t half = 2'000'000;
  for (const std::string character : {"a", "\xc3\xa4", "\xf0\x9f\x98\x80"}) {
    std::string line;
    for (std::size_t i = 0; i < 2 * half; ++i) line += i == half ? "X" : character;
    std::istringstream shown(rendered(line, 1, half + 1));
    std::string head, source, caret;
    std::getline(shown, head);
    std::getline(shown, source);
    std::getline(shown, caret);
    const auto columns = [](std::string_view text) {
      return std::ranges::count_if(text, [](char byte) { return (static_cast<unsigned char>(byte) & 0xc0) != 0x80; });
    };
    EXPECT_LE(columns(source), 120);
    EXPECT_EQ(caret, std::string(static_cast<std::size_t>(columns(source.substr(0, source.find('X')))), ' ') + "^");
  }
}

TEST(Render, ShowsALineOf120ColumnsWhole) {
  const std::string line(120, 'a');
  EXPECT_THAT(rendered(line, 1, 1), testing::EndsWith("\n" + line + "\n^"));
}

TEST(Render, ShowsOnlyTheMessageWhereThereIsNoLine) {
  EXPECT_EQ(rendered("a = 1\n", 2, 1), "f.toml:2:1: key: expected this, got that");
  EXPECT_EQ(rendered("a = 1", 99, 1), "f.toml:99:1: key: expected this, got that");
  EXPECT_EQ(render({{}, "and 3 more"}, "a = 1", "f.toml"), "f.toml: and 3 more");
}

}  // namespace
}  // namespace config
