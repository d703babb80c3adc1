// SPDX-License-Identifier: BSD-2-Clause
#include <algorithm>
#include <filesystem>
#include <set>
#include <string>
#include <tuple>

#include "tests/parity/table.h"
#include "tests/run/running.h"

namespace {

using namespace parity;
using support::read_text;

class Parity : public support::Running, public testing::WithParamInterface<std::tuple<Row, Engine>> {};

TEST_P(Parity, IsAsTheTableSays) {
  const auto& [row, engine] = GetParam();
  SCOPED_TRACE(std::string(row.what) + ": " + row.seen + (row.differs() ? " / " : "") + row.userspace);
  Stage stage(engine, row.differs(),
              [this](const std::string& text, const std::string& keys) { return files(text, keys); });
  row.check(stage);
}

std::string name_of(const testing::TestParamInfo<Parity::ParamType>& test) {
  const auto& [row, engine] = test.param;
  return std::string(row.name) + (engine == Engine::bpf ? "OnTheFastPath" : "OnTheUserspaceEngine");
}

INSTANTIATE_TEST_SUITE_P(Table, Parity,
                         testing::Combine(testing::ValuesIn(rows().begin(), rows().end()),
                                          testing::Values(Engine::bpf, Engine::userspace)),
                         name_of);

TEST(ParityTable, SaysWhyWhereEnginesDiffer) {
  std::set<std::string> names;
  for (const Row& row : rows()) {
    EXPECT_TRUE(names.insert(row.name).second) << row.name << " is there twice";
    EXPECT_EQ(row.differs(), *row.reason != '\0') << row.name;
    EXPECT_STRNE(row.seen, row.userspace) << row.name;
  }
}

TEST(ParityTable, IsWhatTheDocumentShows) {
  const std::string document = read_text(CLUSTERIP_SOURCE_DIR "/docs/engines.md");
  EXPECT_THAT(document, testing::HasSubstr(same_rows_as_markdown()));
  EXPECT_THAT(document, testing::HasSubstr(differing_rows_as_markdown()));
  const auto lines = std::count(document.begin(), document.end(), '|');
  const std::string shown = same_rows_as_markdown() + differing_rows_as_markdown();
  EXPECT_EQ(lines, std::count(shown.begin(), shown.end(), '|')) << "the document has rows that the table has not";
}

}  // namespace
