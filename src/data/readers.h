// Readers of one data file each, used by source.cc. A reader walks the records of its file forward, hands out
// text that is always valid UTF-8, holds a bounded part of the file in memory and can be reopened at any
// position it has reported.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

namespace flexchat {

// Where a reader stands: its next record.
//   .txt .md   offset = byte of the file, row = 0
//   .jsonl     offset = byte of the file, row = lines before it
//   .parquet   offset = row group, row = row inside it
struct FilePosition {
  int64_t offset = 0;
  int64_t row = 0;
};

class FileReader {
 public:
  virtual ~FileReader() = default;
  // Moves over the next record; false at the end of the file. Stores its text ("" when it has none) in *text
  // and adds the number of invalid UTF-8 sequences replaced to *replaced. With text == nullptr the record is
  // passed over, undecoded where the format allows it. Throws Error naming the file and the place.
  virtual bool next(std::string* text, int64_t* replaced) = 0;
  virtual FilePosition position() const = 0;
};

// A text file up to this size is one document; a larger one is cut into documents of at most this size, at
// the last blank line of the second half of each stretch, else at a line end, a space, or between characters.
inline constexpr int64_t kTextDocumentBytes = 16 << 10;
// Ends a document of a text file, with one line end after it; belongs to no document.
inline constexpr std::string_view kTextSeparator = "<|endoftext|>";

std::unique_ptr<FileReader> open_text(const std::string& path, FilePosition start);
std::unique_ptr<FileReader> open_jsonl(const std::string& path, FilePosition start);
std::unique_ptr<FileReader> open_parquet(const std::string& path, FilePosition start);
// The same for a file in memory; `bytes` must outlive the reader. `name` stands for the path in errors.
std::unique_ptr<FileReader> open_parquet_bytes(std::string_view bytes, const std::string& name,
                                               FilePosition start);

// Reads the footer and finds the text column, so that a file cut short is found before training and not in
// the middle of it.
void check_parquet(const std::string& path);

// The string in field "text" of one JSON object; "" when the field is null. Invalid UTF-8 and unpaired
// surrogate escapes become U+FFFD and are added to *replaced. Throws Error starting with `where`
// ("file:line") when the line is not a JSON object or has no such field.
std::string parse_jsonl_line(std::string_view line, const std::string& where, int64_t* replaced);

}  // namespace flexchat
