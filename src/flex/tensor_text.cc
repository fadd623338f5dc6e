// NAME[AXES]=VALUES
#include "flex/tensor_text.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "base/error.h"
#include "base/strings.h"
#include "flex/parse.h"

namespace flexchat::flex {
namespace {

constexpr int64_t max_values = int64_t{1} << 28;

template <class T>
T read(std::string_view word, const std::string& text) {
  T value{};
  const auto [stop, code] = std::from_chars(word.data(), word.data() + word.size(), value);
  check(code == std::errc() && stop == word.data() + word.size(),
        "'{}' in '{}' is not a number; write VALUE or VALUE*COUNT", word,
        text.size() > 60 ? text.substr(0, 57) + "..." : text);
  return value;
}

std::vector<double> read_values(std::string_view list, const std::string& text) {
  std::vector<double> values;
  while (true) {
    const size_t comma = list.find(',');
    const std::string_view item = list.substr(0, comma);
    const size_t star = item.find('*');
    const auto value = read<double>(item.substr(0, star), text);
    const int64_t count = star == std::string_view::npos ? 1 : read<int64_t>(item.substr(star + 1), text);
    check(count >= 0 && count <= max_values - static_cast<int64_t>(values.size()),
          "'{}' repeats too often; a tensor may have {} values", item, max_values);
    values.insert(values.end(), static_cast<size_t>(count), value);
    if (comma == std::string_view::npos) return values;
    list.remove_prefix(comma + 1);
  }
}

Shape shape_of(const std::vector<Axis>& axes, const Extent& extent, int64_t n_values) {
  int64_t q_end = 0, kv_end = 0, known = 1, n_any = 0;
  for (int64_t b = 0; b < extent.n_batch; ++b) {
    q_end = std::max(q_end, extent.q_offset(b) + extent.q_len(b));
    kv_end = std::max(kv_end, extent.kv_len(b));
  }
  std::vector<int64_t> sizes;
  for (const Axis axis : axes) {
    const int64_t size = axis == Axis::b    ? extent.n_batch
                         : axis == Axis::h  ? extent.n_head
                         : axis == Axis::q  ? q_end
                         : axis == Axis::kv ? kv_end
                                            : std::max(q_end, kv_end);
    sizes.push_back(axis == Axis::any ? -1 : size);
    n_any += axis == Axis::any;
    if (axis != Axis::any) known *= size;
  }
  check(n_any <= 1, "only one axis of a tensor on the command line may be 'any'");
  for (int64_t& size : sizes) {
    if (size == -1) size = known == 0 ? 0 : n_values / known;
  }
  return Shape(sizes.begin(), sizes.end());
}

}  // namespace

Capture bind_tensor_text(const std::string& text, const Extent& extent, Bindings& bindings) {
  const size_t equals = text.find('=');
  check(equals != std::string::npos, "tensor '{}': write NAME[AXES]=VALUES, as in doc[b,pos]=0*100,1*60",
        text);
  const std::vector<double> values = read_values(std::string_view(text).substr(equals + 1), text);
  const bool integer = std::all_of(values.begin(), values.end(),
                                   [](double x) { return std::abs(x) <= 2147483647 && x == std::floor(x); });
  Capture capture = parse_capture(text.substr(0, equals), integer ? Type::integer : Type::number);
  const Shape shape = shape_of(capture.axes(), extent, static_cast<int64_t>(values.size()));
  int64_t wanted = 1;
  std::vector<std::string> sizes;
  for (const int64_t size : shape) {
    wanted *= size;
    sizes.push_back(std::to_string(size));
  }
  check(wanted == static_cast<int64_t>(values.size()), "tensor {} is {} = {} values here, not {}",
        capture.signature(), join(sizes, " x "), wanted, values.size());
  bindings.set(capture.name(), Tensor::from<double>(values, shape, integer ? DType::i32 : DType::f64));
  return capture;
}

}  // namespace flexchat::flex
