// The background loader: same batches, exact states, errors, clean shutdown; and the loaders a trainer asks
// for.
#include "data/prefetch.h"

#include <atomic>
#include <chrono>
#include <nlohmann/json.hpp>
#include <thread>

#include "data/loader.h"
#include "data_sources/helpers.h"

namespace flexchat {
namespace {

void encode_bytes(const std::vector<std::string>& docs, std::vector<std::vector<int32_t>>& ids) {
  ids.assign(docs.size(), {});
  for (size_t i = 0; i < docs.size(); ++i) {
    for (const char c : docs[i]) ids[i].push_back(static_cast<unsigned char>(c));
  }
}

LoaderConfig config_of(const std::string& path, Packing packing, int prefetch) {
  LoaderConfig config;
  config.data = {path};
  config.packing = packing;
  config.batch_size = 2;
  config.sequence_len = 16;
  config.bos = 256;
  config.prefetch = prefetch;
  return config;
}

// Counts up and throws at batch `last`.
class CountingLoader final : public BatchLoader {
 public:
  explicit CountingLoader(int64_t last, std::atomic<int64_t>* produced = nullptr)
      : last_(last), produced_(produced) {}
  Batch next() override {
    if (count_ == last_) fail("batch {} is broken", count_);
    Batch batch;
    batch.batch_size = ++count_;
    batch.state = state();
    if (produced_ != nullptr) *produced_ = count_;
    return batch;
  }
  LoaderState state() const override {
    LoaderState state;
    state.pass_tokens = count_;
    return state;
  }

