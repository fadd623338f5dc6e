// The "text" column of a parquet file, page by page. The only file that includes Arrow's headers.
// It reads the physical column (BYTE_ARRAY, required or optional) instead of Arrow arrays: strings, large
// strings and dictionaries are then one case, and memory is a page, not a row group. No Arrow threads; the
// system allocator, so that sanitizers see every block.
#include <arrow/buffer.h>
#include <arrow/io/file.h>
#include <arrow/io/memory.h>
#include <arrow/memory_pool.h>
#include <parquet/column_reader.h>
#include <parquet/file_reader.h>
#include <parquet/metadata.h>
#include <parquet/properties.h>
#include <parquet/schema.h>

#include <algorithm>
#include <array>
#include <exception>
#include <vector>

#include "base/error.h"
#include "base/strings.h"
#include "base/utf8.h"
#include "data/readers.h"

namespace flexchat {
namespace {

constexpr int64_t kReadBytes = 1 << 20;
constexpr int64_t kBatchRows = 64;

// Runs fn and turns whatever Arrow throws into an Error that names the file.
template <class Fn>
auto guarded(const std::string& name, const Fn& fn) {
  try {
    return fn();
  } catch (const Error&) {
    throw;
  } catch (const std::exception& e) {
    const std::string_view what = e.what();
    fail("{}: damaged or foreign parquet file: {}", name, what.substr(0, what.find('\n')));
  }
}

std::shared_ptr<arrow::io::RandomAccessFile> open_file(const std::string& path) {
  auto file = arrow::io::ReadableFile::Open(path, arrow::system_memory_pool());
  check(file.ok(), "cannot read {}: {}", path, file.status().message());
  return *file;
}

// Index of the leaf column "text".
int find_text_column(const parquet::SchemaDescriptor& schema, const std::string& name) {
  const parquet::schema::GroupNode& root = *schema.group_node();
  std::vector<std::string> names;
  for (int i = 0; i < root.field_count(); ++i) names.push_back(root.field(i)->name());
  check(std::find(names.begin(), names.end(), "text") != names.end(), "{}: no column 'text' (columns: {})",
        name, names.empty() ? "none" : join(names));
  for (int i = 0; i < schema.num_columns(); ++i) {
    const parquet::ColumnDescriptor& column = *schema.Column(i);
    if (column.path()->ToDotString() != "text" || column.max_repetition_level() > 0) continue;
    check(column.physical_type() == parquet::Type::BYTE_ARRAY, "{}: column 'text' is {}, not a string", name,
          parquet::TypeToString(column.physical_type()));
    return i;
  }
  fail("{}: column 'text' is nested, not a string", name);
}

class ParquetReader final : public FileReader {
 public:
  ParquetReader(std::shared_ptr<arrow::io::RandomAccessFile> file, const std::string& name,
                FilePosition start)
      : name_(name), position_(start) {
    guarded(name_, [&] {
      parquet::ReaderProperties properties(arrow::system_memory_pool());
      properties.enable_buffered_stream();
      properties.set_buffer_size(kReadBytes);
      properties.set_page_checksum_verification(true);
      reader_ = parquet::ParquetFileReader::Open(std::move(file), properties);
      const auto metadata = reader_->metadata();
      column_ = find_text_column(*metadata->schema(), name_);
      max_definition_ = metadata->schema()->Column(column_)->max_definition_level();
      groups_ = metadata->num_row_groups();
      check(start.offset <= groups_, "{}: no row group {} (it has {})", name_, start.offset, groups_);
      if (start.row > 0) skip_rows(start.row);
    });
  }

  bool next(std::string* text, int64_t* replaced) override {
    return guarded(name_, [&] {
      while (batch_row_ == batch_rows_) {
        if (position_.offset >= groups_) return false;
        if (!open_group()) continue;
        read_batch();
      }
      const bool present = definition_[static_cast<size_t>(batch_row_)] == max_definition_;
      if (text != nullptr) text->clear();
      if (present) {
        const parquet::ByteArray value = values_[static_cast<size_t>(batch_value_++)];
        if (text != nullptr && value.len > 0)
          text->assign(reinterpret_cast<const char*>(value.ptr), value.len);
      }
      ++batch_row_;
      ++position_.row;
      if (text != nullptr) make_valid_utf8(*text, replaced);
      return true;
    });
  }

  FilePosition position() const override { return position_; }

 private:
  // Makes column_reader_ stand on the row group position_.offset. False when that group has been read to its
  // end: the position then moves to the next group.
  bool open_group() {
    if (!column_reader_) {
      const auto group = reader_->RowGroup(static_cast<int>(position_.offset));
      group_rows_ = group->metadata()->num_rows();
      column_reader_ = std::dynamic_pointer_cast<parquet::ByteArrayReader>(group->Column(column_));
      check(column_reader_ != nullptr, "{}: row group {}: column 'text' is not a string", name_,
            position_.offset);
    }
    if (column_reader_->HasNext()) return true;
    check(position_.row == group_rows_, "{}: row group {} ends after {} of {} rows", name_, position_.offset,
          position_.row, group_rows_);
    column_reader_.reset();
    position_ = {position_.offset + 1, 0};
    return false;
  }

  void read_batch() {
    int64_t values = 0;
    std::fill(definition_.begin(), definition_.end(), max_definition_);  // a required column has no levels
    batch_rows_ = column_reader_->ReadBatch(kBatchRows, definition_.data(), nullptr, values_.data(), &values);
    const int64_t present =
        std::count(definition_.begin(), definition_.begin() + batch_rows_, max_definition_);
    check(batch_rows_ > 0 && present == values, "{}: row group {}: {} rows with {} values", name_,
          position_.offset, batch_rows_, values);
    batch_row_ = batch_value_ = 0;
  }

  void skip_rows(int64_t rows) {
    position_.row = 0;
    const int64_t group = position_.offset;
    while (position_.row < rows) {
      const bool more = next(nullptr, nullptr);
      check(more && position_.offset == group, "{}: row group {} has no row {}", name_, group, rows);
    }
  }

  std::string name_;
  FilePosition position_;
  std::unique_ptr<parquet::ParquetFileReader> reader_;
  std::shared_ptr<parquet::ByteArrayReader> column_reader_;  // of row group position_.offset, or null
  int column_ = 0;
  int64_t groups_ = 0, group_rows_ = 0;
  int16_t max_definition_ = 0;
  // Rows read ahead; the bytes of values_ live in column_reader_ until its next ReadBatch.
  std::array<int16_t, kBatchRows> definition_{};
  std::array<parquet::ByteArray, kBatchRows> values_{};
  int64_t batch_rows_ = 0, batch_row_ = 0, batch_value_ = 0;
};

}  // namespace

std::unique_ptr<FileReader> open_parquet(const std::string& path, FilePosition start) {
  return std::make_unique<ParquetReader>(open_file(path), path, start);
}

std::unique_ptr<FileReader> open_parquet_bytes(std::string_view bytes, const std::string& name,
                                               FilePosition start) {
  auto buffer = std::make_shared<arrow::Buffer>(bytes);
  return std::make_unique<ParquetReader>(std::make_shared<arrow::io::BufferReader>(buffer), name, start);
}

void check_parquet(const std::string& path) { open_parquet(path, {}); }

}  // namespace flexchat
