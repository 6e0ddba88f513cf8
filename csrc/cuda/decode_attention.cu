// Attention of new tokens over keys in pages, on NVIDIA GPUs; kernels/decode_attention.py says what it means.
//
// Memory is the floor: every key and value is read once for the up to 8 query heads that share it. A block of 8 warps
// takes one token, one key head and its query heads, and walks splits of 256 keys, cut at multiples of 256. Of each, a
// warp takes 32 keys, four in a row of every 32: first their scores, 8 lanes a key; then their exponentials, a lane a
// key, around the warp's own largest score; then the weighted sum of the values, 8 to 32 lanes a value. A lane reads 16
// bytes at a time. It asks for a new word as soon as it has unpacked an old one, for the first values before the
// exponentials, and for the next split's first keys before the warps' sums are put together: some four words a lane are
// under way at all times, 48 KiB a multiprocessor with 24 warps. By count of instructions, 4 query heads of bfloat16
// keep an H100's schedulers busy for half the time that its memory takes: a warp has 64 products, 16 steps to unpack
// and some 50 for addresses, sums over lanes and queries from shared memory, for 512 bytes of keys and as many of
// values. More than 8 query heads take a block for every 8, which read the same keys out of the second-level cache.
//
// The splits' states (largest score, sum of exponentials, weighted sum of values) are folded in their order, by the
// block that walks all of them, or, where tokens are too few to fill the GPU, by a second kernel from memory: 4 (dv +
// 2) bytes a split and query head, 1.6 % of what is read where four heads share 16-bit keys of 128. All of it in
// explicit fused steps: a token's bits depend on its own keys alone. Lengths and pages are read on the device; the grid
// comes from shapes, and a block without keys reads nothing. What stands in unread places may be NaN.
#include "paged_attention.cuh"

namespace {

constexpr int join_threads = 4 * lanes, together = 4;

// Shared memory of a block; `row` numbers of a query, with zeros at its end.
template <int HEADS>
struct Shared {
  float tops[warps][HEADS], totals[warps][HEADS], weights[warps][lanes * HEADS];
  int next[block_threads];  // the rows of the next split's keys
  float4 memory[1];

