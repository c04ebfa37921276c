// sample_losses and sample_losses_backward on the CPU: the lanes of losses.h in the lanes of the vector unit.
//
// Few classes: sixteen rows side by side, each lane a line of sixteen numbers. Many classes: one row at a time. Either
// way an array of lanes is added in halves until sixteen totals, or one, are left.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <tuple>

#include "losses_tensors.h"

namespace samplewise {
namespace {

constexpr int kRows = 16;     // rows that are finished together
constexpr int kNarrow = 256;  // up to so many classes, they are also summed together
constexpr int kSpace = std::max(kLanes, kNarrow * kRows);
constexpr int64_t kGrain = 1 << 18;  // logits that are worth a thread

struct alignas(64) Lanes {
  float origin[kSpace], sum[kSpace], squares[kSpace];

  SW_HD Lane get(int i) const { return {origin[i], sum[i], squares[i]}; }
  SW_HD void set(int i, const Lane& lane) { origin[i] = lane.origin, sum[i] = lane.sum, squares[i] = lane.squares; }
};

// What accumulate() makes of empty lanes.
SW_CLONES void begin(const float* __restrict__ z, Lanes& __restrict__ lanes, int n) {
  for (int i = 0; i < n; ++i) {
    const bool grows = outgrows(placed(z[i], Lane{}.origin));
    const float origin = select(grows, origin_of(z[i]), Lane{}.origin);
    const float value = scaled_exp(z[i], origin, kFaint);
    lanes.set(i, {origin, select(grows & !(z[i] <= kLimit), NAN, value), value * value});
  }
}

SW_CLONES void accumulate(const float* __restrict__ z, Lanes& __restrict__ lanes, int n) {
  int any = 0;
  for (int i = 0; i < n; ++i) any |= outgrows(placed(z[i], lanes.origin[i]));
  if (any) {
    for (int i = 0; i < n; ++i) {
      const Lane lane = lanes.get(i), up = raised(z[i], lane);
      const bool grows = outgrows(placed(z[i], lane.origin));
      lanes.set(i, {select(grows, up.origin, lane.origin), select(grows, up.sum, lane.sum),
                    select(grows, up.squares, lane.squares)});
    }
  }
  for (int i = 0; i < n; ++i) lanes.set(i, added(z[i], placed(z[i], lanes.origin[i]), lanes.get(i)));
}

// Add `count` arrays of n lanes each, which follow one another, into the first.
SW_CLONES void add_arrays(Lanes& lanes, int count, int n) {
  float least[kSpace / kGroup];
  std::copy_n(lanes.origin, n, least);
  for (int at = n; at < count * n; at += n)
    for (int i = 0; i < n; ++i) least[i] = select(lanes.origin[at + i] < least[i], lanes.origin[at + i], least[i]);
  for (int at = 0; at < count * n; at += n)
    for (int i = 0; i < n; ++i) lanes.set(at + i, rescaled(lanes.get(at + i), least[i]));
  for (int half = count / 2 * n; half >= n; half /= 2) {
#pragma GCC ivdep
    for (int i = 0; i < half; ++i) lanes.sum[i] += lanes.sum[half + i], lanes.squares[i] += lanes.squares[half + i];
  }
}

typedef float Eight __attribute__((vector_size(32)));
#if defined(__clang__) || __GNUC__ >= 12
#define SW_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t Places __attribute__((vector_size(32)));
#define SW_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Places{__VA_ARGS__})
#endif

// Eight lines of eight numbers, `stride` apart, to lines of the numbers that stood in columns: three perfect shuffles.
SW_HD void transpose_eight(const float* from, int stride, float* to, int to_stride) {
  Eight lines[8], next[8];
  for (int i = 0; i < 8; ++i) memcpy(&lines[i], from + i * stride, sizeof(Eight));
  for (int round = 0; round < 3; ++round) {
    for (int i = 0; i < 4; ++i) {
      next[2 * i] = SW_SHUFFLE(lines[i], lines[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
      next[2 * i + 1] = SW_SHUFFLE(lines[i], lines[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; ++i) lines[i] = next[i];
  }
  for (int i = 0; i < 8; ++i) memcpy(to + i * to_stride, &lines[i], sizeof(Eight));
}

// to[e threads + t] = from[8 t + e]
SW_CLONES void transpose(const float* __restrict__ from, float* __restrict__ to, int threads) {
  for (int t = 0; t + 8 <= threads; t += 8) transpose_eight(from + t * kGroup, kGroup, to + t, threads);
  if (threads < 8)
    for (int i = 0; i < threads * kGroup; ++i) to[i % kGroup * threads + i / kGroup] = from[i];
}

// to[(e threads + t) 16 + r] = from[r 8 threads + 8 t + e]
SW_CLONES void transpose_rows(const float* __restrict__ from, float* __restrict__ to, int threads) {
  for (int t = 0; t < threads; ++t)
    for (int r = 0; r < kRows; r += 8)
      transpose_eight(from + (r * threads + t) * kGroup, threads * kGroup, to + t * kRows + r, threads * kRows);
}

struct Finished {
  float loss[kRows], norm[kRows], shift[kRows], origin[kRows], inverse[kRows], complement[kRows];
  int settled[kRows];
};

SW_CLONES void finish(const Lanes& __restrict__ totals, const float* __restrict__ labels, Finished& __restrict__ out) {
  for (int i = 0; i < kRows; ++i) {
    const Lane total = normalised({totals.origin[i], totals.sum[i], totals.squares[i]});
    const Row row = finished(total, labels[i], 0.0f);
    out.loss[i] = row.loss, out.norm[i] = row.norm, out.shift[i] = row.shift;
    out.origin[i] = row.origin, out.inverse[i] = row.inverse, out.complement[i] = row.complement;
    out.settled[i] = settled(total, labels[i]);
  }
}

template <class T>
SW_HD void convert(const T* __restrict__ from, float* __restrict__ to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = to_float(from[i]);
}
SW_CLONES void load(const float* from, float* to, int64_t n) { convert(from, to, n); }
SW_CLONES void load(const Bf16* from, float* to, int64_t n) { convert(from, to, n); }
SW_CLONES void load(const Fp16* from, float* to, int64_t n) { convert(from, to, n); }

template <class T>
SW_HD void gradient(const T* __restrict__ z, T* __restrict__ out, int64_t n, const float* state, float coefficient) {
  const float shift = state[0], origin = state[1];
  for (int64_t i = 0; i < n; ++i) out[i] = from_float<T>(share_of_gradient(to_float(z[i]), shift, origin, coefficient));
}
SW_CLONES void differentiate(const float* z, float* out, int64_t n, const float* state, float coefficient) {
  gradient(z, out, n, state, coefficient);
}
SW_CLONES void differentiate(const Bf16* z, Bf16* out, int64_t n, const float* state, float coefficient) {
  gradient(z, out, n, state, coefficient);
}
SW_CLONES void differentiate(const Fp16* z, Fp16* out, int64_t n, const float* state, float coefficient) {
  gradient(z, out, n, state, coefficient);
}

// Threads of losses.h that n classes need: a power of two.
int threads_for(int64_t classes) {
  int threads = 1;
  while (threads * kGroup < std::min<int64_t>(classes, kLanes)) threads *= 2;
  return threads;
}

template <class T>
class Forward {
 public:
  Forward(const T* logits, int64_t stride, const int64_t* labels, int64_t classes, int64_t ignored)
      : logits_(logits), stride_(stride), labels_(labels), classes_(classes), ignored_(ignored),
        threads_(threads_for(classes)) {}

  void run(int64_t begin, int64_t end, float* losses, float* norms, float* state) {
    if (classes_ <= kNarrow) std::fill_n(rows_, threads_ * kGroup * kRows, -INFINITY);
    for (int64_t first = begin; first < end; first += kRows) {
      const int rows = (int)std::min<int64_t>(kRows, end - first);
      float own[kRows] = {};
      for (int r = 0; r < rows; ++r)
        if (labels_[first + r] != ignored_) own[r] = to_float(logits_[(first + r) * stride_ + labels_[first + r]]);
      if (classes_ <= kNarrow) {
        sum_rows(first, rows);
      } else {
        for (int r = 0; r < rows; ++r)
          totals_.set(r, labels_[first + r] != ignored_ ? sum_row(first + r, 0) : Lane{});
      }
      finish(totals_, own, finished_);
      for (int r = 0; r < rows; ++r) {
        const int64_t i = first + r;
        Row row{};
        if (labels_[i] != ignored_) row = finished_.settled[r] ? kept(r) : shifted(i, own[r]);
        losses[i] = row.loss, norms[i] = row.norm;
        std::copy_n(&row.shift, kState, state + i * kState);
      }
    }
  }

 private:
  Row kept(int r) const {
    return {finished_.loss[r],   finished_.norm[r],    finished_.shift[r],
            finished_.origin[r], finished_.inverse[r], finished_.complement[r]};
  }

  // A row that was not settled, done again on z - max z.
  Row shifted(int64_t i, float own) {
    const T* row = logits_ + i * stride_;
    float most = -INFINITY;
    for (int64_t j = 0; j < classes_; ++j) most = std::max(most, to_float(row[j]));
    return finished(normalised(sum_row(i, most)), own - most, most);
  }

  // Rows side by side: lane l of row r at 16 l + r, the lanes in the order in which they are added.
  void sum_rows(int64_t first, int rows) {
    const int n = threads_ * kGroup;
    for (int r = 0; r < rows; ++r) {
      const T* row = logits_ + (first + r) * stride_;
      float* to = rows_ + r * n;
      for (int64_t j = 0; j < classes_; ++j) to[j] = to_float(row[j]);
      if (labels_[first + r] != ignored_) to[labels_[first + r]] = -INFINITY;
    }
    transpose_rows(rows_, z_, threads_);
    begin(z_, totals_, n * kRows);
    add_lanes(totals_, kRows);
  }

  Lane sum_row(int64_t i, float shift) {
    const T* row = logits_ + i * stride_;
    const int n = threads_ * kGroup;
    for (int64_t from = 0; from < classes_; from += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, classes_ - from), own = labels_[i] - from;
      load(row + from, line_, count);
      if (shift != 0)
        for (int64_t j = 0; j < count; ++j) line_[j] -= shift;
      std::fill(line_ + count, line_ + n, -INFINITY);
      if (own >= 0 && own < count) line_[own] = -INFINITY;
      if (from == 0) {
        begin(line_, lanes_, n);
      } else {
        accumulate(line_, lanes_, n);
      }
    }
    transpose(lanes_.origin, ordered_.origin, threads_);
    transpose(lanes_.sum, ordered_.sum, threads_);
    transpose(lanes_.squares, ordered_.squares, threads_);
    add_lanes(ordered_, 1);
    return ordered_.get(0);
  }

  // Into the first, of each of `rows` rows.
  void add_lanes(Lanes& lanes, int rows) const {
    const int parts = std::min(threads_, kParts);
    add_arrays(lanes, kGroup, threads_ * rows);
    add_arrays(lanes, threads_ / parts, parts * rows);
    add_arrays(lanes, parts, rows);
  }

  const T* logits_;
  int64_t stride_;
  const int64_t* labels_;
  int64_t classes_, ignored_;
  int threads_;
  float rows_[kSpace], z_[kSpace], line_[kLanes];
  Lanes totals_, lanes_, ordered_;
  Finished finished_;
};

void check_labels(const int64_t* labels, int64_t n, int64_t classes, int64_t ignored) {
  for (int64_t i = 0; i < n; ++i) {
    STD_TORCH_CHECK(labels[i] == ignored || (labels[i] >= 0 && labels[i] < classes), "sample_losses: label ", labels[i],
                    " is outside [0, ", classes, ") and is not ignore_index=", ignored);
  }
}

// f(begin, end) for rows of the batch, in as many threads as are worth it.
template <class F>
void for_rows(const LabelledLogits& batch, const F& f) {
  torch::stable::parallel_for(0, batch.rows, 1 + kGrain / std::max<int64_t>(batch.classes, 1), f);
}

std::tuple<Tensor, Tensor, Tensor> sample_losses(Tensor logits, Tensor labels, int64_t ignore_index) {
  const LabelledLogits batch(logits, labels);
  check_labels(batch.label(), batch.rows, batch.classes, ignore_index);
  Tensor losses = batch.empty({batch.rows}), norms = batch.empty({batch.rows});
  Tensor state = batch.empty({batch.rows, kState});
  float *loss = (float*)losses.mutable_data_ptr(), *norm = (float*)norms.mutable_data_ptr();
  float* kept = (float*)state.mutable_data_ptr();
  batch.dispatch([&](auto element) {
    using T = decltype(element);
    const T* z = (const T*)batch.logits.const_data_ptr();
    for_rows(batch, [&](int64_t begin, int64_t end) {
      auto forward = std::make_unique<Forward<T>>(z, batch.stride, batch.label(), batch.classes, ignore_index);
      forward->run(begin, end, loss, norm, kept);
    });
  });
  return {losses, norms, state};
}

Tensor sample_losses_backward(Tensor grad, Tensor logits, Tensor labels, Tensor state, int64_t ignore_index) {
  const LabelledLogits batch(logits, labels);
  check_labels(batch.label(), batch.rows, batch.classes, ignore_index);
  state = batch.checked(grad, state);
  Tensor out = torch::stable::new_empty(batch.logits, {batch.rows, batch.classes});
  const int64_t *y = batch.label(), classes = batch.classes, step = grad.stride(0);
  const float *outer = (const float*)grad.const_data_ptr(), *kept = (const float*)state.const_data_ptr();
  batch.dispatch([&](auto element) {
    using T = decltype(element);
    const T* z = (const T*)batch.logits.const_data_ptr();
    T* to = (T*)out.mutable_data_ptr();
    for_rows(batch, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (y[i] == ignore_index) {
          std::fill_n(to + i * classes, classes, from_float<T>(0));
        } else {
          const float *row = kept + i * kState, g = outer[i * step];
          differentiate(z + i * batch.stride, to + i * classes, classes, row, row[2] * g);
          to[i * classes + y[i]] = from_float<T>(-row[3] * g);
        }
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(samplewise, CPU, m) {
  m.impl("sample_losses", TORCH_BOX(&sample_losses));
  m.impl("sample_losses_backward", TORCH_BOX(&sample_losses_backward));
}

}  // namespace samplewise
