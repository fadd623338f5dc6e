#include "checkpoint/safetensors.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <numeric>
#include <set>

#include "base/error.h"
#include "base/options.h"
#include "base/parallel.h"
#include "base/strings.h"
#include "checkpoint/mapped_file.h"

namespace flexchat {
namespace {

constexpr uint64_t kLengthBytes = 8;
constexpr uint64_t kMaxHeader = 100'000'000;  // the format's own limit
constexpr std::string_view kMetadataKey = "__metadata__";

struct DTypeWord {
  std::string_view word;
  DType dtype;
};
constexpr std::array<DTypeWord, 9> kWords = {{{"F64", DType::f64},
                                              {"F32", DType::f32},
                                              {"BF16", DType::bf16},
                                              {"F16", DType::f16},
                                              {"F8_E4M3", DType::f8e4m3},
                                              {"F8_E5M2", DType::f8e5m2},
                                              {"I64", DType::i64},
                                              {"I32", DType::i32},
                                              {"U8", DType::u8}}};

std::string_view dtype_word(DType dtype) {
  return std::find_if(kWords.begin(), kWords.end(), [&](const DTypeWord& w) { return w.dtype == dtype; })
      ->word;
}

// Reads the header as a stream of JSON events: unlike a document it shows duplicate keys, and it holds every
// value to the one type the format allows there.
class HeaderReader final : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit HeaderReader(const std::string& file) : file_(file) {}
  std::vector<SafetensorsEntry> entries;
  StringMap metadata;

  bool null() override { bad_value("null"); }
  bool boolean(bool) override { bad_value("a boolean"); }
  bool number_integer(number_integer_t) override { bad_value("a negative number"); }
  bool number_float(number_float_t, const string_t&) override { bad_value("a fraction"); }
  bool binary(binary_t&) override { bad_value("binary data"); }

  bool number_unsigned(number_unsigned_t value) override {
    if (!in_array_) bad_value("a number");
    if (field_ == "shape") {
      if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()))
        bad_value("a number above 2^63 - 1");
      entry_.shape.push_back(static_cast<int64_t>(value));
    } else {
      offsets_.push_back(value);
    }
    return true;
  }
  bool string(string_t& value) override {
    if (place_ == Place::metadata) {
      metadata[field_] = value;
      return true;
    }
    if (place_ != Place::tensor || field_ != "dtype") bad_value("a string");
    const auto word =
        std::find_if(kWords.begin(), kWords.end(), [&](const DTypeWord& w) { return w.word == value; });
    if (word == kWords.end()) {
      std::vector<std::string> allowed;
      for (const DTypeWord& w : kWords) allowed.emplace_back(w.word);
      fail("{}: tensor '{}': dtype '{}' is not supported; allowed: {}", file_, printable_name(name_),
           printable_name(value), join(allowed));
    }
    entry_.dtype = word->dtype;
    return true;
  }
  bool start_object(std::size_t) override {
    switch (place_) {
      case Place::outside:
        place_ = Place::top;
        return true;
      case Place::top:
        place_ = name_ == kMetadataKey ? Place::metadata : Place::tensor;
        entry_ = SafetensorsEntry{};
        offsets_.clear();
        fields_.clear();
        return true;
      default:
        bad_value("an object");
    }
  }
  bool end_object() override {
    if (place_ == Place::tensor) finish_tensor();
    place_ = place_ == Place::top ? Place::outside : Place::top;
    return true;
  }
  bool key(string_t& key) override {
    if (place_ == Place::top) {
      name_ = key;
      check(names_.insert(key).second, "{}: tensor '{}' appears twice in the header", file_,
            printable_name(key));
      return true;
    }
    field_ = key;
    const bool fresh = fields_.insert(key).second;
    check(fresh, "{}: '{}': key '{}' appears twice", file_, printable_name(name_), printable_name(key));
    check(place_ == Place::metadata || key == "dtype" || key == "shape" || key == "data_offsets",
          "{}: tensor '{}': unknown key '{}'; allowed: dtype, shape, data_offsets", file_,
          printable_name(name_), printable_name(key));
    return true;
  }
  bool start_array(std::size_t) override {
    if (place_ != Place::tensor || in_array_ || field_ == "dtype") bad_value("an array");
    in_array_ = true;
    return true;
  }
  bool end_array() override {
    in_array_ = false;
    return true;
  }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::json::exception&) override {
    fail("{}: the header is not valid JSON (near byte {})", file_, kLengthBytes + position);
  }

 private:
  enum class Place { outside, top, tensor, metadata };

  [[noreturn]] void bad_value(const char* what) const {
    if (place_ == Place::outside) fail("{}: the header must be a JSON object, not {}", file_, what);
    if (place_ == Place::top) fail("{}: '{}' must be an object, not {}", file_, printable_name(name_), what);
    if (place_ == Place::metadata) {
      fail("{}: metadata '{}' must be a string, not {}", file_, printable_name(field_), what);
    }
    fail("{}: tensor '{}': '{}' cannot hold {}", file_, printable_name(name_), field_, what);
  }
  void finish_tensor() {
    for (const char* field : {"dtype", "shape", "data_offsets"}) {
      check(fields_.contains(field), "{}: tensor '{}' has no '{}'", file_, printable_name(name_), field);
    }
    check(offsets_.size() == 2, "{}: tensor '{}': data_offsets must be two numbers, not {}", file_,
          printable_name(name_), offsets_.size());
    entry_.name = name_;
    entry_.begin = offsets_[0];
    entry_.end = offsets_[1];
    entries.push_back(std::move(entry_));
  }

  const std::string& file_;
  Place place_ = Place::outside;
  bool in_array_ = false;
  std::string name_, field_;
  SafetensorsEntry entry_;
  std::vector<uint64_t> offsets_;
  std::set<std::string> names_, fields_;
};

