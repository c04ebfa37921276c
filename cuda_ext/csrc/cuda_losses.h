// The kernels of cuda_losses.cu as structs of phases.h: a block of kThreads threads a row; 32 suffice for 256 classes.
#pragma once
#include "losses.h"

#ifdef __CUDACC__
#define SW_UNROLL _Pragma("unroll")
#else
#define SW_UNROLL _Pragma("GCC unroll 8")
#endif

namespace samplewise {

// Eight classes in a row, loaded and stored 16 bytes at a time where the address allows.
template <class T>
struct Group {
  static constexpr int kWords = 2 * sizeof(T);
  uint32_t words[kWords] = {};

  SW_HD float get(int e) const {
    if constexpr (sizeof(T) == 4) {
      return float_of(words[e]);
    } else {
      return to_float(T{(uint16_t)(words[e / 2] >> (16 * (e % 2)))});
    }
  }

  SW_HD void set(int e, T value) {
    if constexpr (sizeof(T) == 4) {
      words[e] = bits_of(value);
    } else {
      const int by = 16 * (e % 2);
      words[e / 2] = (words[e / 2] & (0xffff0000u >> by)) | ((uint32_t)value.bits << by);
    }
  }

  // Those of `classes` classes that begin at `from`; -inf beyond the last.
  SW_HD void load(const T* row, int64_t from, int64_t classes) {
    if (((uintptr_t)(row + from) & 15) == 0 && from + kGroup <= classes) {
#ifdef __CUDA_ARCH__
SW_UNROLL
      for (int i = 0; i < kWords / 4; ++i) ((uint4*)words)[i] = __ldcs((const uint4*)(row + from) + i);
#else
      memcpy(words, row + from, sizeof words);
#endif
    } else {
SW_UNROLL
      for (int e = 0; e < kGroup; ++e) set(e, from + e < classes ? row[from + e] : from_float<T>(-INFINITY));
    }
  }

  SW_HD void store(T* row, int64_t from, int64_t classes) const {
    if (((uintptr_t)(row + from) & 15) == 0 && from + kGroup <= classes) {
#ifdef __CUDA_ARCH__
SW_UNROLL
      for (int i = 0; i < kWords / 4; ++i) __stcs((uint4*)(row + from) + i, ((const uint4*)words)[i]);
#else
      memcpy(row + from, words, sizeof words);
#endif
    } else {
SW_UNROLL
      for (int e = 0; e < kGroup; ++e)
        if (from + e < classes) row[from + e] = from_float<T>(get(e));
    }
  }
};

template <class T, int kThreads>
struct SampleLosses {
  const T* logits;
  int64_t stride;  // elements between rows
  const int64_t* labels;
  float *losses, *norms, *state;
  int64_t classes, ignored;

  struct Shared {
    Lane lanes[kThreads];
    float maxima[kThreads];
    float shift;
    bool again;
  };
  static constexpr int kPhases = 7;
  static_assert(kThreads % kParts == 0 && kThreads * kGroup <= kLanes);

  template <int phase>
  SW_HD void run(uint32_t block, uint32_t thread, Shared& shared) const {
    const int64_t label = labels[block];
    const T* row = logits + block * stride;
    if (label == ignored) {
      if (phase == 0 && thread == 0) write(block, Row{});
    } else if constexpr (phase == 0) {
      shared.lanes[thread] = gathered<false>(row, label, thread, 0);
    } else if constexpr (phase == 1) {
      fold(shared, thread);
    } else if constexpr (phase == 2) {
      if (thread == 0) shared.again = !finish<false>(block, row, label, shared);
    } else if (shared.again) {
      if constexpr (phase == 3) shared.maxima[thread] = maximum(row, thread);
      if constexpr (phase == 4) {
        float most = shared.maxima[0];
        for (int i = 1; i < kThreads; ++i) most = fmaxf(most, shared.maxima[i]);
        if (thread == 0) shared.shift = most;
        shared.lanes[thread] = gathered<true>(row, label, thread, most);
      }
      if constexpr (phase == 5) fold(shared, thread);
      if constexpr (phase == 6)
        if (thread == 0) finish<true>(block, row, label, shared);
    }
  }

