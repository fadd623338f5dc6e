// Documents to batches to per-thread counters; then the merge loop.
#include "tokenizer/bpe_train.h"

#include <chrono>
#include <exception>
#include <memory>
#include <string_view>
#include <thread>
#include <unordered_map>
#include <utility>

#include "base/error.h"
#include "base/progress.h"
#include "base/utf8.h"
#include "tokenizer/split.h"
#include "tokenizer/work_queue.h"

namespace flexchat {
namespace {

constexpr int64_t kBatchBytes = int64_t{8} << 20;
constexpr size_t kBatchDocuments = 4096;

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Reads documents into batches: valid UTF-8, cropped, within max_chars.
class Reader {
 public:
  Reader(const std::function<bool(std::string&)>& next, const BpeTrainOptions& options,
         BpeTrainResult& result)
      : next_(next), options_(options), result_(result) {}

  std::vector<std::string> batch() {
    std::vector<std::string> documents;
    int64_t bytes = 0;
    std::string text;
    while (!ended_ && bytes < kBatchBytes && documents.size() < kBatchDocuments) {
      if (!next_(text)) {
        ended_ = true;
        break;
      }
      make_valid_utf8(text, &result_.replaced);
      if (options_.doc_cap > 0) {
        const std::string_view head = first_characters(text, options_.doc_cap);
        if (head.size() < text.size()) {
          text.resize(head.size());
          ++result_.cropped;
        }
      }
      ++result_.documents;
      result_.characters += count_characters(text);
      result_.bytes += static_cast<int64_t>(text.size());
      bytes += static_cast<int64_t>(text.size());
      ended_ = options_.max_chars > 0 && result_.characters > options_.max_chars;
      documents.push_back(std::move(text));
    }
    return documents;
  }

 private:
  const std::function<bool(std::string&)>& next_;
  const BpeTrainOptions& options_;
  BpeTrainResult& result_;
  bool ended_ = false;
};

// Counts of one worker, apart in memory from the others'.
struct alignas(64) Worker {
  PieceCounter counter;
  int64_t pieces = 0;
};

PieceCounter count_pieces(Reader& reader, const Splitter& splitter, const BpeTrainOptions& options,
                          BpeTrainResult& result) {
  std::vector<Worker> workers(static_cast<size_t>(num_threads()));
  std::unique_ptr<Progress> progress;
  if (options.show_progress) progress = std::make_unique<Progress>("counting", 0, "MB");
  std::vector<std::string> current = reader.batch(), following;
  int64_t bytes = 0;
  while (!current.empty()) {
    std::exception_ptr error;
    {
      // Reading (decompression, JSON) goes on while this batch is counted.
      const std::jthread read_ahead([&] {
        try {
          following = reader.batch();
        } catch (...) {
          error = std::current_exception();
        }
      });
      for_each_item(static_cast<int64_t>(current.size()), [&](int64_t w, int64_t item) {
        Worker& worker = workers[static_cast<size_t>(w)];
        const std::string& text = current[static_cast<size_t>(item)];
        splitter.for_each(text, [&](std::string_view piece) {
          worker.counter.add(piece, text.data() + text.size());
          ++worker.pieces;
        });
      });
    }
    if (error) std::rethrow_exception(error);
    for (const std::string& text : current) bytes += static_cast<int64_t>(text.size());
    if (progress) progress->update(bytes / 1'000'000);
    current = std::move(following);
  }
  result.pieces = workers[0].pieces;
  for (size_t w = 1; w < workers.size(); ++w) {
    workers[0].counter.add_all(workers[w].counter);
    workers[w].counter = PieceCounter();
    result.pieces += workers[w].pieces;
  }
  return std::move(workers[0].counter);
}

}  // namespace

BpeTrainResult train_bpe(const std::function<bool(std::string&)>& next, const BpeTrainOptions& options) {
  check(options.n_tokens >= 256, "a byte-pair vocabulary of {} tokens is too small: the bytes alone are 256",
        options.n_tokens);
  BpeTrainResult result;
  const Splitter splitter(options.pattern);
  Reader reader(next, options, result);
  auto start = std::chrono::steady_clock::now();
  const PieceCounter counter = count_pieces(reader, splitter, options, result);
  check(result.bytes > 0, "no text to train the tokenizer on ({} documents, all empty)", result.documents);
  result.distinct_pieces = counter.distinct();
  result.count_seconds = seconds_since(start);

  start = std::chrono::steady_clock::now();
  const int64_t n_merges = options.n_tokens - 256;
  std::unique_ptr<Progress> progress;
  if (options.show_progress) progress = std::make_unique<Progress>("merging", n_merges, "merges");
  result.merges = find_merges(counter, n_merges, [&](int64_t done) {
    if (progress && done % 128 == 0) progress->update(done);
  });
  result.merge_seconds = seconds_since(start);
  return result;
}

std::vector<std::string> tokens_of_merges(const std::vector<Merge>& merges) {
  std::vector<std::string> all;
  for (int byte = 0; byte < 256; ++byte) all.emplace_back(1, static_cast<char>(byte));
  for (const auto& [a, b] : merges) all.push_back(all[static_cast<size_t>(a)] + all[static_cast<size_t>(b)]);
  std::unordered_map<std::string_view, size_t> last;
  for (size_t id = 0; id < all.size(); ++id) last[all[id]] = id;
  std::vector<std::string> tokens;
  for (size_t id = 0; id < all.size(); ++id) {
    if (last[all[id]] == id) tokens.push_back(all[id]);
  }
  return tokens;
}

}  // namespace flexchat
