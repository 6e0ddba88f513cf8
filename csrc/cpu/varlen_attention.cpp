// Causal attention over packed sequences on the CPU; kernels/varlen_attention.py defines it, varlen_attention.h has the
// algorithm of a block and its floor.
//
//     tree     a sequence without parent, and behind it its children, whose queries also see the parent's keys
//     item     a tree, a key head and, where there are few of these, one of `parts` shares of the blocks of queries
//
// A thread takes an item: it copies the keys and values of the tree once, in float32, for all query heads of the group,
// and the gradients of keys and values are summed beside them, block after block. With several parts each sums its own,
// and they are added in their order. What a part takes depends on shapes alone, so the bits do not depend on threads.
#include "varlen_attention.h"

#include "dtypes.h"
#include "panel.h"
#include "team.h"

namespace {

// A tensor (N, heads, d) with a contiguous last dimension.
struct View {
  uintptr_t data;
  int64_t token_stride, head_stride;

  template <class T>
  T* row(int64_t token, int64_t head) const {
    return ptr<T>(data) + token * token_stride + head * head_stride;
  }
};

struct VarlenArgs {
  View q, k, v, out, grad_out, dq, dk, dv;
  float *lse, *scratch, *partial;  // (heads, N); scratch_size for each thread; (parts, 2, kv_heads, N, padded)
  const int64_t *offsets, *order, *tree_starts;  // tree t: the sequences order[tree_starts[t]] and following
  int64_t scratch_size, N, heads, kv_heads, num_trees, parts;
  Shape shape;
  bool is_bf16;
  int threads;