  // All splits so far, where the block walks them: four columns a thread. Queries; sums (warps, HEADS, columns).
  __device__ State* whole() { return reinterpret_cast<State*>(memory); }
  __device__ float* queries(int quads) { return reinterpret_cast<float*>(whole() + HEADS * quads); }
  __device__ float4* sums(int quads, int row) { return reinterpret_cast<float4*>(queries(quads) + HEADS * row); }
  static size_t bytes(int quads, int row) {
    return sizeof(Shared) + HEADS * (quads * sizeof(State) + sizeof(float) * (row + warps * 4 * size_t(quads)));
  }
};

template <class T, int HEADS>
__device__ __forceinline__ void read_queries(const Attention& a, int64_t n, int64_t head, int mine, int row,
                                             float* queries) {
  constexpr int per = per_word<T>, quads = per / 4;
  for (int i = threadIdx.x; i < HEADS * row; i += block_threads) {
    const int h = i / row, column = i % row, word = column / per;
    const int at = ((word >> a.k.bits) * HEADS + h) * quads + column % per / 4;
    const bool there = h < mine && column < a.k.width;
    queries[((at << a.k.bits) + (word & (a.k.team() - 1))) * 4 + column % 4] =
        there ? query(a, n * a.q_token + (head - n * a.H + h) * a.q_head + column) : 0.f;
  }
}

template <class T, int HEADS, bool WHOLE>
__global__ void __launch_bounds__(block_threads, HEADS > 4 || !WHOLE ? 2 : 3) attend_kernel(const Attention a) {
  constexpr int U = HEADS == 1 ? 8 : 4;
  int n = blockIdx.x;
  const int chunk = n % a.chunks, part = (n /= a.chunks) % a.parts, kv = (n /= a.parts) % a.kv_heads;
  n /= a.kv_heads;
  const int end = a.end(n), begin = a.begin(end), first = begin / split;
  if (a.parts > 1 && (first + part) * split >= end) return;
  const int G = a.H / a.kv_heads, head = n * a.H + kv * G + chunk * HEADS, mine = min(HEADS, G - chunk * HEADS);
  const int warp = threadIdx.x / lanes, row = a.k.words * a.k.team() * per_word<T>;
  Shared<HEADS>& shared = *shared_memory<Shared<HEADS>>();
  read_queries<T, HEADS>(a, n, head, begin < end ? mine : 0, row, shared.queries(a.quads));
  for (int i = threadIdx.x; i < HEADS * a.quads; i += block_threads) shared.whole()[i] = no_keys();
  __syncthreads();

  const int sequence = a.rows[n];
  Keys keys(row_of(a, sequence, kv, (first + part) * split, end));
  uint4 words[U];
  read_first<WHOLE, T>(words, a.k, keys);
  for (int at = first + part; at * split < end; at += a.parts) {
    shared.next[threadIdx.x] = row_of(a, sequence, kv, (at + a.parts) * split, end);
    float* const weights = shared.weights[warp];
    score<HEADS, WHOLE, T>(words, a.k, keys, reinterpret_cast<const float4*>(shared.queries(a.quads)), weights);
    read_first<WHOLE, T>(words, a.v, keys);
    __syncwarp();
    exponentials<HEADS>(a, keys, weights, shared.tops[warp], shared.totals[warp]);
    __syncwarp();
    weigh<HEADS, WHOLE, T>(words, a.v, keys, weights, shared.sums(a.quads, row) + warp * HEADS * a.quads, a.quads);
    keys = Keys(shared.next[threadIdx.x]);
    read_first<WHOLE, T>(words, a.k, keys);
    __syncthreads();
    for (int i = threadIdx.x; i < mine * a.quads; i += block_threads) {
      const int h = i / a.quads, column = 4 * (i % a.quads);
      if (column >= a.v.width) continue;
      const State state =
          warps_joined<HEADS>(&shared.tops[0][h], &shared.totals[0][h], shared.sums(a.quads, row) + i, a.quads);
      if (a.parts == 1) {
        fold(shared.whole()[i], state);
      } else {
        const int64_t place = int64_t(head + h) * a.splits + at - a.begin(end) / split;
        if (column == 0) a.states[2 * place] = state.top, a.states[2 * place + 1] = state.total;
        *reinterpret_cast<float4*>(a.sums + place * a.width() + column) = state.sums;
      }
    }
    __syncthreads();
  }
  if (a.parts > 1) return;
  for (int i = threadIdx.x; i < mine * a.quads; i += block_threads)
    write_mean(a, head + i / a.quads, 4 * (i % a.quads), shared.whole()[i], a.begin(end) < end);
}

// A warp folds the splits of a query head.
__global__ void __launch_bounds__(join_threads) join_kernel(const Attention a) {
  const int64_t head = int64_t(blockIdx.x) * (join_threads / lanes) + threadIdx.x / lanes;
  if (head >= a.N * a.H) return;
  const int end = a.end(head / a.H), begin = a.begin(end);
  const int count = begin < end ? (end + split - 1) / split - begin / split : 0, width = a.width();
  const float *const states = a.states + head * a.splits * 2, *const sums = a.sums + head * a.splits * width;
  for (int column = threadIdx.x % lanes * 4; column < width; column += 4 * lanes) {
    State whole = no_keys();
    for (int at = 0; at < count; at += together) {
      State next[together];
#pragma unroll
      for (int i = 0; i < together; ++i) {
        next[i] = no_keys();
        if (at + i >= count) continue;
        next[i].top = states[2 * (at + i)], next[i].total = states[2 * (at + i) + 1];
        next[i].sums = *reinterpret_cast<const float4*>(sums + int64_t(at + i) * width + column);
      }
#pragma unroll
      for (int i = 0; i < together; ++i)
        if (at + i < count) fold(whole, next[i]);
    }
    write_mean(a, head, column, whole, begin < end);
  }
}

Rows rows_of(uintptr_t cache, int64_t width, int per, int bits) {
  const int words = static_cast<int>((width + per - 1) / per);
  return {ptr<const void>(cache), static_cast<int>(width), bits, (words + (1 << bits) - 1) >> bits};
}

template <class T, int HEADS, bool WHOLE>
const char* attend(Attention a, uintptr_t stream) {
  a.chunks = (a.H / a.kv_heads + HEADS - 1) / HEADS;
  const unsigned blocks = blocks_for(a.N * a.kv_heads * a.chunks * a.parts, 1);
  if (!blocks || a.N * a.H > 0x7fffffff) return "more tokens than a grid has blocks";
  const int row = a.k.words * a.k.team() * per_word<T>;
  const size_t bytes = Shared<HEADS>::bytes(a.quads, row);
  const char* error = launch(attend_kernel<T, HEADS, WHOLE>, blocks, block_threads, bytes, stream, a);
  if (error || a.parts == 1) return error;
  return launch(join_kernel, blocks_for(a.N * a.H, join_threads / lanes), join_threads, 0, stream, a);
}

// q: numbers `q_token` and `q_head` apart; states and sums as Attention says where parts > 1: blocks that share the
// splits of a token and key head. Heads of 256 numbers at most, caches of fewer than 2^31 rows, M P at most 2^30.
const char* decode_attention(uintptr_t q, int q_type, int64_t q_token, int64_t q_head, uintptr_t k, uintptr_t v,
                             int type, uintptr_t table, uintptr_t lengths, uintptr_t rows, uintptr_t out,
                             uintptr_t states, uintptr_t sums, int64_t N, int64_t H, int64_t kv_heads, int64_t d,
                             int64_t dv, int64_t P, int64_t M, int64_t parts, int64_t splits, float scale,
                             int64_t window, float softcap, uintptr_t stream) {
  if (N == 0 || H == 0 || dv == 0) return nullptr;
  return with_type(type, [&](auto number) {
    using T = decltype(number);
    constexpr int per = per_word<T>;
    const int bits = dv <= 8 * per ? 3 : dv <= 16 * per ? 4 : 5;
    Attention a{};
    a.q = ptr<const void>(q), a.q_type = q_type, a.q_token = q_token, a.q_head = q_head;
    a.k = rows_of(k, d, per, score_bits), a.v = rows_of(v, dv, per, bits);
    a.table = ptr<const int32_t>(table), a.lengths = ptr<const int32_t>(lengths), a.rows = ptr<const int32_t>(rows);
    a.out = ptr<void>(out), a.states = ptr<float>(states), a.sums = ptr<float>(sums);
    a.N = N, a.H = static_cast<int>(H), a.kv_heads = static_cast<int>(kv_heads), a.P = static_cast<int>(P);
    a.M = static_cast<int>(M), a.window = static_cast<int>(min(window, int64_t(1) << 30));
    a.parts = static_cast<int>(parts), a.splits = static_cast<int>(splits), a.quads = a.v.words * a.v.team() * per / 4;
    a.cap = softcap > 0.f, a.factor = (a.cap ? softcap : scale) * log2_e, a.inverse = a.cap ? scale / softcap : 1.f;
    const int64_t G = H / kv_heads;
    if (d % per || dv % per || (k | v) % 16) return attend<T, 4, false>(a, stream);
    if (G == 1) return attend<T, 1, true>(a, stream);
    return G <= 4 ? attend<T, 4, true>(a, stream) : attend<T, 8, true>(a, stream);
  });
}

KERNEL(decode_attention)

}  // namespace
