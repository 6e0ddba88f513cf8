// One forward pass of a decoder over N packed tokens, in one call: embedding, layers, final norm. It serves prefill and
// decode alike; rollout/architectures.py says which tensors of which architecture go where.
//
// Activations are float32. A layer is a few phases with a barrier between them; within a phase the threads share blocks
// of a product's columns, or rows. All keys and values of a block of tokens are written before any of them attends,
// so tokens of one sequence may stand together. Every number of a token depends on its own sequence alone: products,
// norms and attention have one order of summation, whatever the other tokens, the blocks and the threads.
//
// Floor: all weights once from memory a block of ROWS tokens, and the keys and values that are attended to; or the
// products' 2 N weights operations.
#include "activation.h"
#include "kernel.h"
#include "norm.h"
#include "paged_attention.h"
#include "product.h"
#include "rope.h"
#include "team.h"

namespace {

constexpr int64_t ROWS = 64;   // tokens that pass through the layers together
constexpr int64_t BLOCK = 64;  // columns of a product that a thread computes at a time

// These three mirror the ctypes structures of rollout/compiled_step.py.
struct Norm {
  const void* weight;  // null: there is no norm here
  const void* bias;
  int32_t is_bf16, centered;  // centered: LayerNorm, else RMSNorm
  float eps, padding;
};

struct Layer {
  Norm before_attention, before_mlp, query, key;  // the last two over each head
  Matrix qkv[3];                                  // their results side by side; absent ones have out = 0
  Matrix out, gate, up, down;                     // gate.out = 0: down(act(up)), else down(act(gate) * up)
  void *k_cache, *v_cache;                        // (pages, kv_heads, P, head_dim)
  int64_t window;                                 // keys that a token sees, itself included; 0 = all
  int32_t rotary;                                 // rotated dimensions of this layer
  float scale;                                    // of the scores
};

struct Decoder {
  int64_t layers, D, F, vocabulary, heads, kv_heads, head_dim, page;
  int64_t q_at, k_at, v_at, q_step, kv_step;  // where head h lies in the row of qkv: q_at + h q_step, ...
  const Layer* layer;
  const void *embedding, *position_embedding;  // (vocabulary, D); (positions, D) or null
  const float *cos, *sin;                      // (positions, rotary / 2) or null
  Norm last;
  int32_t activation;  // 0 SiLU, 1 GELU, 2 GELU by tanh
  int32_t parallel;    // attention and MLP read the same input
  int32_t embedding_is_bf16, cache_is_bf16;
};

struct Tokens {
  int64_t N, wanted_count, table_width;
  const int64_t* ids;
  const int32_t *positions, *slots, *table;
  const int64_t* wanted;
  float* hidden;
};

// What the threads share, for a block of tokens.
struct Scratch {
  float *x, *normed, *second, *qkv, *attended, *inner, *panels;
  uint16_t *normed_half, *second_half, *attended_half, *inner_half;  // null where nothing multiplies in bfloat16
  int64_t panel, qkv_width, inner_width, attended_width;
};

INLINE void normalise(const Norm& norm, const float* x, int64_t D, float* y) {
  const auto apply = [&](auto* w) {
    using T = decltype(w);
    if (norm.centered)
      layer_norm_row(x, w, (T)norm.bias, norm.eps, D, y);
    else
      rms_norm_row(x, w, 0.f, norm.eps, D, y);
  };
  norm.is_bf16 ? apply((const bf16*)norm.weight) : apply((const float*)norm.weight);
}

INLINE float element(const void* p, int64_t i, bool is_bf16) {
  return is_bf16 ? to_float(((const bf16*)p)[i]) : ((const float*)p)[i];
}

void embed(const Decoder& model, const Tokens& t, int64_t n, float* x) {
  const bool is_bf16 = model.embedding_is_bf16;
  for (int64_t i = 0; i < model.D; ++i) x[i] = element(model.embedding, t.ids[n] * model.D + i, is_bf16);
  if (!model.position_embedding) return;
  for (int64_t i = 0; i < model.D; ++i)
    x[i] += element(model.position_embedding, t.positions[n] * model.D + i, is_bf16);
}

void norm_row(const Norm& norm, const Scratch& s, int64_t r, int64_t D, float* out, uint16_t* half) {
  normalise(norm, s.x + r * D, D, out + r * D);
  if (half) round_row(out + r * D, D, half + r * D);
}

// Blocks of columns, few enough that their cost is small and many enough that no thread waits long for the others.
INLINE int64_t block_of(int64_t columns, const Team& team) {
  return min(BLOCK, max<int64_t>(8, columns / (4 * team.size) / 8 * 8));
}
INLINE int64_t blocks_of(int64_t columns, int64_t block) { return (columns + block - 1) / block; }

// to = X W' + b, or to += where `adds`: every row's columns of one block of a matrix.
template <class Dot>
void project_block(const Activations& x, const Matrix& m, int64_t begin, int64_t block, float* to, int64_t stride,
                   bool adds, float* panel) {
  float tile[ROWS * BLOCK];
  const int64_t n = min(block, m.out - begin);
  multiply<Dot>(x, m, begin, begin + n, tile, BLOCK, panel);
  for (int64_t r = 0; r < x.rows; ++r) {
    float *const from = tile + r * BLOCK, *const into = to + r * stride + begin;
    add_bias(m, begin, n, from);
    for (int64_t c = 0; c < n; ++c) into[c] = adds ? into[c] + from[c] : from[c];
  }
}

template <class Dot>
void project(const Activations& x, const Matrix& m, float* to, int64_t stride, float* panel, const Team& team) {
  const int64_t block = block_of(m.out, team);
  share(team, blocks_of(m.out, block),
        [&](int64_t i) { project_block<Dot>(x, m, i * block, block, to, stride, true, panel); });
}

// One to three matrices, their results side by side.
template <class Dot>
void project_qkv(const Layer& layer, const Activations& x, const Scratch& s, float* panel, const Team& team) {
  const int64_t block = block_of(s.qkv_width, team);
  int64_t count = 0;
  for (const Matrix& m : layer.qkv) count += blocks_of(m.out, block);
  share(team, count, [&](int64_t i) {
    int64_t at = 0;
    for (const Matrix& m : layer.qkv) {
      const int64_t mine = blocks_of(m.out, block);
      if (i < mine) return project_block<Dot>(x, m, i * block, block, s.qkv + at, s.qkv_width, false, panel);
      i -= mine, at += m.out;
    }
  });
}

INLINE f32 activate(int32_t kind, f32 x) { return kind == 0 ? silu(x) : kind == 1 ? gelu(x) : gelu_tanh(x); }

// inner = act(gate) * up, or act(up).
template <class Dot>
void project_inner(const Decoder& model, const Layer& layer, const Activations& x, const Scratch& s, float* panel,
                   const Team& team) {
  const int64_t block = block_of(layer.up.out, team);
  const bool gated = layer.gate.out;
  share(team, blocks_of(layer.up.out, block), [&](int64_t i) {
    float gates[ROWS * BLOCK], ups[ROWS * BLOCK];
    const int64_t begin = i * block, n = min(block, layer.up.out - begin);
    if (gated) multiply<Dot>(x, layer.gate, begin, begin + n, gates, BLOCK, panel);
    multiply<Dot>(x, layer.up, begin, begin + n, ups, BLOCK, panel);
    for (int64_t r = 0; r < x.rows; ++r) {
      float *const up = ups + r * BLOCK, *const gate = gates + r * BLOCK;
      add_bias(layer.up, begin, n, up);
      if (gated) add_bias(layer.gate, begin, n, gate);
      float* const into = s.inner + r * s.inner_width + begin;
      for (int64_t c = 0; c < n; c += W) {
        const int left = (int)min<int64_t>(W, n - c);
        const f32 u = load_part(up + c, left, 0.f);
        const f32 y =
            gated ? activate(model.activation, load_part(gate + c, left, 0.f)) * u : activate(model.activation, u);
        store_part(into + c, y, left);
      }
      if (s.inner_half) round_row(into, n, s.inner_half + r * s.inner_width + begin);
    }
  });
}

// Norms and rotates the heads of query and key, and writes key and value to their page.
template <class KV>
void store_row(const Decoder& model, const Layer& layer, const Tokens& t, int64_t n, float* qkv) {
  const int64_t d = model.head_dim, position = t.positions[n], half = layer.rotary / 2;
  const float *const cos = model.cos + position * half, *const sin = model.sin + position * half;
  const int64_t page = t.table[t.slots[n] * t.table_width + position / model.page];
  const int64_t offset = position % model.page;
  for (int64_t h = 0; h < model.heads; ++h) {
    float* const q = qkv + model.q_at + h * model.q_step;
    if (layer.query.weight) normalise(layer.query, q, d, q);
    if (half) rotate(q, cos, sin, half);
  }
  for (int64_t h = 0; h < model.kv_heads; ++h) {
    float* const k = qkv + model.k_at + h * model.kv_step;
    const float* const v = qkv + model.v_at + h * model.kv_step;
    if (layer.key.weight) normalise(layer.key, k, d, k);
    if (half) rotate(k, cos, sin, half);
    const int64_t at = ((page * model.kv_heads + h) * model.page + offset) * d;
    for (int64_t i = 0; i < d; i += W) {
      const int left = (int)min<int64_t>(W, d - i);
      store_part((KV*)layer.k_cache + at + i, load_part(k + i, left, 0.f), left);
      store_part((KV*)layer.v_cache + at + i, load_part(v + i, left, 0.f), left);
    }
  }
}

template <class KV>
void attend_row(const Decoder& model, const Layer& layer, const Tokens& t, int64_t n, int64_t h, const float* qkv,
                float* out, float* scratch) {
  const int64_t G = model.heads / model.kv_heads, d = model.head_dim, end = (int64_t)t.positions[n] + 1;
  const int64_t begin = layer.window ? max<int64_t>(0, end - layer.window) : 0;
  const Keys<KV> keys = {(const KV*)layer.k_cache,
                         (const KV*)layer.v_cache,
                         t.table + t.slots[n] * t.table_width,
                         h,
                         model.kv_heads,
                         model.page,
                         d,
                         d};
  attend_all(qkv + model.q_at + h * G * model.q_step, model.q_step, G, keys, begin, end, layer.scale, 0.f,
             out + h * G * d, d, scratch);
}

template <class KV>
void attention(const Decoder& model, const Layer& layer, const Tokens& t, int64_t first, int64_t rows, const Scratch& s,
               float* panel, const Team& team) {
  share(team, rows, [&](int64_t r) { store_row<KV>(model, layer, t, first + r, s.qkv + r * s.qkv_width); });
  barrier(team);
  const int64_t width = model.heads / model.kv_heads * model.head_dim;
  share(team, rows * model.kv_heads, [&](int64_t unit) {
    const int64_t r = unit / model.kv_heads, h = unit % model.kv_heads;
    float* const out = s.attended + r * s.attended_width;
    attend_row<KV>(model, layer, t, first + r, h, s.qkv + r * s.qkv_width, out, panel);
    if (s.attended_half) round_row(out + h * width, width, s.attended_half + r * s.attended_width + h * width);
  });
  barrier(team);
}

// One layer over `rows` tokens from `first` on; every thread of the team calls it.
template <class Dot>
void run_layer(const Decoder& model, const Layer& layer, const Tokens& t, int64_t first, int64_t rows, const Scratch& s,
               float* panel, const Team& team) {
  const int64_t D = model.D;
  share(team, rows, [&](int64_t r) {
    norm_row(layer.before_attention, s, r, D, s.normed, s.normed_half);
    if (model.parallel) norm_row(layer.before_mlp, s, r, D, s.second, s.second_half);
  });
  barrier(team);
  project_qkv<Dot>(layer, {s.normed, s.normed_half, D, rows}, s, panel, team);
  barrier(team);
  if (model.cache_is_bf16)
    attention<bf16>(model, layer, t, first, rows, s, panel, team);
  else
    attention<float>(model, layer, t, first, rows, s, panel, team);
  project<Dot>({s.attended, s.attended_half, s.attended_width, rows}, layer.out, s.x, D, panel, team);
  barrier(team);
  if (!model.parallel) {
    share(team, rows, [&](int64_t r) { norm_row(layer.before_mlp, s, r, D, s.second, s.second_half); });
    barrier(team);
  }
  project_inner<Dot>(model, layer, {s.second, s.second_half, D, rows}, s, panel, team);
  barrier(team);
  project<Dot>({s.inner, s.inner_half, s.inner_width, rows}, layer.down, s.x, D, panel, team);
  barrier(team);
}

// The last norm of the wanted tokens among [first, first + rows).
void finish(const Decoder& model, const Tokens& t, int64_t first, int64_t rows, const Scratch& s, const Team& team) {
  share(team, t.wanted_count, [&](int64_t i) {
    if (t.wanted[i] >= first && t.wanted[i] < first + rows)
      normalise(model.last, s.x + (t.wanted[i] - first) * model.D, model.D, t.hidden + i * model.D);
  });
}

template <class Dot>
void run(const Decoder& model, const Tokens& t, const Scratch& scratch, bool parallel, int threads) {
  Shared shared = {};
#pragma omp parallel num_threads(threads) if (parallel)
  {
    const Team team = join_team(&shared);
    float* const panel = scratch.panels + team.me * scratch.panel;
    for (int64_t first = 0; first < t.N; first += ROWS) {
      const int64_t rows = min(ROWS, t.N - first);
      share(team, rows, [&](int64_t r) { embed(model, t, first + r, scratch.x + r * model.D); });
      barrier(team);
      for (int64_t l = 0; l < model.layers; ++l)
        run_layer<Dot>(model, model.layer[l], t, first, rows, scratch, panel, team);
      finish(model, t, first, rows, scratch, team);
      barrier(team);
    }
  }
}

// Cuts the workspace into the scratch buffers, or only counts its bytes where it is null.
Scratch divide(const Decoder& model, int64_t rows, bool halves, int threads, char* base, int64_t* used) {
  const auto take = [&](int64_t bytes) {
    char* const part = base ? base + *used : nullptr;
    *used += (bytes + 63) / 64 * 64;
    return part;
  };
  const auto wide = [&](int64_t count) { return (float*)take(count * 4); };
  const auto half = [&](int64_t count) { return halves ? (uint16_t*)take(count * 2) : nullptr; };
  Scratch s = {};
  s.attended_width = model.heads * model.head_dim, s.inner_width = model.F;
  s.qkv_width = s.attended_width + 2 * model.kv_heads * model.head_dim;
  const int64_t longest = max(max(model.D, model.F), s.attended_width);
  const int64_t attending = attend_scratch(model.heads / model.kv_heads, model.head_dim);
  s.panel = max(max<int64_t>(PANEL, 4 * longest), attending);
  s.x = wide(rows * model.D), s.normed = wide(rows * model.D), s.second = wide(rows * model.D);
  s.qkv = wide(rows * s.qkv_width), s.attended = wide(rows * s.attended_width), s.inner = wide(rows * s.inner_width);
  s.panels = wide(threads * s.panel);
  s.normed_half = half(rows * model.D), s.second_half = half(rows * model.D);
  s.attended_half = half(rows * s.attended_width), s.inner_half = half(rows * s.inner_width);
  return s;
}

// Sizes are those of the caller's structures. `half` as in linear_sample_tokens. hidden (wanted, D) float32.
// Threads are called for what takes more than `least` nanoseconds of one.
// With workspace null it only writes the bytes that it needs to *needed.
const char* decode_step(uintptr_t decoder, int64_t decoder_size, int64_t layer_size, uintptr_t ids, uintptr_t positions,
                        uintptr_t slots, int64_t N, uintptr_t table, int64_t table_width, uintptr_t wanted,
                        int64_t wanted_count, uintptr_t hidden, int half, int64_t least, uintptr_t workspace,
                        uintptr_t needed, int threads) {
  if (decoder_size != sizeof(Decoder) || layer_size != sizeof(Layer))
    return "rollout/compiled_step.py and csrc/cpu/decode_step.cpp describe a decoder differently; install rlhf-fast "
           "again";
  const Decoder& model = *ptr<const Decoder>(decoder);
  if (workspace)
    for (int64_t n = 0; n < N; ++n) {
      if (ptr<const int64_t>(ids)[n] < 0 || ptr<const int64_t>(ids)[n] >= model.vocabulary)
        return "a token is not one of the embedding's";
      if (ptr<const int32_t>(positions)[n] < 0 || ptr<const int32_t>(positions)[n] >= table_width * model.page)
        return "a position is beyond the block table";
    }
  const bool halves = half == 2 || (half == 1 && has_dot());
  int64_t used = 0;
  const Scratch scratch = divide(model, min(ROWS, N), halves, threads, ptr<char>(workspace), &used);
  if (!workspace) {
    *ptr<int64_t>(needed) = used;
    return nullptr;
  }
  const Tokens t = {N,
                    wanted_count,
                    table_width,
                    ptr<const int64_t>(ids),
                    ptr<const int32_t>(positions),
                    ptr<const int32_t>(slots),
                    ptr<const int32_t>(table),
                    ptr<const int64_t>(wanted),
                    ptr<float>(hidden)};
  // Threads pay once a block of tokens takes a millisecond: 25 multiply-adds a nanosecond, or 4 weights read from
  // memory.
  const int64_t weights = model.layers * model.D * (2 * scratch.attended_width + scratch.qkv_width + 3 * model.F);
  const bool parallel = threads > 1 && weights * min(ROWS, N) / 25 + weights / 4 > least;
  if (half == 2)
    run<EmulatedDot>(model, t, scratch, parallel, threads);
  else
    run<MachineDot>(model, t, scratch, parallel, threads);
  return nullptr;
}

KERNEL(decode_step)

}  // namespace