  int64_t group_size() const { return heads / kv_heads; }
  int64_t begin(int64_t s) const { return offsets[s]; }
  int64_t length(int64_t s) const { return offsets[s + 1] - offsets[s]; }
  float* sums(int64_t part, int which, int64_t kv_head, int64_t token) const {
    return partial + (((part * 2 + which) * kv_heads + kv_head) * N + token) * shape.padded;
  }
};

template <int N>
struct HeadCount {
  static constexpr int value = N;
};

// An item's rows of its tree's tokens in scratch memory, and panels behind them.
struct Item {
  int64_t tree, kv_head, part, num_rows;
  float *k, *v, *dk, *dv, *panels;
};

// B query heads from `head` on, of one block.
template <class T, int B>
void attend_heads(const VarlenArgs& args, const Item& item, const Segment* segments, int num_segments,
                  const Block& block, int64_t token, int64_t head) {
  const Shape& shape = args.shape;
  const int64_t size = shape.narrow * B * W;
  const ForwardPanels panels = {item.panels, item.panels + size, item.panels + 2 * size};
  for (int b = 0; b < B; ++b)
    rows_to_panel(args.q.row<const T>(token, head + b), args.q.token_stride, block.count, shape.d, shape.query_factor(),
                  panels.q + b * W, B * W);
  f32 lse[B];
  if (shape.softcap > 0.f)
    attend_block<B, true>(segments, num_segments, block, shape, panels, lse);
  else
    attend_block<B, false>(segments, num_segments, block, shape, panels, lse);
  for (int b = 0; b < B; ++b) {
    panel_to_rows(panels.out + b * W, B * W, 1.f, block.count, shape.d, args.out.row<T>(token, head + b),
                  args.out.token_stride);
    if (args.lse) store_partial(args.lse + (head + b) * args.N + token, lse[b], block.count);
  }
}

template <class T, int B>
void differentiate_heads(const VarlenArgs& args, const Item& item, const Segment* segments, int num_segments,
                         const Block& block, int64_t token, int64_t head) {
  const Shape& shape = args.shape;
  const int64_t size = shape.narrow * B * W, rows_size = shape.padded * B * W;
  BackwardPanels panels;
  panels.q = item.panels;
  panels.grad_out = panels.q + size;
  panels.dq = panels.grad_out + size;
  panels.q_rows = panels.dq + size;
  panels.grad_rows = panels.q_rows + rows_size;
  panels.p = panels.grad_rows + rows_size;
  panels.ds = panels.p + (item.num_rows + ROWS) * B * W;
  panels.cap_grad = panels.ds + (item.num_rows + ROWS) * B * W;
  memset(panels.q_rows, 0, 2 * rows_size * sizeof(float));
  f32 lse[B];
  for (int b = 0; b < B; ++b) {
    const T* const q = args.q.row<const T>(token, head + b);
    const T* const grad = args.grad_out.row<const T>(token, head + b);
    const int64_t q_stride = args.q.token_stride, grad_stride = args.grad_out.token_stride;
    rows_to_panel(q, q_stride, block.count, shape.d, shape.query_factor(), panels.q + b * W, B * W);
    rows_to_panel(grad, grad_stride, block.count, shape.d, 1.f, panels.grad_out + b * W, B * W);
    for (int i = 0; i < block.count; ++i) {
      copy_row(q + i * q_stride, shape.d, panels.q_rows + (b * W + i) * shape.padded);
      copy_row(grad + i * grad_stride, shape.d, panels.grad_rows + (b * W + i) * shape.padded);
    }
    lse[b] = load_partial(args.lse + (head + b) * args.N + token, block.count, 0.f);
  }
  if (shape.softcap > 0.f)
    differentiate_block<B, true>(segments, num_segments, block, shape, panels, lse);
  else
    differentiate_block<B, false>(segments, num_segments, block, shape, panels, lse);
  for (int b = 0; b < B; ++b)
    panel_to_rows(panels.dq + b * W, B * W, shape.scale, block.count, shape.d, args.dq.row<T>(token, head + b),
                  args.dq.token_stride);
}

// Rows of one sequence from or to an item's rows.
template <class T>
void copy_rows(const View& from, int64_t token, int64_t head, int64_t n, const Shape& shape, float* to) {
  for (int64_t i = 0; i < n; ++i) copy_row(from.row<const T>(token + i, head), shape.d, to + i * shape.narrow);
}
template <class T>
void write_rows(const float* from, int64_t padded, float factor, int64_t n, int64_t d, const View& to, int64_t token,
                int64_t head) {
  for (int64_t i = 0; i < n; ++i) {
    const float* const row = from + i * padded;
    T* const y = to.row<T>(token + i, head);
    int64_t c = 0;
    for (; c + 4 <= d; c += 4) store_four(y + c, load_four(row + c) * factor);
    for (; c < d; ++c) store_partial(y + c, splat(row[c] * factor), 1);
  }
}

template <class T, bool BACKWARD>
void run_item(const VarlenArgs& args, int64_t index, float* scratch) {
  const Shape& shape = args.shape;
  const int64_t tree = index / (args.kv_heads * args.parts), kv_head = index / args.parts % args.kv_heads;
  const int64_t part = index % args.parts, G = args.group_size();
  const int64_t *const first = args.order + args.tree_starts[tree], *const last =
                                                                        args.order + args.tree_starts[tree + 1];
  int64_t num_rows = ROWS;  // a register tile may read beyond the last key
  for (const int64_t* s = first; s != last; ++s) num_rows += args.length(*s);
  Item item = {tree, kv_head, part, num_rows, scratch, scratch + num_rows * shape.narrow, nullptr, nullptr, nullptr};
  item.panels = item.v + num_rows * shape.narrow;
  if (BACKWARD) {
    item.dk = item.panels;
    item.dv = item.dk + num_rows * shape.padded;
    item.panels = item.dv + num_rows * shape.padded;
    memset(item.dk, 0, 2 * num_rows * shape.padded * sizeof(float));
  }
  int64_t row = 0;
  for (const int64_t* s = first; s != last; row += args.length(*s++)) {
    copy_rows<T>(args.k, args.begin(*s), kv_head, args.length(*s), shape, item.k + row * shape.narrow);
    copy_rows<T>(args.v, args.begin(*s), kv_head, args.length(*s), shape, item.v + row * shape.narrow);
  }
  const auto segment = [&](int64_t row, int begin, int64_t length) {
    return Segment{begin,
                   begin + (int)length,
                   item.k + row * shape.narrow,
                   item.v + row * shape.narrow,
                   BACKWARD ? item.dk + row * shape.padded : nullptr,
                   BACKWARD ? item.dv + row * shape.padded : nullptr};
  };
  int64_t block_index = 0;
  row = 0;
  for (const int64_t* s = first; s != last; row += args.length(*s++)) {
    const int64_t length = args.length(*s), parent_length = s == first ? 0 : args.length(*first);
    const Segment segments[2] = {segment(row, (int)parent_length, length), segment(0, 0, parent_length)};
    const int num_segments = parent_length ? 2 : 1;
    for (int64_t i = 0; i < length; i += W) {
      if (block_index++ % args.parts != part) continue;
      const Block block((int)(parent_length + i), (int)min<int64_t>(W, length - i), shape.window);
      const int64_t token = args.begin(*s) + i;
      for (int64_t g = 0; g < G;) {
        const int64_t head = kv_head * G + g, left = G - g;
        const auto run = [&](auto heads) {
          constexpr int B = decltype(heads)::value;
          if constexpr (BACKWARD)
            differentiate_heads<T, B>(args, item, segments, num_segments, block, token, head);
          else
            attend_heads<T, B>(args, item, segments, num_segments, block, token, head);
          g += B;
        };
        if (left == 1)
          run(HeadCount<1>());
        else if (left == 2 || left == 4)
          run(HeadCount<2>());
        else
          run(HeadCount<3>());
      }
    }
  }
  if (!BACKWARD) return;
  row = 0;
  for (const int64_t* s = first; s != last; row += args.length(*s++)) {
    const int64_t token = args.begin(*s), n = args.length(*s);
    const float *const dk = item.dk + row * shape.padded, *const dv = item.dv + row * shape.padded;
    if (args.parts > 1) {
      memcpy(args.sums(part, 0, kv_head, token), dk, n * shape.padded * sizeof(float));
      memcpy(args.sums(part, 1, kv_head, token), dv, n * shape.padded * sizeof(float));
    } else {
      write_rows<T>(dk, shape.padded, shape.scale, n, shape.d, args.dk, token, kv_head);
      write_rows<T>(dv, shape.padded, 1.f, n, shape.d, args.dv, token, kv_head);
    }
  }
}

// Adds the parts' gradients of keys and values, token by token, in the order of the parts.
template <class T>
void add_parts(const VarlenArgs& args) {
#pragma omp parallel for num_threads(args.threads) if (args.threads > 1)
  for (int64_t i = 0; i < args.kv_heads * args.N; ++i) {
    const int64_t kv_head = i / args.N, token = i % args.N;
    for (int which = 0; which < 2; ++which) {
      float* const sum = args.sums(0, which, kv_head, token);
      for (int64_t part = 1; part < args.parts; ++part) {
        const float* const other = args.sums(part, which, kv_head, token);
        for (int64_t c = 0; c < args.shape.padded; ++c) sum[c] += other[c];
      }
      write_rows<T>(sum, 0, which ? 1.f : args.shape.scale, 1, args.shape.d, which ? args.dv : args.dk, token, kv_head);
    }
  }
}

template <class T, bool BACKWARD>
void run_items(const VarlenArgs& args) {
  parallel_items(args.threads, args.num_trees * args.kv_heads * args.parts, [&](int64_t i, int thread) {
    run_item<T, BACKWARD>(args, i, args.scratch + thread * args.scratch_size);
  });
  if (BACKWARD && args.parts > 1) add_parts<T>(args);
}

View dense(uintptr_t data, int64_t heads, int64_t d) { return {data, heads * d, d}; }

VarlenArgs make_args(uintptr_t q, int64_t q_token, int64_t q_head, uintptr_t k, int64_t k_token, int64_t k_head,
                     uintptr_t v, int64_t v_token, int64_t v_head, bool is_bf16, uintptr_t lse, uintptr_t offsets,
                     uintptr_t order, uintptr_t tree_starts, uintptr_t scratch, int64_t scratch_size, int64_t num_trees,
                     int64_t parts, int64_t N, int64_t heads, int64_t kv_heads, int64_t d, float scale, int64_t window,
                     float softcap, int threads) {
  VarlenArgs args = {};
  args.q = {q, q_token, q_head};
  args.k = {k, k_token, k_head};
  args.v = {v, v_token, v_head};
  args.is_bf16 = is_bf16;
  args.lse = ptr<float>(lse);
  args.offsets = ptr<const int64_t>(offsets);
  args.order = ptr<const int64_t>(order);
  args.tree_starts = ptr<const int64_t>(tree_starts);
  args.scratch = ptr<float>(scratch);
  args.scratch_size = scratch_size;
  args.num_trees = num_trees;
  args.parts = parts;
  args.N = N;
  args.heads = heads;
  args.kv_heads = kv_heads;
  const int64_t vector = max(W, ROWS);
  args.shape = {d,
                (d + ROWS - 1) / ROWS * ROWS,
                (d + vector - 1) / vector * vector,
                scale,
                softcap,
                window > 0 && window < MAX_WINDOW ? (int)window : MAX_WINDOW};
  args.threads = threads;
  return args;
}

void varlen_attention(uintptr_t out, uintptr_t q, int64_t q_token, int64_t q_head, uintptr_t k, int64_t k_token,
                      int64_t k_head, uintptr_t v, int64_t v_token, int64_t v_head, bool is_bf16, uintptr_t lse,
                      uintptr_t offsets, uintptr_t order, uintptr_t tree_starts, uintptr_t scratch,
                      int64_t scratch_size, int64_t num_trees, int64_t parts, int64_t N, int64_t heads,
                      int64_t kv_heads, int64_t d, float scale, int64_t window, float softcap, int threads) {
  VarlenArgs args =
      make_args(q, q_token, q_head, k, k_token, k_head, v, v_token, v_head, is_bf16, lse, offsets, order, tree_starts,
                scratch, scratch_size, num_trees, parts, N, heads, kv_heads, d, scale, window, softcap, threads);
  args.out = dense(out, heads, d);
  is_bf16 ? run_items<bf16, false>(args) : run_items<float, false>(args);
}

// grad_out is dense; grads: (N, heads + 2 * kv_heads, d), those of q, k and v; partial: the parts' sums, or null for
// one part.
void varlen_attention_backward(uintptr_t grad_out, uintptr_t grads, uintptr_t partial, uintptr_t q, int64_t q_token,
                               int64_t q_head, uintptr_t k, int64_t k_token, int64_t k_head, uintptr_t v,
                               int64_t v_token, int64_t v_head, bool is_bf16, uintptr_t lse, uintptr_t offsets,
                               uintptr_t order, uintptr_t tree_starts, uintptr_t scratch, int64_t scratch_size,
                               int64_t num_trees, int64_t parts, int64_t N, int64_t heads, int64_t kv_heads, int64_t d,
                               float scale, int64_t window, float softcap, int threads) {
  VarlenArgs args =
      make_args(q, q_token, q_head, k, k_token, k_head, v, v_token, v_head, is_bf16, lse, offsets, order, tree_starts,
                scratch, scratch_size, num_trees, parts, N, heads, kv_heads, d, scale, window, softcap, threads);
  args.grad_out = dense(grad_out, heads, d);
  const auto part = [&](int64_t first_head) {
    return View{grads + first_head * d * (is_bf16 ? sizeof(bf16) : sizeof(float)), (heads + 2 * kv_heads) * d, d};
  };
  args.dq = part(0);
  args.dk = part(heads);
  args.dv = part(heads + kv_heads);
  args.partial = ptr<float>(partial);
  is_bf16 ? run_items<bf16, true>(args) : run_items<float, true>(args);
}

CONSTANT(varlen_attention_tile, TILE_KEYS)
CONSTANT(varlen_attention_heads, MAX_HEADS)
CONSTANT(varlen_attention_rows, ROWS)
KERNEL(varlen_attention)
KERNEL(varlen_attention_backward)

}  // namespace
