// Captured tensors by name.
#include "flex/bindings.h"

#include "base/error.h"
#include "base/strings.h"

namespace flexchat::flex {

Bindings& Bindings::set(const std::string& name, Tensor values) {
  check(values.defined(), "captured tensor '{}' is bound to nothing", name);
  tensors_.insert_or_assign(name, std::move(values));
  return *this;
}

const Tensor& Bindings::at(const Capture& capture) const {
  const auto found = tensors_.find(capture.name());
  if (found == tensors_.end()) {
    std::vector<std::string> bound;
    for (const auto& [name, tensor] : tensors_) bound.push_back(name);
    fail("captured tensor {} has no values; bound are: {}", capture.signature(),
         bound.empty() ? "none" : join(bound));
  }
  const Tensor& tensor = found->second;
  check(tensor.rank() == static_cast<int>(capture.axes().size()),
        "captured tensor {} needs {} axes, but its values have {}", capture.signature(),
        capture.axes().size(), tensor.rank());
  check(is_float(tensor.dtype()) == (capture.type() == Type::number),
        "captured tensor {} holds {}s, but its values are {}", capture.signature(), type_name(capture.type()),
        dtype_name(tensor.dtype()));
  return tensor;
}

}  // namespace flexchat::flex
