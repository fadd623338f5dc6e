// Token batches for pretraining out of a document stream. Every document is encoded and gets one BOS token in
// front; passes over the data repeat forever. Two packings, both after nanochat:
//
//   classic  One endless token queue. A batch pops B*T + 1 tokens: inputs are the first B*T, targets the last
//            B*T. Batches don't overlap; rows may start inside a document. Every token is used.
//   bestfit  Each row of T + 1 tokens starts with a document and is filled from a buffer of at least 1000
//            documents: the longest document that fits the rest of the row (first in buffer order among
//            equals); when none fits, the shortest (first among equals) cropped to the rest, its tail
//            discarded. No padding. Documents much longer than a row lose most of their text: see
//            LoaderStats::cropped_tokens.
//
// The state after a batch holds the source position and the tokens already fetched, so a restored loader
// yields the very same batches as one that never stopped.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "data/source.h"

namespace flexchat {

enum class Packing { classic, bestfit };
std::string_view packing_name(Packing packing);
Packing parse_packing(std::string_view name);  // throws Error naming the allowed words

// Token ids of each document, without BOS; ids.size() becomes docs.size(). Called from the thread that calls
// next(): with a Prefetcher that is its background thread.
using EncodeDocuments =
    std::function<void(const std::vector<std::string>& docs, std::vector<std::vector<int32_t>>& ids)>;

// Shared, because a state is attached to every batch and must not copy the buffer.
using TokenDocument = std::shared_ptr<const std::vector<int32_t>>;

struct LoaderState {
  Packing packing = Packing::classic;
  SourcePosition position;               // of the next document to fetch
  int64_t pass_tokens = 0;               // tokens fetched in the present pass
  int64_t pass_documents = 0;            // documents fetched in it
  bool small_data = false;               // the last whole pass had fewer documents than the buffer
  int64_t head = 0;                      // classic: tokens of documents[0] already used
  std::vector<TokenDocument> documents;  // fetched and not yet used, in buffer order, BOS included
};
// For a checkpoint: a small JSON object and one i32 array: the lengths of the buffered documents (JSON field
// "documents" says how many), then their tokens.
Json to_json(const LoaderState& state);
std::vector<int32_t> buffered_tokens(const LoaderState& state);
// Throws Error starting with `source` when the two don't form a state.
LoaderState loader_state_from(const Json& json, const std::vector<int32_t>& tokens,
                              const std::string& source);

struct LoaderStats {           // counted since the loader was made
  int64_t fetched_tokens = 0;  // BOS included
  int64_t cropped_tokens = 0;  // discarded by bestfit
  SourceStats source;
};

struct Batch {
  int64_t batch_size = 0, sequence_len = 0;
  std::vector<int32_t> inputs;   // (B, T) row major
  std::vector<int32_t> targets;  // (B, T): the token after each input
  LoaderState state;             // continues with the batch after this one
  LoaderStats stats;
};

class BatchLoader {
 public:
  virtual ~BatchLoader() = default;
  virtual Batch next() = 0;
  // Continues with the batch after the last one next() returned.
  virtual LoaderState state() const = 0;
};

struct PackingOptions {
  Packing packing = Packing::bestfit;
  int64_t batch_size = 1;     // B
  int64_t sequence_len = 1;   // T
  int32_t bos = 0;            // token id
  bool repeat_small = false;  // data shorter than one batch: repeat it inside the batch instead of failing
  int64_t encode_documents = 128;
  int64_t buffer_documents = 1000;
};

class PackedLoader final : public BatchLoader {
 public:
  PackedLoader(const PackingOptions& options, std::unique_ptr<DocumentStream> stream, EncodeDocuments encode);
  // Throws Error when a whole pass has fewer tokens than one batch and repeat_small is off.
  Batch next() override;
  LoaderState state() const override;
  // Throws Error when the state is of other data or another packing.
  void restore(const LoaderState& state);

 private:
  struct Document {
    int64_t length;
    TokenDocument tokens;
  };

  bool fetch();
  void refill();
  void pop_tokens(std::vector<int32_t>& out, size_t count);
  void fill_row(std::vector<int32_t>& row);

  PackingOptions options_;
  std::unique_ptr<DocumentStream> stream_;
  EncodeDocuments encode_;
  std::deque<Document> buffer_;
  int64_t head_ = 0;
  int64_t pass_tokens_ = 0, pass_documents_ = 0;
  bool small_data_ = false;
  LoaderStats stats_;
  std::vector<std::string> texts_;
  std::vector<std::vector<int32_t>> ids_;
};

}  // namespace flexchat
