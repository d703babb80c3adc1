// SPDX-License-Identifier: BSD-2-Clause
#include <gtest/gtest.h>

#include <boost/json.hpp>
#include <string>
#include <vector>

#include "kubernetes/selector.h"

namespace kubernetes {
namespace {

TEST(KubernetesSelector, MatchesAsTheApiServerDoes) {
  const boost::json::object labels = {{"app", "web"}, {"tier", "front"}, {"example.org/rank", "7"}, {"empty", ""}};
  struct Case {
    std::string selector;
    bool is_match;
  };
  const std::vector<Case> cases = {
      {"", true},
      {"app=web", true},
      {"app==web", true},
      {" app = web , tier != back ", true},
      {"app=web,tier=back", false},
      {"app=we", false},
      {"app!=web", false},
      {"other!=web", true},
      {"other=web", false},
      {"app", true},
      {"other", false},
      {"!other", true},
      {"!app", false},
      {"app in (db, web)", true},
      {"app in (db)", false},
      {"other in (db)", false},
      {"app notin (db)", true},
      {"app notin (db,web)", false},
      {"other notin (db)", true},
      {"empty=", true},
      {"empty", true},
      {"app=", false},
      {"example.org/rank>6", true},
      {"example.org/rank > 7", false},
      {"example.org/rank<8", true},
      {"app>1", false},
      {"app in (web),tier in (front,back),!other", true},
  };
  for (const Case& one : cases) EXPECT_EQ(Selector(one.selector).matches(labels), one.is_match) << one.selector;
}

TEST(KubernetesSelector, WhatIsNoneMatchesEverything) {
  for (const char* text :
       {",", "app in", "app in (", "app in (a", "=", "a b", "!", "a=b,", "(", "a in b)", "a ! b", "a in (b) c"})
    EXPECT_TRUE(Selector(text).matches({})) << text;
}

}  // namespace
}  // namespace kubernetes
