// Captured tensors written as text, for the command line: "doc[b,pos]=0*100,1*60,2*96".
#pragma once

#include <string>

#include "flex/bindings.h"
#include "flex/block_mask.h"

namespace flexchat::flex {

// Declares the tensor and binds its values. Axes b and h have the extent's sizes, q and kv the number of
// positions queries and keys reach, pos the larger of the two; one axis `any` takes what the values leave.
// "x*n" repeats x n times. Whole numbers make an integer tensor, others a number tensor. Errors: bad syntax,
// a number of values that does not fit the axes.
Capture bind_tensor_text(const std::string& text, const Extent& extent, Bindings& bindings);

}  // namespace flexchat::flex
