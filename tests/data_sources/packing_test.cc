// Both packings against plain transcriptions of their rules, and resume after every batch.
#include "data/packing.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/rng.h"
#include "data_sources/helpers.h"

namespace flexchat {
namespace {

constexpr int32_t kBos = 1000;

// One token a byte.
void encode_bytes(const std::vector<std::string>& docs, std::vector<std::vector<int32_t>>& ids) {
  ids.assign(docs.size(), {});
  for (size_t i = 0; i < docs.size(); ++i) {
    for (const char c : docs[i]) ids[i].push_back(static_cast<unsigned char>(c));
  }
}

// `n` documents of 1 to `longest` letters, as a JSON-lines file; equal lengths are common.
std::string write_corpus(const TempDir& dir, int n, uint64_t longest) {
  Rng rng(3);
  std::string lines;
  for (int i = 0; i < n; ++i) {
    std::string text;
    for (uint64_t k = rng.below(longest) + 1; k > 0; --k) text += static_cast<char>('a' + rng.below(26));
    lines += "{\"text\": \"" + text + "\"}\n";
  }
  return dir.write("corpus" + std::to_string(n) + ".jsonl", lines);
}

using Tokens = std::vector<int32_t>;

// Token documents of the corpus, pass after pass.
class Documents {
 public:
  explicit Documents(const std::string& path) {
    const auto texts = drain(*open_documents({path}, Split::all));
    encode_bytes(texts, documents_);
    for (auto& document : documents_) document.insert(document.begin(), kBos);
  }
  const Tokens& at(size_t i) const { return documents_[i % documents_.size()]; }
  size_t size() const { return documents_.size(); }

 private:
  std::vector<Tokens> documents_;
};

PackedLoader make_loader(const std::string& path, const PackingOptions& options) {
  return PackedLoader(options, open_documents({path}, Split::all), encode_bytes);
}

PackingOptions options_of(Packing packing, int64_t b, int64_t t) {
  PackingOptions options;
  options.packing = packing;
  options.batch_size = b;
  options.sequence_len = t;
  options.bos = kBos;
  return options;
}

// The rule of the reference, word for word: a list of documents, scanned in order, popped by index.
class NaiveBestFit {
 public:
  NaiveBestFit(const Documents& documents, size_t batch, size_t buffer)
      : documents_(documents), batch_(batch), buffer_size_(buffer) {}

  Tokens row(size_t capacity) {
    Tokens out;
    while (out.size() < capacity) {
      refill();
      const size_t remaining = capacity - out.size();
      int best = -1;
      size_t best_length = 0;
      for (size_t i = 0; i < buffer_.size(); ++i) {
        if (buffer_[i].size() <= remaining && buffer_[i].size() > best_length) {
          best = static_cast<int>(i);
          best_length = buffer_[i].size();
        }
      }
      if (best < 0) {
        best = 0;
        for (size_t i = 1; i < buffer_.size(); ++i) {
          if (buffer_[i].size() < buffer_[static_cast<size_t>(best)].size()) best = static_cast<int>(i);
        }
      }
      const Tokens document = buffer_[static_cast<size_t>(best)];
      buffer_.erase(buffer_.begin() + best);
      const auto take = static_cast<ptrdiff_t>(std::min(document.size(), remaining));
      out.insert(out.end(), document.begin(), document.begin() + take);
    }
    return out;
  }

 private:
  void refill() {
    if (documents_.size() < buffer_size_) {  // small data: pass by pass
      for (size_t i = 0; buffer_.empty() && i < documents_.size(); ++i) small_.push_back(documents_.at(i));
      buffer_.insert(buffer_.end(), small_.begin(), small_.end());
      small_.clear();
      return;
    }
    while (buffer_.size() < buffer_size_) {
      for (size_t i = 0; i < batch_; ++i) {  // a batch ends with the pass
        buffer_.push_back(documents_.at(next_++));
        if (next_ % documents_.size() == 0) break;
      }
    }
  }

