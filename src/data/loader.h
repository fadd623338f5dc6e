// The loaders a trainer asks for: one endless stream of training batches, and validation batches that are the
// same at every evaluation.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "data/packing.h"

namespace flexchat {

struct LoaderConfig {
  std::vector<std::string> data;      // files, globs, folders
  std::vector<std::string> val_data;  // empty: the val split of `data`, which then is not trained on
  Packing packing = Packing::bestfit;
  int64_t batch_size = 1;    // B, of this rank
  int64_t sequence_len = 1;  // T
  int32_t bos = 0;           // token id put before every document
  int rank = 0, world = 1;   // documents are dealt round robin
  int prefetch = 2;          // batches prepared ahead on a background thread; 0: none
};

// With separate validation data all of `data` is trained on, else its train split. `resume`: the state of the
// last batch used. Throws Error on bad data, on data of fewer tokens than one batch (at the first batch), and
// on a state of other data.
std::unique_ptr<BatchLoader> make_train_loader(const LoaderConfig& config, EncodeDocuments encode,
                                               const LoaderState* resume = nullptr);

// Validation batches, without prefetching. Reads and encodes each batch once and keeps it (8 bytes a token):
// the batches of every later evaluation come from memory. Data shorter than a batch is repeated.
class ValLoader {
 public:
  explicit ValLoader(std::unique_ptr<BatchLoader> loader) : loader_(std::move(loader)) {}
  void restart() { next_ = 0; }  // back to the first batch
  // Valid until the loader is destroyed.
  const Batch& next();

 private:
  std::unique_ptr<BatchLoader> loader_;
  std::deque<Batch> batches_;
  size_t next_ = 0;
};

std::unique_ptr<ValLoader> make_val_loader(const LoaderConfig& config, EncodeDocuments encode);

}  // namespace flexchat
