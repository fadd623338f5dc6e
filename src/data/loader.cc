#include "data/loader.h"

#include <utility>

#include "data/prefetch.h"

namespace flexchat {
namespace {

std::unique_ptr<PackedLoader> make_packed(const LoaderConfig& config, const std::vector<std::string>& paths,
                                          Split split, bool repeat_small, EncodeDocuments encode) {
  PackingOptions options;
  options.packing = config.packing;
  options.batch_size = config.batch_size;
  options.sequence_len = config.sequence_len;
  options.bos = config.bos;
  options.repeat_small = repeat_small;
  return std::make_unique<PackedLoader>(options, open_documents(paths, split, config.rank, config.world),
                                        std::move(encode));
}

}  // namespace

std::unique_ptr<BatchLoader> make_train_loader(const LoaderConfig& config, EncodeDocuments encode,
                                               const LoaderState* resume) {
  const Split split = config.val_data.empty() ? Split::train : Split::all;
  auto loader = make_packed(config, config.data, split, false, std::move(encode));
  if (resume != nullptr) loader->restore(*resume);
  if (config.prefetch == 0) return loader;
  return std::make_unique<Prefetcher>(std::move(loader), config.prefetch);
}

std::unique_ptr<ValLoader> make_val_loader(const LoaderConfig& config, EncodeDocuments encode) {
  const bool separate = !config.val_data.empty();
  return std::make_unique<ValLoader>(make_packed(config, separate ? config.val_data : config.data,
                                                 separate ? Split::all : Split::val, true,
                                                 std::move(encode)));
}

const Batch& ValLoader::next() {
  if (next_ == batches_.size()) {
    batches_.push_back(loader_->next());
    batches_.back().state = {};  // kept batches must not hold the document buffer
  }
  return batches_[next_++];
}

}  // namespace flexchat
