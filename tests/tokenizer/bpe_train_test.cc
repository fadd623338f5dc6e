// Byte-pair training against a recount of everything at every step; documents, limits, threads.
#include "tokenizer/bpe_train.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>

#include "base/error.h"
#include "base/parallel.h"
#include "support/temp_folder.h"
#include "tokenizer/reference.h"
#include "tokenizer/split.h"

namespace flexchat {
namespace {

BpeTrainResult train(const std::vector<std::string>& documents, const BpeTrainOptions& options) {
  size_t i = 0;
  return train_bpe(
      [&](std::string& text) {
        if (i == documents.size()) return false;
        text = documents[i++];
        return true;
      },
      options);
}

BpeTrainOptions options_for(int64_t n_merges) {
  BpeTrainOptions options;
  options.n_tokens = 256 + n_merges;
  return options;
}

std::map<std::string, int64_t> count_pieces(const std::vector<std::string>& documents) {
  std::map<std::string, int64_t> pieces;
  const Splitter splitter("nanochat");
  for (const std::string& text : documents) {
    splitter.for_each(text, [&](std::string_view piece) { ++pieces[std::string(piece)]; });
  }
  return pieces;
}

class Threads {
 public:
  explicit Threads(int n) : before_(num_threads()) { set_num_threads(n); }
  ~Threads() { set_num_threads(before_); }