  const Documents& documents_;
  size_t batch_, buffer_size_, next_ = 0;
  std::vector<Tokens> buffer_, small_;
};

void expect_rows(const Batch& batch, const std::vector<Tokens>& rows) {
  Tokens inputs, targets;
  for (const auto& row : rows) {
    inputs.insert(inputs.end(), row.begin(), row.end() - 1);
    targets.insert(targets.end(), row.begin() + 1, row.end());
  }
  EXPECT_EQ(batch.inputs, inputs);
  EXPECT_EQ(batch.targets, targets);
}

TEST(ClassicPacking, PopsOneMoreTokenThanItFeeds) {
  TempDir dir;
  const std::string path = write_corpus(dir, 61, 40);
  const Documents documents(path);
  auto loader = make_loader(path, options_of(Packing::classic, 3, 17));
  Tokens queue;
  size_t next_document = 0;
  for (int step = 0; step < 200; ++step) {
    while (queue.size() < 3 * 17 + 1) {
      const Tokens& document = documents.at(next_document++);
      queue.insert(queue.end(), document.begin(), document.end());
    }
    const Batch batch = loader.next();
    EXPECT_EQ(batch.batch_size, 3);
    EXPECT_EQ(batch.sequence_len, 17);
    EXPECT_EQ(batch.inputs, Tokens(queue.begin(), queue.begin() + 51));
    EXPECT_EQ(batch.targets, Tokens(queue.begin() + 1, queue.begin() + 52));
    queue.erase(queue.begin(), queue.begin() + 52);
  }
  EXPECT_GT(loader.state().position.epoch, 2);
}

TEST(BestFitPacking, FollowsTheReferenceRule) {
  TempDir dir;
  for (const auto& [documents_n, longest, t] :
       {std::tuple{300, 40, 64}, {300, 90, 31}, {131, 12, 50}, {40, 30, 7}}) {
    const std::string path = write_corpus(dir, documents_n, static_cast<uint64_t>(longest));
    const Documents documents(path);
    PackingOptions options = options_of(Packing::bestfit, 4, t);
    options.buffer_documents = 40;
    options.encode_documents = 16;
    auto loader = make_loader(path, options);
    NaiveBestFit naive(documents, 16, 40);
    for (int step = 0; step < 120; ++step) {
      std::vector<Tokens> rows;
      for (int b = 0; b < 4; ++b) rows.push_back(naive.row(static_cast<size_t>(t) + 1));
      expect_rows(loader.next(), rows);
      for (const auto& row : rows) EXPECT_EQ(row[0], kBos);
    }
  }
}

TEST(BestFitPacking, DefaultBufferIsAThousandDocuments) {
  TempDir dir;
  const std::string path = write_corpus(dir, 2500, 60);
  const Documents documents(path);
  auto loader = make_loader(path, options_of(Packing::bestfit, 2, 100));
  NaiveBestFit naive(documents, 128, 1000);
  for (int step = 0; step < 200; ++step) {
    const Tokens first = naive.row(101), second = naive.row(101);
    const Batch batch = loader.next();
    expect_rows(batch, {first, second});
    EXPECT_GE(batch.state.documents.size(), 990u);
  }
}

TEST(BestFitPacking, TiesTakeTheFirst) {
  TempDir dir;
  // With BOS: lengths 3 3 2 2 6 6, capacity 7: abc-like pairs differ only in their letters.
  const std::string path =
      dir.write("t.jsonl",
                "{\"text\":\"aa\"}\n{\"text\":\"bb\"}\n{\"text\":\"c\"}\n{\"text\":\"d\"}\n"
                "{\"text\":\"eeeee\"}\n{\"text\":\"fffff\"}\n");
  PackingOptions options = options_of(Packing::bestfit, 1, 6);
  options.buffer_documents = 6;
  options.encode_documents = 6;
  auto loader = make_loader(path, options);
  const Batch first = loader.next();
  // Longest that fits 7: the first of length 6. Rest 1: nothing fits, so the first shortest, cropped to its
  // BOS.
  EXPECT_EQ(first.inputs, (Tokens{kBos, 'e', 'e', 'e', 'e', 'e'}));
  EXPECT_EQ(first.targets, (Tokens{'e', 'e', 'e', 'e', 'e', kBos}));
  EXPECT_EQ(first.stats.cropped_tokens, 1);
  EXPECT_EQ(first.stats.source.documents, 12);  // one placement takes the buffer under six: the next pass
}

TEST(BestFitPacking, SmallDataIsUsedUpPassByPass) {
  TempDir dir;
  const std::string path = write_corpus(dir, 30, 50);
  const Documents documents(path);
  auto loader = make_loader(path, options_of(Packing::bestfit, 1, 20));
  NaiveBestFit naive(documents, 128, 1000);
  for (int step = 0; step < 200; ++step) expect_rows(loader.next(), {naive.row(21)});
  EXPECT_GT(loader.state().position.epoch, 3);
}

class Resume : public testing::TestWithParam<Packing> {};

TEST_P(Resume, AfterEveryBatchBitForBit) {
  TempDir dir;
  for (const int documents : {20, 150}) {
    const std::string path = write_corpus(dir, documents, 60);
    PackingOptions options = options_of(GetParam(), 2, 33);
    options.buffer_documents = 50;
    options.encode_documents = 16;
    auto loader = make_loader(path, options);
    std::vector<LoaderState> states = {loader.state()};
    std::vector<Batch> batches;
    for (int step = 0; step < 100; ++step) {
      batches.push_back(loader.next());
      states.push_back(batches.back().state);
    }
    EXPECT_GT(loader.state().position.epoch, 1);
    for (size_t i = 0; i < states.size(); i += 7) {
      const Json json = Json::parse(to_json(states[i]).dump());
      const LoaderState state = loader_state_from(json, buffered_tokens(states[i]), "state");
      auto resumed = make_loader(path, options);
      resumed.restore(state);
      EXPECT_EQ(buffered_tokens(resumed.state()), buffered_tokens(states[i]));
      EXPECT_EQ(to_json(resumed.state()), json);
      for (size_t k = i; k < batches.size(); ++k) {
        const Batch batch = resumed.next();
        ASSERT_EQ(batch.inputs, batches[k].inputs) << "batch " << k << " after resuming at " << i;
        ASSERT_EQ(batch.targets, batches[k].targets);
      }
      EXPECT_EQ(to_json(resumed.state()), to_json(loader.state()));
    }
  }
}
INSTANTIATE_TEST_SUITE_P(Packings, Resume, testing::Values(Packing::classic, Packing::bestfit),
                         [](const auto& p) { return std::string(packing_name(p.param)); });

TEST(Packing, DataShorterThanABatchIsAnError) {
  TempDir dir;
  const std::string path = dir.write_jsonl("a.jsonl", "doc", 5);  // 5 tokens each with BOS
  for (const Packing packing : {Packing::classic, Packing::bestfit}) {
    auto fits = make_loader(path, options_of(packing, 4, packing == Packing::classic ? 6 : 5));
    EXPECT_EQ(std::ssize(fits.next().inputs), packing == Packing::classic ? 24 : 20);
    auto loader = make_loader(path, options_of(packing, 5, 5));
    const std::string text = error_of([&] { loader.next(); });
    expect_contains(
        text, "it has 25 tokens and a batch takes " + std::string(packing == Packing::classic ? "26" : "30"));
    expect_contains(text, "batch size 5 x sequence length 5");
    PackingOptions repeat = options_of(packing, 50, 5);
    repeat.repeat_small = true;
    auto repeating = make_loader(path, repeat);
    EXPECT_EQ(repeating.next().inputs.size(), 250u);
  }
}

TEST(Packing, BadStatesAreErrors) {
  TempDir dir;
  const std::string path = write_corpus(dir, 60, 30);
  auto loader = make_loader(path, options_of(Packing::bestfit, 1, 20));
  const LoaderState state = loader.next().state;
  const Json good = to_json(state);
  const std::vector<int32_t> tokens = buffered_tokens(state);
  const auto reject = [&](Json json, std::vector<int32_t> t) {
    expect_contains(error_of([&] { loader_state_from(json, t, "ckpt/loader.json"); }), "ckpt/loader.json");
  };
  const auto with = [&](const char* key, const Json& value) {
    Json json = good;
    json[key] = value;
    return json;
  };
  reject(with("documents", 5), tokens);
  reject(with("documents", 1 << 30), tokens);
  reject(with("pass_tokens", -1), tokens);
  reject(with("small_data", 1), tokens);
  reject(with("extra", 1), tokens);
  reject(with("position", Json::object()), tokens);
  reject(Json::array(), tokens);
  reject(good, std::vector<int32_t>(tokens.begin(), tokens.end() - 1));
  std::vector<int32_t> negative = tokens;
  negative[0] = -3;
  reject(good, negative);
  expect_contains(error_of([&] { loader_state_from(with("packing", "bestfot"), tokens, "x"); }),
                  "mean 'bestfit'");

  auto classic = make_loader(path, options_of(Packing::classic, 1, 20));
  expect_contains(error_of([&] { classic.restore(state); }),
                  "was packing 'bestfit', this run packs 'classic'");
  auto other = make_loader(write_corpus(dir, 61, 30), options_of(Packing::bestfit, 1, 20));
  expect_contains(error_of([&] { other.restore(state); }), "cannot resume");
}

TEST(Packing, EncoderErrorsPass) {
  TempDir dir;
  const std::string path = write_corpus(dir, 60, 30);
  PackedLoader loader(options_of(Packing::classic, 1, 20), open_documents({path}, Split::all),
                      [](const std::vector<std::string>&, std::vector<Tokens>& ids) { ids.clear(); });
  expect_contains(error_of([&] { loader.next(); }), "encoder returned 0 documents");
  expect_contains(error_of([&] { make_loader(path, options_of(Packing::classic, 0, 20)); }), "at least 1");
}

}  // namespace
}  // namespace flexchat