 private:
  // The sum of a thread's lanes, the label left out.
  template <bool shifted>
  SW_HD Lane gathered(const T* row, int64_t label, uint32_t thread, float shift) const {
    Lane lanes[kGroup];
    Group<T> next;
    int64_t from = (int64_t)thread * kGroup;
    if (from < classes) next.load(row, from, classes);
    while (from < classes) {
      const Group<T> group = next;
      const int64_t own = label - from;
      from += kThreads * kGroup;
      if (from < classes) next.load(row, from, classes);  // on its way while this one is summed
      float z[kGroup], place[kGroup];
      SW_UNROLL
      for (int e = 0; e < kGroup; ++e) z[e] = shifted ? group.get(e) - shift : group.get(e);
      if (own >= 0 && own < kGroup) {
        SW_UNROLL
        for (int e = 0; e < kGroup; ++e) z[e] = select(e == own, -INFINITY, z[e]);
      }
      bool any = false;
      SW_UNROLL
      for (int e = 0; e < kGroup; ++e) {
        place[e] = placed(z[e], lanes[e].origin);
        any |= outgrows(place[e]);
      }
      if (any) {
        SW_UNROLL
        for (int e = 0; e < kGroup; ++e) {
          if (outgrows(place[e])) lanes[e] = raised(z[e], lanes[e]);
          place[e] = placed(z[e], lanes[e].origin);
        }
      }
      SW_UNROLL
      for (int e = 0; e < kGroup; ++e) lanes[e] = added(z[e], place[e], lanes[e]);
    }
    return total<kGroup>(lanes);
  }

  template <int count>
  static SW_HD Lane total(Lane* lanes) {
    float origin = lanes[0].origin;
    SW_UNROLL
    for (int i = 1; i < count; ++i) origin = select(lanes[i].origin < origin, lanes[i].origin, origin);
    SW_UNROLL
    for (int i = 0; i < count; ++i) lanes[i] = rescaled(lanes[i], origin);
    halve<count / 2>(lanes);
    return lanes[0];
  }

  template <int half>
  static SW_HD void halve(Lane* lanes) {
    SW_UNROLL
    for (int i = 0; i < half; ++i) {
      lanes[i].sum += lanes[i + half].sum;
      lanes[i].squares += lanes[i + half].squares;
    }
    if constexpr (half > 1) halve<half / 2>(lanes);
  }

  static SW_HD void fold(Shared& shared, uint32_t thread) {
    if (thread >= kParts) return;
    Lane lanes[kThreads / kParts];
    SW_UNROLL
    for (int i = 0; i < kThreads / kParts; ++i) lanes[i] = shared.lanes[thread + i * kParts];
    shared.lanes[thread] = total<kThreads / kParts>(lanes);
  }

  template <bool shifted>
  SW_HD bool finish(uint32_t block, const T* row, int64_t label, Shared& shared) const {
    Lane lanes[kParts];
    SW_UNROLL
    for (int i = 0; i < kParts; ++i) lanes[i] = shared.lanes[i];
    const Lane others = normalised(total<kParts>(lanes));
    const bool inside = label >= 0 && label < classes;
    const float own = inside ? to_float(row[label]) : NAN;
    const float shift = shifted ? shared.shift : 0.0f;
    if (!shifted && inside && !settled(others, own)) return false;
    write(block, finished(others, own - shift, shift));
    return true;
  }

  SW_HD float maximum(const T* row, uint32_t thread) const {
    float most = -INFINITY;
    for (int64_t from = (int64_t)thread * kGroup; from < classes; from += kThreads * kGroup) {
      Group<T> group;
      group.load(row, from, classes);
      SW_UNROLL
      for (int e = 0; e < kGroup; ++e) most = fmaxf(most, group.get(e));
    }
    return most;
  }

  SW_HD void write(uint32_t block, const Row& row) const {
    losses[block] = row.loss;
    norms[block] = row.norm;
    float* kept = state + (int64_t)block * kState;
    kept[0] = row.shift, kept[1] = row.origin, kept[2] = row.inverse, kept[3] = row.complement;
  }
};

template <class T, int kThreads>
struct SampleLossesBackward {
  const float* grad;
  int64_t grad_stride;
  const T* logits;
  int64_t stride;
  const int64_t* labels;
  const float* state;
  T* grad_logits;  // contiguous
  int64_t classes, ignored;
  uint32_t pieces;  // blocks a row

  struct Shared {};
  static constexpr int kPhases = 1;
  static constexpr int kRounds = 4;  // groups that a thread does
  static constexpr int kPiece = kThreads * kGroup * kRounds;

  template <int phase>
  SW_HD void run(uint32_t block, uint32_t thread, Shared&) const {
    const int64_t row = block / pieces;
    const int64_t begin = (int64_t)(block % pieces) * kPiece + thread * kGroup;
    const int64_t label = labels[row];
    const float* kept = state + row * kState;
    const float outer = grad[row * grad_stride];
    const float shift = kept[0], origin = kept[1], coefficient = kept[2] * outer;
    SW_UNROLL
    for (int round = 0; round < kRounds; ++round) {
      const int64_t from = begin + round * kThreads * kGroup;
      if (from >= classes) return;
      Group<T> group;
      group.load(logits + row * stride, from, classes);
      SW_UNROLL
      for (int e = 0; e < kGroup; ++e) {
        float value = share_of_gradient(group.get(e), shift, origin, coefficient);
        if (from + e == label) value = -kept[3] * outer;
        group.set(e, from_float<T>(label == ignored ? 0.0f : value));
      }
      group.store(grad_logits + row * classes, from, classes);
    }
  }
};

}  // namespace samplewise