// Holds offsets to the shape, the file's size and each other: in order they must tile [0, data_size).
void validate_entries(const std::string& file, std::vector<SafetensorsEntry>& entries, uint64_t data_size) {
  for (const SafetensorsEntry& e : entries) {
    int64_t bytes = dtype_size(e.dtype);
    for (int64_t d : e.shape) {
      check(!__builtin_mul_overflow(bytes, d, &bytes), "{}: tensor '{}': shape {} does not fit 64 bits", file,
            printable_name(e.name), printable_name(shape_string(e.shape)));
    }
    check(e.begin <= e.end, "{}: tensor '{}': data_offsets [{}, {}) run backwards", file,
          printable_name(e.name), e.begin, e.end);
    check(e.end <= data_size,
          "{}: tensor '{}': data_offsets [{}, {}) lie beyond the file's {} bytes of data (truncated?)", file,
          printable_name(e.name), e.begin, e.end, data_size);
    check(e.end - e.begin == static_cast<uint64_t>(bytes),
          "{}: tensor '{}': {} bytes of data, but {} of shape {} needs {}", file, printable_name(e.name),
          e.end - e.begin, dtype_word(e.dtype), printable_name(shape_string(e.shape)), bytes);
  }
  std::stable_sort(entries.begin(), entries.end(), [](const SafetensorsEntry& a, const SafetensorsEntry& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  uint64_t position = 0;
  for (const SafetensorsEntry& e : entries) {
    check(e.begin >= position,
          "{}: tensor '{}': data_offsets [{}, {}) overlap another tensor's, which end at {}", file,
          printable_name(e.name), e.begin, e.end, position);
    check(e.begin == position, "{}: tensor '{}': {} unused bytes before its data at {}", file,
          printable_name(e.name), e.begin - position, e.begin);
    position = e.end;
  }
  check(position == data_size, "{}: {} bytes after the last tensor's data", file, data_size - position);
}

// ---- conversion ----------------------------------------------------------------------------------------

constexpr bool converts_as_float(DType d) {
  return d == DType::f64 || d == DType::f32 || d == DType::bf16 || d == DType::f16;
}
constexpr bool is_integer(DType d) { return d == DType::i64 || d == DType::i32 || d == DType::u8; }

template <class Fn>
void with_float_type(DType dtype, const Fn& fn) {
  switch (dtype) {
    case DType::f64:
      return fn(double{});
    case DType::f32:
      return fn(float{});
    case DType::bf16:
      return fn(bf16_t{});
    default:
      return fn(f16_t{});
  }
}

inline double widen(double x) { return x; }
inline float widen(float x) { return x; }
inline float widen(bf16_t x) { return to_float(x); }
inline float widen(f16_t x) { return to_float(x); }
template <class To, class Wide>
To narrow(Wide x) {
  if constexpr (std::is_same_v<To, bf16_t>)
    return to_bf16(static_cast<float>(x));
  else if constexpr (std::is_same_v<To, f16_t>)
    return to_f16(static_cast<float>(x));
  else
    return static_cast<To>(x);
}

void convert_floats(const char* source, DType from, const Tensor& target) {
  with_float_type(from, [&](auto from_tag) {
    with_float_type(target.dtype(), [&](auto to_tag) {
      using From = decltype(from_tag);
      using To = decltype(to_tag);
      parallel_for(target.numel(), int64_t{1} << 16, [&](int64_t begin, int64_t end) {
        To* out = target.as<To>();
        for (int64_t i = begin; i < end; ++i) {
          From value;  // the file promises no alignment
          std::memcpy(&value, source + i * static_cast<int64_t>(sizeof(From)), sizeof(From));
          out[i] = narrow<To>(widen(value));
        }
      });
    });
  });
}

int64_t load_integer(const char* source, DType dtype, int64_t i) {
  if (dtype == DType::u8) return static_cast<unsigned char>(source[i]);
  if (dtype == DType::i32) {
    int32_t value;
    std::memcpy(&value, source + i * 4, 4);
    return value;
  }
  int64_t value;
  std::memcpy(&value, source + i * 8, 8);
  return value;
}

void convert_integers(const std::string& where, const char* source, DType from, const Tensor& target) {
  for (int64_t i = 0; i < target.numel(); ++i) {
    const int64_t value = load_integer(source, from, i);
    if (target.dtype() == DType::i64) {
      target.as<int64_t>()[i] = value;
    } else if (target.dtype() == DType::i32) {
      check(value >= std::numeric_limits<int32_t>::min() && value <= std::numeric_limits<int32_t>::max(),
            "{}: element {} is {}, which does not fit i32", where, i, value);
      target.as<int32_t>()[i] = static_cast<int32_t>(value);
    } else {
      check(value >= 0 && value <= 255, "{}: element {} is {}, which does not fit u8", where, i, value);
      target.as<uint8_t>()[i] = static_cast<uint8_t>(value);
    }
  }
}

}  // namespace

std::string printable_name(std::string_view name) {
  constexpr size_t kLongest = 160;
  size_t length = std::min(name.size(), kLongest);
  const auto continues = [&](size_t i) { return (static_cast<unsigned char>(name[i]) & 0xC0) == 0x80; };
  while (length > 0 && length < name.size() && continues(length)) --length;  // no half of a UTF-8 sequence
  std::string out;
  for (char c : name.substr(0, length)) {
    const auto u = static_cast<unsigned char>(c);
    if (u < 0x20 || u == 0x7F) {
      out += fmt::format("\\x{:02x}", u);
    } else {
      out += c;
    }
  }
  return length < name.size() ? out + "..." : out;
}

// ---- reader --------------------------------------------------------------------------------------------

SafetensorsFile SafetensorsFile::open(const std::filesystem::path& path) {
  auto mapped = MappedFile::open(path);
  const std::string_view bytes = mapped->bytes();
  return parse(bytes, path.string(), std::move(mapped));
}

SafetensorsFile SafetensorsFile::parse(std::string_view bytes, std::string name,
                                       std::shared_ptr<const void> owner) {
  SafetensorsFile f;
  f.name_ = std::move(name);
  f.owner_ = std::move(owner);
  f.bytes_ = bytes;
  check(bytes.size() >= kLengthBytes, "{}: not a safetensors file: {} bytes, too short for a header", f.name_,
        bytes.size());
  uint64_t length = 0;
  for (size_t i = 0; i < kLengthBytes; ++i) {
    length |= static_cast<uint64_t>(static_cast<unsigned char>(bytes[i])) << (8 * i);
  }
  check(length <= kMaxHeader, "{}: not a safetensors file: header of {} bytes, at most {} allowed", f.name_,
        length, kMaxHeader);
  check(length <= bytes.size() - kLengthBytes, "{}: truncated: header of {} bytes in a file of {}", f.name_,
        length, bytes.size());
  const std::string_view header = bytes.substr(kLengthBytes, length);
  check(!header.empty() && header[0] == '{', "{}: not a safetensors file: the header must start with '{{'",
        f.name_);
  // The JSON parser takes a zero byte for the end of its input.
  check(header.find('\0') == std::string_view::npos, "{}: the header holds a zero byte", f.name_);

  HeaderReader reader(f.name_);
  nlohmann::json::sax_parse(header.begin(), header.end(), &reader);
  f.entries_ = std::move(reader.entries);
  f.metadata_ = std::move(reader.metadata);
  f.data_begin_ = kLengthBytes + length;
  validate_entries(f.name_, f.entries_, bytes.size() - f.data_begin_);
  for (size_t i = 0; i < f.entries_.size(); ++i) f.index_.emplace(f.entries_[i].name, i);
  return f;
}

const SafetensorsEntry& SafetensorsFile::entry(const std::string& tensor) const {
  const auto it = index_.find(tensor);
  if (it == index_.end()) {
    std::vector<std::string> names;
    for (const SafetensorsEntry& e : entries_) names.push_back(e.name);
    fail("{}: no tensor '{}'{}", name_, printable_name(tensor), printable_name(did_you_mean(tensor, names)));
  }
  return entries_[it->second];
}

std::string_view SafetensorsFile::bytes(const SafetensorsEntry& entry) const {
  return bytes_.substr(data_begin_ + entry.begin, entry.end - entry.begin);
}

std::string_view SafetensorsFile::header() const { return bytes_.substr(0, data_begin_); }

void SafetensorsFile::require(const std::vector<std::pair<std::string, Shape>>& expected) const {
  std::set<std::string_view> known;
  for (const auto& [tensor, shape] : expected) {
    known.insert(tensor);
    const SafetensorsEntry& e = entry(tensor);
    check(e.shape == shape, "{}: tensor '{}' has shape {}, expected {}", name_, printable_name(tensor),
          shape_string(e.shape), shape_string(shape));
  }
  for (const SafetensorsEntry& e : entries_) {
    check(known.contains(e.name), "{}: unexpected tensor '{}' {}", name_, printable_name(e.name),
          shape_string(e.shape));
  }
}

Tensor SafetensorsFile::load(const std::string& tensor) const {
  const SafetensorsEntry& e = entry(tensor);
  return load(tensor, e.shape, e.dtype);
}

Tensor SafetensorsFile::load(const std::string& tensor, const Shape& shape, DType dtype) const {
  const SafetensorsEntry& e = entry(tensor);
  // Before the allocation: a foreign shape must not become an out-of-memory error.
  check(e.shape == shape, "{}: tensor '{}' has shape {}, expected {}", name_, printable_name(tensor),
        shape_string(e.shape), shape_string(shape));
  Tensor t(host_arena(), shape, dtype);
  copy_to(tensor, t);
  return t;
}

void SafetensorsFile::copy_to(const std::string& tensor, const Tensor& target) const {
  const SafetensorsEntry& e = entry(tensor);
  const std::string where = fmt::format("{}: tensor '{}'", name_, printable_name(tensor));
  check(e.shape == target.shape(), "{} has shape {}, expected {}", where, shape_string(e.shape),
        shape_string(target.shape()));
  const std::string_view source = bytes(e);
  if (e.dtype == target.dtype()) {
    if (!source.empty()) std::memcpy(target.data(), source.data(), source.size());
  } else if (converts_as_float(e.dtype) && converts_as_float(target.dtype())) {
    convert_floats(source.data(), e.dtype, target);
  } else if (is_integer(e.dtype) && is_integer(target.dtype())) {
    convert_integers(where, source.data(), e.dtype, target);
  } else {
    fail("{} is {}, which does not convert to {}", where, dtype_word(e.dtype), dtype_name(target.dtype()));
  }
}

// ---- writer --------------------------------------------------------------------------------------------

namespace {

// A tensor of a device comes over piece by piece: a model need not fit host memory twice.
void write_bytes(const Tensor& tensor, const ByteSink& sink) {
  const auto* data = tensor.as<char>();
  const auto bytes = static_cast<size_t>(tensor.bytes());
  if (tensor.arena().host()) return sink(data, bytes);
  constexpr size_t kPiece = size_t{64} << 20;
  std::vector<char> piece(std::min(bytes, kPiece));
  for (size_t at = 0; at < bytes; at += kPiece) {
    const size_t n = std::min(kPiece, bytes - at);
    tensor.arena().read(data + at, piece.data(), n);
    sink(piece.data(), n);
  }
}

}  // namespace

std::vector<std::string> write_safetensors(const ByteSink& sink, const NamedTensors& tensors,
                                           const StringMap& metadata) {
  std::vector<size_t> order(tensors.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return dtype_size(tensors[a].second.dtype()) > dtype_size(tensors[b].second.dtype());
  });

  Json header = Json::object();
  if (!metadata.empty()) header[kMetadataKey] = metadata;
  std::set<std::string_view> names;
  int64_t position = 0;
  for (size_t i : order) {
    const auto& [name, tensor] = tensors[i];
    check(tensor.defined(), "cannot write tensor '{}': it holds nothing", printable_name(name));
    check(name != kMetadataKey, "cannot write a tensor named '{}': the format reserves that name", name);
    check(names.insert(name).second, "cannot write two tensors named '{}'", printable_name(name));
    const int64_t end = position + tensor.bytes();
    // Appending to the underlying vector: ordered_json's operator[] would search all earlier names each time.
    header.get_ref<Json::object_t&>().emplace_back(name, Json{{"dtype", dtype_word(tensor.dtype())},
                                                              {"shape", tensor.shape()},
                                                              {"data_offsets", {position, end}}});
    position = end;
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const Json::exception&) {
    fail("cannot write safetensors: a tensor name or metadata string is not valid UTF-8");
  }
  text.resize((text.size() + 7) / 8 * 8, ' ');  // keeps the data aligned
  check(text.size() <= kMaxHeader, "cannot write safetensors: a header of {} bytes, at most {} allowed",
        text.size(), kMaxHeader);
  std::string length(kLengthBytes, '\0');
  for (size_t i = 0; i < kLengthBytes; ++i) length[i] = static_cast<char>(text.size() >> (8 * i) & 0xFF);
  text = length + text;
  sink(text.data(), text.size());

  std::vector<std::string> pieces;
  for (size_t i : order) {
    const auto& [name, tensor] = tensors[i];
    if (tensor.bytes() == 0) continue;
    write_bytes(tensor, sink);
    pieces.push_back(name);
  }
  return pieces;
}

void write_safetensors(const std::filesystem::path& path, const NamedTensors& tensors,
                       const StringMap& metadata) {
  write_file_atomic(path, [&](const ByteSink& sink) { write_safetensors(sink, tensors, metadata); });
}

}  // namespace flexchat
