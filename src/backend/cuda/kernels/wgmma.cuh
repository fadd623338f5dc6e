// Products of a warpgroup (four warps) on Hopper's tensor cores: small wrappers over PTX (wgmma, mbarrier,
// setmaxnreg; sm_90a alone). Operands are read from shared memory by the tensor cores themselves, the left
// one from registers where a product is the left operand of the next.
//
// A tile in shared memory (Panels) is cut into panels of 64 columns, rows of 128 bytes whose 16-byte chunks
// are swizzled; it starts at a multiple of 1024 bytes. Accumulators c[n][4] and left operands in registers
// have the layout of mma.cuh: warp w of the group holds rows 16*w .. 16*w + 15.
//
// A product runs while its warps go on: what it reads and writes must not be touched until its group has been
// waited for (wgmma_wait), and registers are named to keep() then.
#pragma once
#include "mbarrier.cuh"

namespace flexchat::cuda {

template <int rows, int columns>
struct Panels {
  static constexpr int panel_bytes = rows * 128, bytes = panel_bytes * columns / 64;
  ATTENTION_DEVICE static unsigned chunk_offset(int row, int chunk) {
    return static_cast<unsigned>(chunk / 8 * panel_bytes + row * 128 + ((chunk ^ row) & 7) * 16);
  }
};

// A warp starts copies of `rows` rows of one head to rows row0, ... of panels of tile_rows rows, where row0
// is a multiple of 8; rows past `valid`, counted from row0, become zeros, unread. Each lane copies one chunk
// of every kRowsAtOnce-th row; `from` is its first one, as lane_start gives it for row 0 of batch row and
// head 0.
constexpr int kChunks = kHeadDim / 8, kRowsAtOnce = 32 / kChunks;
ATTENTION_DEVICE const char* lane_start(const AttentionView& view, int lane) {
  return static_cast<const char*>(view.data) + lane / kChunks * view.token * kElementBytes +
         lane % kChunks * 16;
}
template <int rows, int tile_rows, bool whole>
ATTENTION_DEVICE void copy_panels(unsigned to, const char* from, long long stride, int valid) {
#pragma unroll 2
  for (int group = 0; group < rows; group += 8) {
#pragma unroll
    for (int r = 0; r < 8; r += kRowsAtOnce) {  // the lane's row and r have no bit in common
      if (whole)
        copy_async((to ^ r * 16) + (group + r) * 128, from);
      else
        copy_async((to ^ r * 16) + (group + r) * 128, from, group + r < valid);
      from += stride;
    }
  }
}
template <int rows, int tile_rows>
ATTENTION_DEVICE void load_panels(unsigned tile, int row0, const char* from, long long token, int valid,
                                  int lane) {
  const unsigned to =
      tile + row0 * 128 + Panels<tile_rows, kHeadDim>::chunk_offset(lane / kChunks, lane % kChunks);
  const long long stride = kRowsAtOnce * token * kElementBytes;
  if (valid >= rows)
    copy_panels<rows, tile_rows, true>(to, from, stride, 0);
  else
    copy_panels<rows, tile_rows, false>(to, from, stride, valid - lane / kChunks);
}

// Describes an operand to the tensor core: groups of eight rows follow each other; panels do in
// `panel_bytes`, which matters where a transposed operand is wider than 64.
ATTENTION_DEVICE unsigned long long descriptor(unsigned address, int panel_bytes) {
  return (1ull << 62) | (1024ull >> 4 << 32) | (static_cast<unsigned long long>(panel_bytes) >> 4 << 16) |
         (address >> 4);
}

#if ATTENTION_DTYPE == 1
#define WGMMA(columns) "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32.bf16.bf16 "
#else
#define WGMMA(columns) "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32.f16.f16 "
#endif
#define WGMMA_16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define WGMMA_32 WGMMA_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define WGMMA_64                                                          \
  WGMMA_32                                                                \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48," \
  "%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define WGMMA_C1(k, n) k(c[n][0]), k(c[n][1]), k(c[n][2]), k(c[n][3])
#define WGMMA_C4(k, n) WGMMA_C1(k, n), WGMMA_C1(k, n + 1), WGMMA_C1(k, n + 2), WGMMA_C1(k, n + 3)
#define WGMMA_C8(k) WGMMA_C4(k, 0), WGMMA_C4(k, 4)
#define WGMMA_C16(k) WGMMA_C8(k), WGMMA_C4(k, 8), WGMMA_C4(k, 12)

// Several steps along k in one statement, since the compiler takes its time over statements with so many
// operands. x and y are descriptors.
#define WGMMA_STEPS(steps) "{ .reg .b64 x, y;\n" steps "}"
#define WGMMA_PAIR(columns, c, a, b, by_a, by_b, add, transposed)                                  \
  "add.s64 x, " a ", " by_a "; add.s64 y, " b ", " by_b ";\n" WGMMA(columns) "{" c "}, x, y, " add \
                                                                             ", 1, 1, " transposed ";\n"
#define WGMMA_ROWS_4(columns, c, a, b, by_a, by_b, add)           \
  WGMMA_PAIR(columns, c, a, b, by_a "+0", by_b "+0", add, "0, 0") \
  WGMMA_PAIR(columns, c, a, b, by_a "+2", by_b "+2", "1", "0, 0") \
  WGMMA_PAIR(columns, c, a, b, by_a "+4", by_b "+4", "1", "0, 0") \
  WGMMA_PAIR(columns, c, a, b, by_a "+6", by_b "+6", "1", "0, 0")
#define WGMMA_COLUMNS_8(columns, c, a, b)                 \
  WGMMA_PAIR(columns, c, a, b, "0", "0", "0", "1, 1")     \
  WGMMA_PAIR(columns, c, a, b, "128", "128", "1", "1, 1") \
  WGMMA_PAIR(columns, c, a, b, "256", "256", "1", "1, 1") \
  WGMMA_PAIR(columns, c, a, b, "384", "384", "1", "1, 1") \
  WGMMA_PAIR(columns, c, a, b, "512", "512", "1", "1, 1") \
  WGMMA_PAIR(columns, c, a, b, "640", "640", "1", "1, 1") \
  WGMMA_PAIR(columns, c, a, b, "768", "768", "1", "1, 1") \
  WGMMA_PAIR(columns, c, a, b, "896", "896", "1", "1, 1")
// c (64 x 64 or 128) = A B^T over the head dim, rows of both in panels that lie `a_panel` and `b_panel` bytes
// apart.
template <int a_panel, int b_panel>
ATTENTION_DEVICE void wgmma_rows(float (&c)[16][4], unsigned long long a, unsigned long long b) {
  if constexpr (kHeadDim == 128)
    asm volatile(WGMMA_STEPS(WGMMA_ROWS_4(128, WGMMA_64, "%64", "%65", "0", "0", "0")
                                 WGMMA_ROWS_4(128, WGMMA_64, "%64", "%65", "%66", "%67", "1"))
                 : WGMMA_C16("=f")
                 : "l"(a), "l"(b), "n"(a_panel / 16), "n"(b_panel / 16));
  else
    asm volatile(WGMMA_STEPS(WGMMA_ROWS_4(128, WGMMA_64, "%64", "%65", "0", "0", "0"))
                 : WGMMA_C16("=f")
                 : "l"(a), "l"(b));
}
template <int a_panel, int b_panel>
ATTENTION_DEVICE void wgmma_rows(float (&c)[8][4], unsigned long long a, unsigned long long b) {
  if constexpr (kHeadDim == 128)
    asm volatile(WGMMA_STEPS(WGMMA_ROWS_4(64, WGMMA_32, "%32", "%33", "0", "0", "0")
                                 WGMMA_ROWS_4(64, WGMMA_32, "%32", "%33", "%34", "%35", "1"))
                 : WGMMA_C8("=f")
                 : "l"(a), "l"(b), "n"(a_panel / 16), "n"(b_panel / 16));
  else
    asm volatile(WGMMA_STEPS(WGMMA_ROWS_4(64, WGMMA_32, "%32", "%33", "0", "0", "0"))
                 : WGMMA_C8("=f")
                 : "l"(a), "l"(b));
}
// c (64 x 32 or 64) = A^T B over 128 rows of both.
ATTENTION_DEVICE void wgmma_columns(float (&c)[4][4], unsigned long long a, unsigned long long b) {
  asm volatile(WGMMA_STEPS(WGMMA_COLUMNS_8(32, WGMMA_16, "%16", "%17")) : WGMMA_C4("=f", 0) : "l"(a), "l"(b));
}
ATTENTION_DEVICE void wgmma_columns(float (&c)[8][4], unsigned long long a, unsigned long long b) {
  asm volatile(WGMMA_STEPS(WGMMA_COLUMNS_8(64, WGMMA_32, "%32", "%33")) : WGMMA_C8("=f") : "l"(a), "l"(b));
}
#define WGMMA_ADD(columns, c, a0, a1, a2, a3, b, by) \
  "add.s64 y, " b ", " by ";\n" WGMMA(columns) "{" c "}, {" a0 "," a1 "," a2 "," a3 "}, y, 1, 1, 1, 1;\n"
#define WGMMA_A1(i) "r"(a[i].x[0]), "r"(a[i].x[1]), "r"(a[i].x[2]), "r"(a[i].x[3])
#define WGMMA_A4 WGMMA_A1(0), WGMMA_A1(1), WGMMA_A1(2), WGMMA_A1(3)
#define WGMMA_A8 \
  WGMMA_A1(0), WGMMA_A1(1), WGMMA_A1(2), WGMMA_A1(3), WGMMA_A1(4), WGMMA_A1(5), WGMMA_A1(6), WGMMA_A1(7)
// clang-format off
// c += A B, A (64 x 128) in registers, the rows of B (k) in shared memory.
ATTENTION_DEVICE void wgmma_add(float (&c)[16][4], const Quad (&a)[8], unsigned long long b) {
  asm volatile(
      WGMMA_STEPS(
          WGMMA_ADD(128, WGMMA_64, "%64", "%65", "%66", "%67", "%96", "0")
          WGMMA_ADD(128, WGMMA_64, "%68", "%69", "%70", "%71", "%96", "128")
          WGMMA_ADD(128, WGMMA_64, "%72", "%73", "%74", "%75", "%96", "256")
          WGMMA_ADD(128, WGMMA_64, "%76", "%77", "%78", "%79", "%96", "384")
          WGMMA_ADD(128, WGMMA_64, "%80", "%81", "%82", "%83", "%96", "512")
          WGMMA_ADD(128, WGMMA_64, "%84", "%85", "%86", "%87", "%96", "640")
          WGMMA_ADD(128, WGMMA_64, "%88", "%89", "%90", "%91", "%96", "768")
          WGMMA_ADD(128, WGMMA_64, "%92", "%93", "%94", "%95", "%96", "896"))
      : WGMMA_C16("+f")
      : WGMMA_A8, "l"(b));
}
ATTENTION_DEVICE void wgmma_add(float (&c)[8][4], const Quad (&a)[8], unsigned long long b) {
  asm volatile(
      WGMMA_STEPS(
          WGMMA_ADD(64, WGMMA_32, "%32", "%33", "%34", "%35", "%64", "0")
          WGMMA_ADD(64, WGMMA_32, "%36", "%37", "%38", "%39", "%64", "128")
          WGMMA_ADD(64, WGMMA_32, "%40", "%41", "%42", "%43", "%64", "256")
          WGMMA_ADD(64, WGMMA_32, "%44", "%45", "%46", "%47", "%64", "384")
          WGMMA_ADD(64, WGMMA_32, "%48", "%49", "%50", "%51", "%64", "512")
          WGMMA_ADD(64, WGMMA_32, "%52", "%53", "%54", "%55", "%64", "640")
          WGMMA_ADD(64, WGMMA_32, "%56", "%57", "%58", "%59", "%64", "768")
          WGMMA_ADD(64, WGMMA_32, "%60", "%61", "%62", "%63", "%64", "896"))
      : WGMMA_C8("+f")
      : WGMMA_A8, "l"(b));
}
// A is 64 x 64.
ATTENTION_DEVICE void wgmma_add(float (&c)[16][4], const Quad (&a)[4], unsigned long long b) {
  asm volatile(
      WGMMA_STEPS(
          WGMMA_ADD(128, WGMMA_64, "%64", "%65", "%66", "%67", "%80", "0")
          WGMMA_ADD(128, WGMMA_64, "%68", "%69", "%70", "%71", "%80", "128")
          WGMMA_ADD(128, WGMMA_64, "%72", "%73", "%74", "%75", "%80", "256")
          WGMMA_ADD(128, WGMMA_64, "%76", "%77", "%78", "%79", "%80", "384"))
      : WGMMA_C16("+f")
      : WGMMA_A4, "l"(b));
}
ATTENTION_DEVICE void wgmma_add(float (&c)[8][4], const Quad (&a)[4], unsigned long long b) {
  asm volatile(
      WGMMA_STEPS(
          WGMMA_ADD(64, WGMMA_32, "%32", "%33", "%34", "%35", "%48", "0")
          WGMMA_ADD(64, WGMMA_32, "%36", "%37", "%38", "%39", "%48", "128")
          WGMMA_ADD(64, WGMMA_32, "%40", "%41", "%42", "%43", "%48", "256")
          WGMMA_ADD(64, WGMMA_32, "%44", "%45", "%46", "%47", "%48", "384"))
      : WGMMA_C8("+f")
      : WGMMA_A4, "l"(b));
}
// clang-format on
#undef WGMMA_STEPS
#undef WGMMA_PAIR
#undef WGMMA_ROWS_4
#undef WGMMA_COLUMNS_8
#undef WGMMA_ADD
#undef WGMMA_A1
#undef WGMMA_A4
#undef WGMMA_A8
#undef WGMMA
#undef WGMMA_16
#undef WGMMA_32
#undef WGMMA_64
#undef WGMMA_C1
#undef WGMMA_C4
#undef WGMMA_C8
#undef WGMMA_C16

// An accumulator as the left operand of a product.
template <int n>
ATTENTION_DEVICE void round_to_operand(Quad (&to)[n / 2], const float (&x)[n][4]) {
#pragma unroll
  for (int k = 0; k < n / 2; ++k) to[k] = pack(x[2 * k], x[2 * k + 1]);
}

// Before the first product after other instructions wrote its registers.
ATTENTION_DEVICE void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Ends a group of products.
ATTENTION_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most `pending` of the latest groups still run.
template <int pending>
ATTENTION_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// Registers that a product has read or written up to here: the compiler may not move their uses across.
template <int n>
ATTENTION_DEVICE void keep(float (&c)[n][4]) {
#pragma unroll
  for (int i = 0; i < n; ++i)
    asm volatile("" : "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])::"memory");
}
template <int n>
ATTENTION_DEVICE void keep(Quad (&a)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i)
    asm volatile("" : "+r"(a[i].x[0]), "+r"(a[i].x[1]), "+r"(a[i].x[2]), "+r"(a[i].x[3])::"memory");
}

// What this thread wrote to shared memory becomes visible to the tensor cores (before a barrier).
ATTENTION_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The same of all memory, and back.
ATTENTION_DEVICE void fence_async_all() { asm volatile("fence.proxy.async;" ::: "memory"); }

// Shared memory to global memory, `bytes` of floats: instead of what is there if `first`, else added to it.
// One thread starts it; bulk_wait_read: what it has started has read shared memory; bulk_wait: and is done.
ATTENTION_DEVICE void bulk_add(float* to, unsigned from, int bytes, bool first) {
  if (first)
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from),
                 "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
                 "r"(from), "r"(bytes)
                 : "memory");
}
ATTENTION_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
ATTENTION_DEVICE void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
ATTENTION_DEVICE void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

ATTENTION_DEVICE void store_shared4(unsigned address, const float (&x)[4]) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(x[0]), "f"(x[1]), "f"(x[2]),
               "f"(x[3])
               : "memory");
}

// Registers go from warpgroups that need few to those that need many.
template <int registers>
ATTENTION_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
ATTENTION_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

}  // namespace flexchat::cuda