 private:
  int64_t last_, count_ = 0;
  std::atomic<int64_t>* produced_;
};

TEST(Prefetch, SameBatchesAndStatesAsWithout) {
  TempDir dir;
  const std::string path = dir.write_jsonl("a.jsonl", "a document number ", 90);
  for (const Packing packing : {Packing::classic, Packing::bestfit}) {
    auto plain = make_train_loader(config_of(path, packing, 0), encode_bytes);
    for (const int depth : {1, 4}) {
      auto ahead = make_train_loader(config_of(path, packing, depth), encode_bytes);
      plain = make_train_loader(config_of(path, packing, 0), encode_bytes);
      EXPECT_EQ(to_json(ahead->state()), to_json(plain->state()));
      for (int step = 0; step < 150; ++step) {
        const Batch a = ahead->next(), b = plain->next();
        ASSERT_EQ(a.inputs, b.inputs);
        ASSERT_EQ(a.targets, b.targets);
        ASSERT_EQ(to_json(ahead->state()), to_json(plain->state()));
        ASSERT_EQ(buffered_tokens(a.state), buffered_tokens(b.state));
        ASSERT_EQ(a.stats.fetched_tokens, b.stats.fetched_tokens);
      }
    }
  }
}

TEST(Prefetch, ResumesAtTheBatchAfterTheLastUsed) {
  TempDir dir;
  const std::string path = dir.write_jsonl("a.jsonl", "a document number ", 70);
  const LoaderConfig config = config_of(path, Packing::bestfit, 3);
  auto loader = make_train_loader(config, encode_bytes);
  for (int step = 0; step < 23; ++step) loader->next();
  const LoaderState state =
      loader_state_from(to_json(loader->state()), buffered_tokens(loader->state()), "test");
  std::vector<std::vector<int32_t>> expected;
  for (int step = 0; step < 40; ++step) expected.push_back(loader->next().inputs);
  loader.reset();
  auto resumed = make_train_loader(config, encode_bytes, &state);
  for (const auto& inputs : expected) ASSERT_EQ(resumed->next().inputs, inputs);
}

TEST(Prefetch, ErrorsComeAfterTheBatchesBeforeThem) {
  Prefetcher loader(std::make_unique<CountingLoader>(5), 2);
  for (int64_t i = 1; i <= 5; ++i) EXPECT_EQ(loader.next().batch_size, i);
  for (int again = 0; again < 3; ++again) {
    EXPECT_EQ(error_of([&] { loader.next(); }), "batch 5 is broken");
  }
  EXPECT_EQ(loader.state().pass_tokens, 5);
  expect_contains(error_of([] { Prefetcher(std::make_unique<CountingLoader>(5), 0); }), "at least 1");
}

TEST(Prefetch, StopsAtAnyTime) {
  for (int used = 0; used < 20; ++used) {
    Prefetcher loader(std::make_unique<CountingLoader>(1000000), 1 + used % 4);
    for (int i = 0; i < used; ++i) loader.next();
    if (used % 3 == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
}

TEST(Prefetch, NeverRunsFurtherAheadThanItsDepth) {
  std::atomic<int64_t> produced = 0;
  Prefetcher loader(std::make_unique<CountingLoader>(1000, &produced), 3);
  for (int64_t used = 0; used < 20; ++used) {
    while (produced < used + 3) std::this_thread::yield();
    std::this_thread::sleep_for(std::chrono::microseconds(200));
    EXPECT_EQ(produced, used + 3);
    loader.next();
  }
}

TEST(Loaders, TrainAndValShareNoDocument) {
  TempDir dir;
  const std::string path = dir.write_jsonl("a.jsonl", "", 60);
  LoaderConfig config = config_of(path, Packing::classic, 0);
  const auto train = make_train_loader(config, encode_bytes);
  const auto val = make_val_loader(config, encode_bytes);
  const auto texts = [](const std::vector<int32_t>& ids) {
    std::string out;
    for (const int32_t id : ids) out += id == 256 ? ' ' : static_cast<char>(id);
    return out;
  };
  EXPECT_EQ(texts(train->next().inputs), " 0 1 2 3 4 5 6 7 8 10 11 12 13 1");
  EXPECT_EQ(texts(val->next().inputs), " 9 19 29 39 49 59 9 19 29 39 49 ");
  config.val_data = {dir.write_jsonl("v.jsonl", "v", 2)};
  EXPECT_EQ(texts(make_train_loader(config, encode_bytes)->next().inputs),
            " 0 1 2 3 4 5 6 7 8 9 10 11 12 13");
  EXPECT_EQ(texts(make_val_loader(config, encode_bytes)->next().inputs), " v0 v1 v0 v1 v0 v1 v0 v1 v0 v1 v");
}

TEST(Loaders, ValRestartsOnTheSameBatches) {
  TempDir dir;
  const std::string path = dir.write_jsonl("a.jsonl", "doc ", 2000);
  int64_t encoded = 0;
  const auto val = make_val_loader(config_of(path, Packing::bestfit, 0), [&](const auto& docs, auto& ids) {
    encoded += std::ssize(docs);
    encode_bytes(docs, ids);
  });
  std::vector<std::vector<int32_t>> first;
  for (int i = 0; i < 4; ++i) first.push_back(val->next().inputs);
  val->restart();
  const int64_t before = encoded;
  for (int i = 0; i < 4; ++i) EXPECT_EQ(val->next().inputs, first[static_cast<size_t>(i)]);
  EXPECT_EQ(encoded, before);
  EXPECT_NE(val->next().inputs, first[0]);
}

TEST(Loaders, DataErrorsReachTheCaller) {
  TempDir dir;
  const std::string bad = dir.write("b.jsonl", "{\"text\": \"fine\"}\n{\"text\": 3}\n");
  for (const int prefetch : {0, 2}) {
    LoaderConfig config = config_of(bad, Packing::classic, prefetch);
    config.val_data = {bad};
    auto loader = make_train_loader(config, encode_bytes);
    expect_contains(error_of([&] { loader->next(); }), "b.jsonl:2: field 'text' is a number");
    config.data = {dir.write("short.txt", "too short")};
    loader = make_train_loader(config, encode_bytes);
    expect_contains(error_of([&] { loader->next(); }), "it has 10 tokens and a batch takes 33");
  }
  expect_contains(
      error_of([&] { make_train_loader(config_of(dir.path("x"), Packing::classic, 2), encode_bytes); }),
      "no such data file");
}

}  // namespace
}  // namespace flexchat
