// SPDX-License-Identifier: BSD-2-Clause
#include <gmock/gmock.h>

#include <string>
#include <string_view>
#include <vector>

#include "kubernetes/splitter.h"

namespace kubernetes {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

struct Cut {
  std::vector<std::string> objects;
  std::string envelope;
  bool is_text_of_that_form = true;
  bool is_between = true;
};

Cut cut(Splitter::Form form, std::string_view text, std::size_t step) {
  Cut result;
  Splitter splitter(form, [&](std::string_view object, bool is_whole) {
    result.objects.push_back(std::string(object) + (is_whole ? "" : " (too large)"));
  });
  for (std::size_t i = 0; i < text.size() && result.is_text_of_that_form; i += step)
    result.is_text_of_that_form = splitter.feed(text.substr(i, step));
  result.envelope = splitter.envelope();
  result.is_between = splitter.is_between();
  return result;
}

TEST(KubernetesSplitter, FindsObjectsWhereverTheTextIsCut) {
  const std::string_view text =
      "{\"a\":\"}\\\"{\"}\n{\"b\":[{\"c\":\"\\\\\"},\"items\"]}{}\n  {\"items\":[{\"d\":1}]}\r\n";
  for (std::size_t step = 1; step <= text.size(); ++step) {
    const Cut seen = cut(Splitter::Form::values, text, step);
    EXPECT_THAT(seen.objects, ElementsAre("{\"a\":\"}\\\"{\"}", "{\"b\":[{\"c\":\"\\\\\"},\"items\"]}", "{}",
                                          "{\"items\":[{\"d\":1}]}"))
        << step;
    EXPECT_TRUE(seen.is_text_of_that_form && seen.is_between) << step;
  }
}

TEST(KubernetesSplitter, TakesAListApart) {
  const std::string_view text =
      "{\"kind\":\"List\",\"metadata\":{\"continue\":\"x\",\"items\":[{\"no\":1}]},\"items\":[{\"a\":[{}]}, "
      "{\"b\":\"]\"}\n],"
      "\"z\":\"items\"}";
  for (std::size_t step = 1; step <= text.size(); ++step) {
    const Cut seen = cut(Splitter::Form::items, text, step);
    EXPECT_THAT(seen.objects, ElementsAre("{\"a\":[{}]}", "{\"b\":\"]\"}")) << step;
    EXPECT_EQ(
        seen.envelope,
        "{\"kind\":\"List\",\"metadata\":{\"continue\":\"x\",\"items\":[{\"no\":1}]},\"items\":[],\"z\":\"items\"}")
        << step;
  }
  EXPECT_EQ(cut(Splitter::Form::items, "{\"items\":null,\"metadata\":{}}", 3).envelope,
            "{\"items\":null,\"metadata\":{}}");
}

TEST(KubernetesSplitter, OfAnObjectThatIsTooLargeKeepsTheBeginning) {
  const std::string large = "{\"name\":\"" + std::string(Splitter::max_object, 'x') + "\"}";
  const Cut seen = cut(Splitter::Form::values, large + "{\"b\":1}", 65536);
  ASSERT_EQ(seen.objects.size(), 2U);
  EXPECT_EQ(seen.objects[0].size(), Splitter::beginning + std::string_view(" (too large)").size());
  EXPECT_TRUE(seen.objects[0].starts_with("{\"name\":\"xxx"));
  EXPECT_EQ(seen.objects[1], "{\"b\":1}");
}

TEST(KubernetesSplitter, RefusesWhatIsNoJson) {
  for (const char* text : {"<html>", "}", "[1]", "HTTP/1.1", "{}}"}) {
    const Cut seen = cut(Splitter::Form::values, text, 1);
    EXPECT_FALSE(seen.is_text_of_that_form) << text;
  }
}

TEST(KubernetesSplitter, TellsWhenAnObjectIsIncomplete) {
  const Cut seen = cut(Splitter::Form::values, "{\"a\":1}\n{\"b\"", 5);
  EXPECT_THAT(seen.objects, ElementsAre("{\"a\":1}"));
  EXPECT_FALSE(seen.is_between);
  EXPECT_THAT(cut(Splitter::Form::values, "\n\n", 1).objects, IsEmpty());
}

}  // namespace
}  // namespace kubernetes