 private:
  int before_;
};

TEST(BpeTrain, OverlapsAndTies) {
  // "aaa": (a,a) counts twice, merges once. "ab" and "cd" tie: the smaller pair first.
  EXPECT_EQ(train({"aaa"}, options_for(5)).merges, (std::vector<Merge>{{97, 97}, {256, 97}}));
  EXPECT_EQ(train({"cd.ab"}, options_for(1)).merges, (std::vector<Merge>{{46, 97}}));  // pieces "cd", ".ab"
  EXPECT_EQ(train({"abab"}, options_for(9)).merges, (std::vector<Merge>{{97, 98}, {256, 256}}));
  EXPECT_EQ(train({"aaaaaaaa"}, options_for(9)).merges,
            (std::vector<Merge>{{97, 97}, {256, 256}, {257, 257}}));
}

TEST(BpeTrain, EqualsRecountingOnRandomText) {
  Rng rng(11);
  for (int round = 0; round < 150; ++round) {
    std::vector<std::string> documents;
    const uint64_t letters = 1 + rng.below(4), longest = 1 + rng.below(40);
    for (uint64_t d = 1 + rng.below(4); d > 0; --d) {
      std::string text;
      for (uint64_t w = rng.below(30); w > 0; --w) {
        text += reference::random_letters(rng, 1 + rng.below(longest), letters) + " ";
      }
      documents.push_back(text + ".");
    }
    const int64_t n_merges = 1 + static_cast<int64_t>(rng.below(60));
    ASSERT_EQ(train(documents, options_for(n_merges)).merges,
              reference::train(count_pieces(documents), n_merges))
        << "round " << round;
  }
}

TEST(BpeTrain, EqualsRecountingOnMixedText) {
  Rng rng(12);
  std::vector<std::string> documents;
  for (int d = 0; d < 40; ++d) documents.push_back(reference::random_text(rng, 100));
  // Long pieces take another road through the counter.
  for (int d = 0; d < 20; ++d) documents.push_back(reference::random_letters(rng, 16 + rng.below(40), 3));
  const auto pieces = count_pieces(documents);
  const BpeTrainResult result = train(documents, options_for(200));
  EXPECT_EQ(result.merges, reference::train(pieces, 200));
  EXPECT_EQ(result.distinct_pieces, static_cast<int64_t>(pieces.size()));
  int64_t total = 0;
  for (const auto& [piece, count] : pieces) total += count;
  EXPECT_EQ(result.pieces, total);
  EXPECT_EQ(result.documents, 60);
}

TEST(BpeTrain, ThreadsDoNotChangeTheResult) {
  Rng rng(13);
  std::vector<std::string> documents;
  for (int d = 0; d < 3000; ++d) documents.push_back(reference::random_text(rng, 60));
  const Threads one(1);
  const BpeTrainResult expected = train(documents, options_for(400));
  for (const int n : {2, 3, 7}) {
    const Threads several(n);
    const BpeTrainResult result = train(documents, options_for(400));
    EXPECT_EQ(result.merges, expected.merges);
    EXPECT_EQ(result.pieces, expected.pieces);
    EXPECT_EQ(result.distinct_pieces, expected.distinct_pieces);
    EXPECT_EQ(result.characters, expected.characters);
  }
}

TEST(BpeTrain, ManyBatchesAreAllCounted) {
  // More documents than a batch holds.
  const std::vector<std::string> documents(10000, "ab ab");
  const BpeTrainResult result = train(documents, options_for(2));
  EXPECT_EQ(result.documents, 10000);
  EXPECT_EQ(result.pieces, 20000);
  EXPECT_EQ(result.distinct_pieces, 2);
  EXPECT_EQ(result.merges, (std::vector<Merge>{{97, 98}, {32, 256}}));
}

TEST(BpeTrain, CapsCountCharacters) {
  BpeTrainOptions options = options_for(1);
  options.doc_cap = 3;
  BpeTrainResult result = train({"\u00E9\u00E9\u00E9xyxyxy", "ab"}, options);
  EXPECT_EQ(result.cropped, 1);
  EXPECT_EQ(result.characters, 5);
  EXPECT_EQ(result.bytes, 8);
  EXPECT_EQ(result.merges, (std::vector<Merge>{{0xC3, 0xA9}}));

  options.doc_cap = 0;
  options.max_chars = 4;  // the second document makes it 4, the third exceeds it and is the last used
  result = train({"ab", "ab", "ab", "cdcdcdcd"}, options);
  EXPECT_EQ(result.documents, 3);
  EXPECT_EQ(result.characters, 6);
  options.max_chars = 0;
  EXPECT_EQ(train({"ab", "ab", "ab", "cdcdcdcd"}, options).documents, 4);
}

TEST(BpeTrain, StopsWhenNoPairIsLeft) {
  const BpeTrainResult result = train({"ab a b"}, options_for(1000));
  EXPECT_EQ(result.merges, (std::vector<Merge>{{32, 97}, {32, 98}, {97, 98}}));
}

TEST(BpeTrain, InvalidUtf8IsReplacedAndCounted) {
  const BpeTrainResult result = train({"a\xFF\xFE", "b"}, options_for(3));
  EXPECT_EQ(result.replaced, 2);
  EXPECT_EQ(result.bytes, 8);
}

TEST(BpeTrain, BadInput) {
  EXPECT_NE(message_of<Error>([] { train({}, options_for(3)); }).find("no text"), std::string::npos);
  EXPECT_NE(message_of<Error>([] { train({"", ""}, options_for(3)); }).find("no text"), std::string::npos);
  EXPECT_NE(message_of<Error>([] { train({"ab"}, options_for(-1)); }).find("256"), std::string::npos);
  // What the source throws arrives here, from whichever thread reads.
  int n = 0;
  const auto failing = [&](std::string& text) -> bool {
    if (++n > 9000) fail("shard 3 is broken");
    text = "words";
    return true;
  };
  EXPECT_EQ(message_of<Error>([&] { train_bpe(failing, options_for(3)); }), "shard 3 is broken");
}

TEST(BpeTrain, TokensOfMerges) {
  const std::vector<std::string> tokens = tokens_of_merges({{97, 98}, {256, 99}});
  ASSERT_EQ(tokens.size(), 258u);
  EXPECT_EQ(tokens[0], std::string(1, '\0'));
  EXPECT_EQ(tokens[255], "\xFF");
  EXPECT_EQ(tokens[256], "ab");
  EXPECT_EQ(tokens[257], "abc");
  // Two ways to "abc": the later stays.
  const std::vector<std::string> collapsed =
      tokens_of_merges({{97, 98}, {98, 99}, {256, 99}, {97, 257}, {258, 100}});
  EXPECT_EQ(std::vector<std::string>(collapsed.begin() + 256, collapsed.end()),
            (std::vector<std::string>{"ab", "bc", "abc", "abcd"}));
}

}  // namespace
}  // namespace flexchat
