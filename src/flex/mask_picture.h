// A block mask as a picture: full, partial and empty blocks, and each allowed element when there are few.
#pragma once

#include <string>

#include "flex/block_mask.h"

namespace flexchat::flex {

struct Picture {
  std::string title;     // shown above; normally the mask's text
  int64_t b = 0, h = 0;  // the batch row and head to draw
};

// A self-contained SVG document. Elements are drawn when the row has at most 256 x 256 of them.
std::string mask_svg(const Expr& expr, const Bindings& bindings, const Extent& extent, const BlockMask& mask,
                     const Picture& picture);

// One line of text per query block: '#' full, '+' partial, '.' empty.
std::string mask_text(const BlockMask& mask, int64_t b, int64_t h);

}  // namespace flexchat::flex
