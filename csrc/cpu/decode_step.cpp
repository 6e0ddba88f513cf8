// One forward pass of a decoder over N packed tokens, in one call: embedding, layers, final norm. It serves prefill and
// decode; rlhf_fast/model/architectures.py says which tensor of an architecture goes where.
//
//     tokens    | block of 64 | block of 64 | ...      each block goes through all layers
//     layer     norm | q k v | rope, store | attention | out | norm | gate, up | down      a barrier after each
//               rows   columns   rows        row, head   columns  rows   columns    columns   what a thread takes
//
// Activations are float32. All keys and values of a block are stored before any of its tokens attends, so a block may
// have several tokens of one sequence. Products, norms and attention have one order of summation each: a token's bits
// depend on its own sequence alone, not on the other tokens, the blocks or the threads.
//
// Floor: all weights once from memory for each block, and the keys and values that are read; or the products' 2 N
// weights operations.
#include "activation.h"
#include "kernel.h"
#include "norm.h"
#include "paged_attention.h"
#include "product.h"
#include "rope.h"
#include "team.h"

namespace {

constexpr int64_t ROWS = 64;     // tokens of a block
constexpr int64_t COLUMNS = 64;  // columns of a product that a thread computes at a time, at most

// rlhf_fast/rollout/compiled_step.py has these three as ctypes structures.
struct Norm {
  const void* weight;  // null: no norm
  const void* bias;
  int32_t is_bf16, centered;  // centered: LayerNorm, else RMSNorm
  float eps, padding;
};

struct Layer {
  Norm attention_norm, mlp_norm, q_norm, k_norm;  // the last two are over each head
  Matrix qkv[3];                                  // their results side by side; unused ones have 0 out_features
  Matrix out, gate, up, down;                     // down(act(gate) * up), or down(act(up)) if gate has 0 out_features
  void *k_cache, *v_cache;                        // (num_pages, num_kv_heads, page_size, head_dim)
  int64_t window;                                 // keys that a token sees, itself included; 0: all
  int32_t rotary_dim;
  float scale;  // of the scores
};

struct Decoder {
  int64_t num_layers, hidden_size, mlp_size, vocab_size, num_heads, num_kv_heads, head_dim, page_size;
  int64_t q_offset, k_offset, v_offset, q_stride, kv_stride;  // head h of q is at q_offset + h q_stride of a qkv row
  const Layer* layers;
  const void *embedding, *position_embedding;  // (vocab_size, hidden_size); (positions, hidden_size) or null
  const float *cos, *sin;                      // (positions, rotary_dim / 2) or null
  Norm final_norm;
  int32_t activation;         // of the enum below
  int32_t parallel_residual;  // attention and MLP read the same input
  int32_t embedding_is_bf16, cache_is_bf16;
};

enum Activation { SILU, GELU_ERF, GELU_TANH };

struct Tokens {
  int64_t N, num_indices, table_width;
  const int64_t* ids;
  const int32_t *positions, *slots, *block_table;  // (N,), (N,), (slots, table_width)
  const int64_t* indices;                          // the tokens whose hidden states are returned
  float* hidden;                                   // (num_indices, hidden_size)
};

// Buffers that the threads share for a block of tokens. The *_bf16 are null if no product is in bfloat16.
struct Scratch {
  float *x, *attention_input, *mlp_input, *qkv, *attended, *inner, *panels;
  uint16_t *attention_input_bf16, *mlp_input_bf16, *attended_bf16, *inner_bf16;
  int64_t panel_size, qkv_width, inner_width, attended_width;
};

INLINE void normalize_row(const Norm& norm, const float* x, int64_t D, float* y) {
  const auto apply = [&](auto* weight) {
    using T = decltype(weight);
    if (norm.centered)
      layer_norm_row(x, weight, (T)norm.bias, norm.eps, D, y);
    else
      rms_norm_row(x, weight, 0.f, norm.eps, D, y);
  };
  norm.is_bf16 ? apply((const bf16*)norm.weight) : apply((const float*)norm.weight);
}

INLINE float element(const void* p, int64_t i, bool is_bf16) {
  return is_bf16 ? to_float(((const bf16*)p)[i]) : ((const float*)p)[i];
}

void embed(const Decoder& model, const Tokens& tokens, int64_t n, float* x) {
  const bool is_bf16 = model.embedding_is_bf16;
  for (int64_t i = 0; i < model.hidden_size; ++i)
    x[i] = element(model.embedding, tokens.ids[n] * model.hidden_size + i, is_bf16);
  if (!model.position_embedding) return;
  for (int64_t i = 0; i < model.hidden_size; ++i)
    x[i] += element(model.position_embedding, tokens.positions[n] * model.hidden_size + i, is_bf16);
}

// Norm of row r of x into `out`, and rounded into `out_bf16` unless that is null.
void norm_of_row(const Norm& norm, const Scratch& s, int64_t r, int64_t D, float* out, uint16_t* out_bf16) {
  normalize_row(norm, s.x + r * D, D, out + r * D);
  if (out_bf16) round_row(out + r * D, D, out_bf16 + r * D);
}

// Columns that a thread takes at a time: enough for their cost to be small, few enough that no thread waits long.
INLINE int64_t columns_per_task(const Matrix& m, int64_t columns, int64_t rows, const Team& team) {
  const int64_t unit =
      uses_dot_panel<FloatLanes>(rows, m.in_features) ? max(8, W) : 8;  // columns of a panel's vector, of a tile
  return min(COLUMNS, max(unit, columns / (4 * team.num_threads) / unit * unit));
}
INLINE int64_t num_tasks(int64_t columns, int64_t width) { return (columns + width - 1) / width; }

// `width` columns of out = X W' + b, or with `adds` out += X W' + b, for all rows.
template <class Dot>
void project_columns(const Activations& x, const Matrix& m, int64_t begin, int64_t width, float* out,
                     int64_t out_stride, bool adds, float* panel) {
  float tile[ROWS * COLUMNS];
  const int64_t n = min(width, m.out_features - begin);
  multiply<Dot>(x, m, begin, begin + n, tile, COLUMNS, panel);
  for (int64_t r = 0; r < x.rows; ++r) {
    float *const from = tile + r * COLUMNS, *const to = out + r * out_stride + begin;
    add_bias(m, begin, n, from);
    for (int64_t c = 0; c < n; ++c) to[c] = adds ? to[c] + from[c] : from[c];
  }
}

template <class Dot>
void project_and_add(const Activations& x, const Matrix& m, float* out, int64_t out_stride, float* panel,
                     const Team& team) {
  const int64_t width = columns_per_task(m, m.out_features, x.rows, team);
  parallel_for(team, num_tasks(m.out_features, width),
               [&](int64_t i) { project_columns<Dot>(x, m, i * width, width, out, out_stride, true, panel); });
}

// One to three matrices, their results side by side.
template <class Dot>
void project_qkv(const Layer& layer, const Activations& x, const Scratch& s, float* panel, const Team& team) {
  const int64_t width = columns_per_task(layer.qkv[0], s.qkv_width, x.rows, team);
  int64_t count = 0;
  for (const Matrix& m : layer.qkv) count += num_tasks(m.out_features, width);
  parallel_for(team, count, [&](int64_t i) {
    int64_t offset = 0;
    for (const Matrix& m : layer.qkv) {
      const int64_t tasks = num_tasks(m.out_features, width);
      if (i < tasks) return project_columns<Dot>(x, m, i * width, width, s.qkv + offset, s.qkv_width, false, panel);
      i -= tasks;
      offset += m.out_features;
    }
  });
}

INLINE f32 activate(int32_t activation, f32 x) {
  if (activation == SILU) return silu(x);
  return activation == GELU_ERF ? gelu_erf(x) : gelu_tanh(x);
}

// inner = act(gate) * up, or act(up).
template <class Dot>
void project_inner(const Decoder& model, const Layer& layer, const Activations& x, const Scratch& s, float* panel,
                   const Team& team) {
  const int64_t width = columns_per_task(layer.up, layer.up.out_features, x.rows, team);
  const bool gated = layer.gate.out_features;
  parallel_for(team, num_tasks(layer.up.out_features, width), [&](int64_t i) {
    float gates[ROWS * COLUMNS], ups[ROWS * COLUMNS];
    const int64_t begin = i * width, n = min(width, layer.up.out_features - begin);
    if (gated) multiply<Dot>(x, layer.gate, begin, begin + n, gates, COLUMNS, panel);
    multiply<Dot>(x, layer.up, begin, begin + n, ups, COLUMNS, panel);
    for (int64_t r = 0; r < x.rows; ++r) {
      float *const up = ups + r * COLUMNS, *const gate = gates + r * COLUMNS;
      add_bias(layer.up, begin, n, up);
      if (gated) add_bias(layer.gate, begin, n, gate);
      float* const inner = s.inner + r * s.inner_width + begin;
      for (int64_t c = 0; c < n; c += W) {
        const int left = (int)min<int64_t>(W, n - c);
        const f32 u = load_partial(up + c, left, 0.f);
        const f32 y =
            gated ? activate(model.activation, load_partial(gate + c, left, 0.f)) * u : activate(model.activation, u);
        store_partial(inner + c, y, left);
      }
      if (s.inner_bf16) round_row(inner, n, s.inner_bf16 + r * s.inner_width + begin);
    }
  });
}

// Normalizes and rotates the heads of query and key, and stores key and value in their page.
template <class KV>
void store_row(const Decoder& model, const Layer& layer, const Tokens& tokens, int64_t n, float* qkv) {
  const int64_t d = model.head_dim, position = tokens.positions[n], half_dim = layer.rotary_dim / 2;
  const float *const cos = model.cos + position * half_dim, *const sin = model.sin + position * half_dim;
  const int64_t page = tokens.block_table[tokens.slots[n] * tokens.table_width + position / model.page_size];
  const int64_t offset = position % model.page_size;
  for (int64_t h = 0; h < model.num_heads; ++h) {
    float* const q = qkv + model.q_offset + h * model.q_stride;
    if (layer.q_norm.weight) normalize_row(layer.q_norm, q, d, q);
    if (half_dim) rope_in_place(q, cos, sin, half_dim);
  }
  for (int64_t h = 0; h < model.num_kv_heads; ++h) {
    float* const k = qkv + model.k_offset + h * model.kv_stride;
    const float* const v = qkv + model.v_offset + h * model.kv_stride;
    if (layer.k_norm.weight) normalize_row(layer.k_norm, k, d, k);
    if (half_dim) rope_in_place(k, cos, sin, half_dim);
    const int64_t row = ((page * model.num_kv_heads + h) * model.page_size + offset) * d;
    for (int64_t i = 0; i < d; i += W) {
      const int left = (int)min<int64_t>(W, d - i);
      store_partial((KV*)layer.k_cache + row + i, load_partial(k + i, left, 0.f), left);
      store_partial((KV*)layer.v_cache + row + i, load_partial(v + i, left, 0.f), left);
    }
  }
}

// The query heads of one token that share key head h.
template <class KV>
void attend_row(const Decoder& model, const Layer& layer, const Tokens& tokens, int64_t n, int64_t h, const float* qkv,
                float* out, float* scratch) {
  const int64_t G = model.num_heads / model.num_kv_heads, d = model.head_dim, end = (int64_t)tokens.positions[n] + 1;
  const int64_t begin = layer.window ? max<int64_t>(0, end - layer.window) : 0;
  const int32_t* const pages = tokens.block_table + tokens.slots[n] * tokens.table_width;
  const KvView<KV> kv = {(const KV*)layer.k_cache, (const KV*)layer.v_cache, pages, h,
                         model.num_kv_heads,       model.page_size,          d,     d};
  attend(qkv + model.q_offset + h * G * model.q_stride, model.q_stride, G, kv, begin, end, layer.scale, 0.f,
         out + h * G * d, d, scratch);
}

template <class KV>
void attention(const Decoder& model, const Layer& layer, const Tokens& tokens, int64_t first, int64_t rows,
               const Scratch& s, float* panel, const Team& team) {
  parallel_for(team, rows, [&](int64_t r) { store_row<KV>(model, layer, tokens, first + r, s.qkv + r * s.qkv_width); });
  barrier(team);
  const int64_t width = model.num_heads / model.num_kv_heads * model.head_dim;
  parallel_for(team, rows * model.num_kv_heads, [&](int64_t i) {
    const int64_t r = i / model.num_kv_heads, h = i % model.num_kv_heads;
    float* const out = s.attended + r * s.attended_width;
    attend_row<KV>(model, layer, tokens, first + r, h, s.qkv + r * s.qkv_width, out, panel);
    if (s.attended_bf16) round_row(out + h * width, width, s.attended_bf16 + r * s.attended_width + h * width);
  });
  barrier(team);
}

// One layer over the `rows` tokens from `first` on. Every thread of the team calls it.
template <class Dot>
void run_layer(const Decoder& model, const Layer& layer, const Tokens& tokens, int64_t first, int64_t rows,
               const Scratch& s, float* panel, const Team& team) {
  const int64_t D = model.hidden_size;
  const auto norm_before_mlp = [&](int64_t r) { norm_of_row(layer.mlp_norm, s, r, D, s.mlp_input, s.mlp_input_bf16); };
  parallel_for(team, rows, [&](int64_t r) {
    norm_of_row(layer.attention_norm, s, r, D, s.attention_input, s.attention_input_bf16);
    if (model.parallel_residual) norm_before_mlp(r);
  });
  barrier(team);
  project_qkv<Dot>(layer, {s.attention_input, s.attention_input_bf16, D, rows}, s, panel, team);
  barrier(team);
  if (model.cache_is_bf16)
    attention<bf16>(model, layer, tokens, first, rows, s, panel, team);
  else
    attention<float>(model, layer, tokens, first, rows, s, panel, team);
  project_and_add<Dot>({s.attended, s.attended_bf16, s.attended_width, rows}, layer.out, s.x, D, panel, team);
  barrier(team);
  if (!model.parallel_residual) {
    parallel_for(team, rows, norm_before_mlp);
    barrier(team);
  }
  project_inner<Dot>(model, layer, {s.mlp_input, s.mlp_input_bf16, D, rows}, s, panel, team);
  barrier(team);
  project_and_add<Dot>({s.inner, s.inner_bf16, s.inner_width, rows}, layer.down, s.x, D, panel, team);
  barrier(team);
}

// The final norm of the selected tokens in [first, first + rows).
void finish(const Decoder& model, const Tokens& tokens, int64_t first, int64_t rows, const Scratch& s,
            const Team& team) {
  parallel_for(team, tokens.num_indices, [&](int64_t i) {
    const int64_t r = tokens.indices[i] - first;
    if (r >= 0 && r < rows)
      normalize_row(model.final_norm, s.x + r * model.hidden_size, model.hidden_size,
                    tokens.hidden + i * model.hidden_size);
  });
}

template <class Dot>
void run(const Decoder& model, const Tokens& tokens, const Scratch& scratch, bool parallel, int threads) {
  TeamState state = {};
#pragma omp parallel num_threads(threads) if (parallel)
  {
    const Team team = join_team(&state);
    float* const panel = scratch.panels + team.thread * scratch.panel_size;
    for (int64_t first = 0; first < tokens.N; first += ROWS) {
      const int64_t rows = min(ROWS, tokens.N - first);
      parallel_for(team, rows, [&](int64_t r) { embed(model, tokens, first + r, scratch.x + r * model.hidden_size); });
      barrier(team);
      for (int64_t l = 0; l < model.num_layers; ++l)
        run_layer<Dot>(model, model.layers[l], tokens, first, rows, scratch, panel, team);
      finish(model, tokens, first, rows, scratch, team);
      barrier(team);
    }
  }
}

// Divides the workspace into the scratch buffers and counts its bytes; with `base` null it only counts.
Scratch divide(const Decoder& model, int64_t rows, bool uses_bf16, int threads, char* base, int64_t* size) {
  *size = 0;
  const auto take = [&](int64_t bytes) {
    char* const part = base ? base + *size : nullptr;
    *size += (bytes + 63) / 64 * 64;
    return part;
  };
  const auto floats = [&](int64_t count) { return (float*)take(count * 4); };
  const auto bf16s = [&](int64_t count) { return uses_bf16 ? (uint16_t*)take(count * 2) : nullptr; };
  Scratch s = {};
  s.attended_width = model.num_heads * model.head_dim;
  s.inner_width = model.mlp_size;
  s.qkv_width = s.attended_width + 2 * model.num_kv_heads * model.head_dim;
  const int64_t max_width = max(max(model.hidden_size, model.mlp_size), s.attended_width);
  const int64_t for_attention = attend_scratch(model.num_heads / model.num_kv_heads, model.head_dim);
  s.panel_size = max(panel_size(max_width), for_attention);
  s.x = floats(rows * model.hidden_size);
  s.attention_input = floats(rows * model.hidden_size);
  s.mlp_input = floats(rows * model.hidden_size);
  s.qkv = floats(rows * s.qkv_width);
  s.attended = floats(rows * s.attended_width);
  s.inner = floats(rows * s.inner_width);
  s.panels = floats(threads * s.panel_size);
  s.attention_input_bf16 = bf16s(rows * model.hidden_size);
  s.mlp_input_bf16 = bf16s(rows * model.hidden_size);
  s.attended_bf16 = bf16s(rows * s.attended_width);
  s.inner_bf16 = bf16s(rows * s.inner_width);
  return s;
}

// As in linear_sample_tokens.cpp: 0 never multiplies in bfloat16, 1 does if the processor can, 2 does by emulation.
INLINE bool uses_bf16(int bf16_mode) { return bf16_mode == 2 || (bf16_mode == 1 && has_bf16_dot()); }

const char* check(const Decoder& model, const Tokens& tokens) {
  for (int64_t n = 0; n < tokens.N; ++n) {
    if (tokens.ids[n] < 0 || tokens.ids[n] >= model.vocab_size) return "a token is not one of the embedding's";
    if (tokens.positions[n] < 0 || tokens.positions[n] >= tokens.table_width * model.page_size)
      return "a position is beyond the block table";
  }
  return nullptr;
}

// Writes to *size the bytes of workspace that decode_step needs for up to N tokens. decoder_size and layer_size are the
// sizes of the caller's structures.
const char* decode_step_workspace(uintptr_t decoder, int64_t decoder_size, int64_t layer_size, int64_t N, int bf16_mode,
                                  int threads, uintptr_t size) {
  if (decoder_size != sizeof(Decoder) || layer_size != sizeof(Layer))
    return "rlhf_fast/rollout/compiled_step.py and csrc/cpu/decode_step.cpp describe a decoder differently; install "
           "rlhf-fast again";
  divide(*ptr<const Decoder>(decoder), min(ROWS, N), uses_bf16(bf16_mode), threads, nullptr, ptr<int64_t>(size));
  return nullptr;
}

// Writes the hidden states of the selected tokens, float32, to `hidden`. Threads are used if one of them would take
// more than `min_nanoseconds`.
const char* decode_step(uintptr_t decoder, uintptr_t ids, uintptr_t positions, uintptr_t slots, int64_t N,
                        uintptr_t block_table, int64_t table_width, uintptr_t indices, int64_t num_indices,
                        uintptr_t hidden, int bf16_mode, int64_t min_nanoseconds, uintptr_t workspace, int threads) {
  const Decoder& model = *ptr<const Decoder>(decoder);
  Tokens tokens;
  tokens.N = N;
  tokens.num_indices = num_indices;
  tokens.table_width = table_width;
  tokens.ids = ptr<const int64_t>(ids);
  tokens.positions = ptr<const int32_t>(positions);
  tokens.slots = ptr<const int32_t>(slots);
  tokens.block_table = ptr<const int32_t>(block_table);
  tokens.indices = ptr<const int64_t>(indices);
  tokens.hidden = ptr<float>(hidden);
  if (const char* error = check(model, tokens)) return error;
  int64_t size;
  const Scratch scratch = divide(model, min(ROWS, N), uses_bf16(bf16_mode), threads, ptr<char>(workspace), &size);
  // A thread does 25 multiply-adds a nanosecond, or reads 4 weights from memory.
  const int64_t weights =
      model.num_layers * model.hidden_size * (2 * scratch.attended_width + scratch.qkv_width + 3 * model.mlp_size);
  const bool parallel = threads > 1 && weights * min(ROWS, N) / 25 + weights / 4 > min_nanoseconds;
  if (bf16_mode == 2)
    run<EmulatedDot>(model, tokens, scratch, parallel, threads);
  else
    run<MachineDot>(model, tokens, scratch, parallel, threads);
  return nullptr;
}

CONSTANT(activation_silu, SILU)
CONSTANT(activation_gelu, GELU_ERF)
CONSTANT(activation_gelu_tanh, GELU_TANH)
CONSTANT(decode_step_block, ROWS)
KERNEL(decode_step_workspace)
KERNEL(decode_step)

}  // namespace
