"""Planted mistakes in a device's kernels: they lose exactness, a barrier, a wait or a bound. See tests/mutations.py."""

# ruff: noqa: E501
from __future__ import annotations

from mutation import Mutation

__all__ = ["DEVICE"]

PLAIN = ("tests/core/test_device.py",)
MIXERS = ("tests/core/test_device_mixers.py",)
ENGINE = ("tests/runtime/test_on_device.py",)
CHOICE = ("tests/core/test_device_choice.py",)
REPEATED = ("tests/runtime/test_repeated_work.py",)


def _of(file: str, tests: tuple[str, ...], *mistakes: tuple[str, ...]) -> list[Mutation]:
    """Returns the mistakes of one file under csrc/cuda; each is a name, the old text, the new text, why it survives."""
    return [
        Mutation("device", name, f"csrc/cuda/{file}", old, new, tests, *survives)
        for name, old, new, *survives in mistakes
    ]


DEVICE = (
    *_of(
        "exact.cuh", PLAIN,
        ("e^x is not clamped from below", "at_most(88.0f, at_least(-87.0f, x))", "at_most(88.0f, x)"),
        ("e^x makes a number of NaN", "  return max_of(least, x);", "  return max_of(x, least);"),
        ("e^x rounds its exponent down", "const float n = rintf(x * 1.44", "const float n = floorf(x * 1.44"),
        ("dot products do not add the padding", "acc = fmaf(0.0f, 0.0f, acc);  // the", ";  // the"),
        ("sums of lanes begin with the nearest", "for (int d = 8; d > 0; d >>= 1) v = v",
         "for (int d = 1; d < 16; d <<= 1) v = v"),
        ("a softmax has no highest score", "const float e = exact_exp(x[i] - highest);", "const float e = exact_exp(x[i]);"),
        ("scores that are no numbers are passed over", "most = max_of(most, __shfl_down_sync(kAllLanes, most, d, 16));",
         "most = max_of(__shfl_down_sync(kAllLanes, most, d, 16), most);",
         "e^x keeps NaN: all weights are NaN, whatever the highest score is taken to be"),
        ("a softmax does not wait before it scales", "inverse = 1.0f / total;\n  __syncwarp();",
         "inverse = 1.0f / total;",
         "lanes of the simulator meet in the shuffle before it; on a device a shuffle orders no memory"),
    ),
    *_of(
        "exact.cuh", MIXERS,
        ("softplus ends one term early", "  float p = 2.0f / 17;\n", "  float p = 0;\n"),
        ("gelu's cube is fused otherwise", "fmaf(gate * gate, k * 0.044715f, k) * gate",
         "(gate * gate * (k * 0.044715f) + k) * gate"),
        ("a clamped gate has no upper end", "const float g = min_of(7.0f, gate)", "const float g = gate"),
        ("a clamped up has no lower end", "min_of(7.0f, max_of(-7.0f, up))", "min_of(7.0f, up)"),
        ("relu2 takes what is negative", "const float positive = max_of(0.0f, up);", "const float positive = up;"),
        ("relu2 makes a zero of what is no number", "const float positive = max_of(0.0f, up);",
         "const float positive = up > 0.0f ? up : 0.0f;"),
    ),
    *_of(
        "codes.cuh", PLAIN,
        ("wide rungs begin with the narrow plane", "if (width & 2) append_plane<2>(rung, half, row, codes);\n  rung += 128 * (width & 2);\n  if (width & 1) append_plane<1>(rung, half, row, codes);",
         "if (width & 1) append_plane<1>(rung, half, row, codes);\n  rung += 128 * (width & 1);\n  if (width & 2) append_plane<2>(rung, half, row, codes);"),
        ("scales of the next tile are not found", "    tile += stride;\n    find_scales();", "    tile += stride;"),
        ("a prefix walks on by the bytes of a rung", "at[r] += strides[r];", "at[r] += strides[0];"),
    ),
    *_of(
        "products.cuh", PLAIN,
        ("shares are summed before all are there", "  __device__ __forceinline__ void add(const QuantizedRows& x, int n, const float* shared, int first, int count) {\n    __syncthreads();",
         "  __device__ __forceinline__ void add(const QuantizedRows& x, int n, const float* shared, int first, int count) {"),
        ("the next segment is written while the last is summed", "shares[i * kTileRows], acc);\n    }\n    __syncthreads();",
         "shares[i * kTileRows], acc);\n    }"),
        ("scales of activations are those of the first segment", "scales + kScales * first;", "scales;"),
        ("tokens beyond the last are computed", "        if (t >= n) break;\n        const size_t tile", "        const size_t tile",
         "nobody reads what comes of them, and scratch has room for more tokens than any product"),
        ("rows beyond the last are written", "if (t >= T || t >= n || row >= w.rows) return;", "if (t >= T || t >= n) return;"),
        ("the first tokens' rows are every block's", "from = head * p.n + token;", "from = head * p.n;"),
        ("lowest of MWQ forgets its signs", "      for (int r = 1; r < w.num_rungs; ++r) {\n        lowest = lowest -", "      for (int r = 1; r < 1; ++r) {\n        lowest = lowest -"),
        ("a sign's scale is half", "rung.template add<T>(x, n, tile, seat, sign + sign, parts);", "rung.template add<T>(x, n, tile, seat, sign, parts);"),
        ("any ladder is taken for the default one", "yes = yes && (r >=", "yes = yes || (r >="),
    ),
    *_of(
        "products.cuh", MIXERS,
        ("corrections are added without their middle", "float(dot) - 7.5f * z->sum", "float(dot)"),
        ("a correction's halves are swapped", "dot = dot4(both >> 4 & 0x0f0f0f0fu", "dot = dot4(both & 0x0f0f0f0fu"),
        ("all heads have the first one's inputs", "from = head * p.n + token;", "from = token;"),
    ),
    *_of(
        "ranks.cuh", MIXERS,
        ("u is not multiplied in", "const float v = load_f16(call.u, j) * z[j]", "const float v = z[j]"),
        ("V x is quantised before it is there", "    if (lane == 0) z[r] = sum;\n  }\n  __syncthreads();", "    if (lane == 0) z[r] = sum;\n  }"),
        ("ranks beyond the last are what was there", "    float sum = 0;\n    if (r < call.rank)", "    float sum = 1;\n    if (r < call.rank)"),
    ),
    *_of(
        "rows.cuh", PLAIN,
        ("activations round half up", "int(rintf(v * inverse))", "int(floorf(v * inverse + 0.5f))"),
        ("tiny activations are divided by", "!(highest > 1e-30f) || poisoned", "!(highest > 0.0f) || poisoned"),
        ("sums are of 32 columns", "for (int d = 8; d > 0; d >>= 1) sum += __shfl_down_sync(kAllLanes, sum, d, 16);",
         "for (int d = 16; d > 0; d >>= 1) sum += __shfl_down_sync(kAllLanes, sum, d, 32);"),
        ("a norm's sum is read before it is there", "    if (threadIdx.x == 0) total[0] = sum;\n  }\n  __syncthreads();", "    if (threadIdx.x == 0) total[0] = sum;\n  }"),
        ("parts are combined in the other order", "for (int k = 0; k < K; ++k) {", "for (int k = K - 1; k >= 0; --k) {"),
        ("rows that are skipped are taken", "if (row >= 0) acc = fmaf", "acc = fmaf"),
        ("a gate's scale is multiplied after the sum", "scale = scale * gate[0];", "scale = gate[0];"),
    ),
    *_of(
        "rows.cuh", PLAIN,
        ("a mailbox says that all is there before it is", "  __threadfence_system();\n  __syncthreads();\n  if", "  __threadfence_system();\n  if"),
        ("a mailbox sends its first array only", "    to += call.sizes[i];\n  }\n  __threadfence", "    to += call.sizes[0];\n  }\n  __threadfence"),
    ),
    *_of(
        "heads.cuh", PLAIN,
        ("codes of keys are not clamped", "rintf(min_of(max_of(v * inverse, -127.0f), 127.0f))", "rintf(v * inverse)"),
        ("values have no bias", "change.bias ? mine[i] + change.bias[head * hd + i] : mine[i]", "change.bias && change.rotate ? mine[i] + change.bias[head * hd + i] : mine[i]"),
        ("clipping has no lower end", "const float low = x[i] < -call.clip ? -call.clip : x[i];", "const float low = x[i];"),
        ("queries do not grow", "const float grown = call.grown && place < first_k ? call.grown[t] : 1.0f;", "const float grown = 1.0f;"),
        ("keys grow too", "call.grown && place < first_k ?", "call.grown && place < first_v ?"),
        ("what does not fit is not noted", "if (!__any_sync(kAllLanes, !fits)) return;", "return;"),
    ),
    *_of(
        "attend.cuh", PLAIN,
        ("later blocks are not merged", "for (int b = first + 1; b <= last; ++b) {", "for (int b = first + 1; b < last; ++b) {"),
        ("a sink has a value", "all.add(0.0f, call.sinks[head], 1.0f)", "all.add(1.0f, call.sinks[head], 1.0f)"),
        ("a sink is merged before the bias", "if (call.out_bias) all.value", "if (call.out_bias && !call.sinks) all.value"),
        ("a ring's rounds are forgotten", "const int before = base / call.kv.capacity * call.kv.capacity;", "const int before = 0;"),
        ("scores are read before they are there", "    __syncthreads();\n    if (warp < n) {", "    if (warp < n) {"),
        ("the offset of keys' codes is lost", "int dot = -128 * with.sums[i * groups + g];", "int dot = 0;"),
    ),
    *_of(
        "attend.cuh", MIXERS,
        ("latents' lanes begin at the first position", "for (int s = from / 16 * 16 + lane;", "for (int s = from + lane;",
         "latents have no windows, so that blocks begin at multiples of 256"),
        ("latents' codes keep their offset", "4 * (s % 16) + c % 4)) - 128);", "4 * (s % 16) + c % 4)));"),
    ),
    *_of(
        "mixers.cuh", MIXERS,
        ("a convolution's window does not move", "for (int j = 0; j + 1 < kMaxTaps; ++j) window[j] = window[j + 1];", ";"),
        ("taps that are not there are added", "y = j >= skipped ? fmaf(w[j], window[j], y) : y;", "y = fmaf(w[j], window[j], y);"),
        ("a convolution begins without what was before", "j < kMaxTaps - 1 && before ?", "j < kMaxTaps - 1 && false ?"),
        ("the delta rule reads before it decays", "held = fmaf((from ? from[i * dv] : 0.0f) * decay[i * each], k[i], held);", "held = fmaf(from ? from[i * dv] : 0.0f, k[i], held);"),
        ("the delta rule's state is that of its start", "for (int t = 0; t < T; ++t, from = state) {\n    const float *q", "for (int t = 0; t < T; ++t) {\n    const float *q"),
        ("decays of channels are the first one's", "each = s.decay_per_channel ? 1 : 0", "each = 0"),
        ("keys have the queries' length", "is_key ? call.k_weight : call.q_weight", "call.q_weight"),
        ("a bounded decay has no bound", "kDecayBound * sigmoid(rate * at)", "sigmoid(rate * at)"),
        ("Mamba-2 passes nothing by", "float out = call.skip[head] * x;", "float out = 0;"),
        ("Mamba-2's groups are the first one's", "size_t(head / (s.num_heads / s.groups)) * s.state_dim", "size_t(0) * s.state_dim"),
        ("a gate comes after the norm", "if constexpr (kKind == Gate::kSiluFirst) {\n    for", "if constexpr (kKind == Gate::kSilu) {\n    for"),
        ("norms of groups have the first one's weight", "weight_per_group ? size_t(int(blockIdx.x) % groups) * width : 0", "0"),
    ),
    *_of(
        "heads.cuh", MIXERS,
        ("latents' queries are not turned", "for (int i = lane; s.rotates && i < half; i += 32) {", "for (int i = lane; is_key && s.rotates && i < half; i += 32) {"),
        ("latents' keys have no norm", "    norm_head(mine, call.norm, call.norm_eps, s.latent_dim);", "    ;"),
    ),
    *_of(
        "choose.cuh", CHOICE,
        ("of equal scores the higher expert is chosen", "value == other.value && of < other.of", "value == other.value && of > other.of"),
        ("groups go by their best expert", "const bool sum = rule.group_by_two && size > 1;", "const bool sum = false;"),
        ("a logit that is no number is passed over", "if (any_poisoned(poison)) {", "if (false) {"),
        ("what is no number is chosen in any order", "if (__any_sync(kAllLanes, is_odd)) {", "if (false) {"),
        ("gates of a device's choice are not scaled", "if (rule.gate_scale != 1.0f) gate = gate * rule.gate_scale;", ";"),
    ),
    *_of(
        "products.cuh", REPEATED,
        ("chosen experts have the first one's bias", "size_t(e) * call.rows : nullptr", "size_t(0) : nullptr"),
        ("chosen experts are the first ones", "call.table + 3 * e + call.first + part", "call.table + 3 * k + call.first + part"),
    ),
    *(
        Mutation("device", name, file, old, new, REPEATED)
        for name, file, old, new in (
            ("repeated attention stays in its first blocks", "edgemoe/ops/notes.py", "return first // _core.KEY_BLOCK, pos // _core.KEY_BLOCK", "return 0, 0"),
            ("repeated work stays at its position", "edgemoe/ops/notes.py", "if self._pos != pos:", "if self._pos < 0:"),
            ("what failed while it was noted stays so", "edgemoe/ops/notes.py", "                self._forget(self._ws.end_noting())\n                raise", "                raise"),
            ("sequences share what is repeated", "edgemoe/model/decoder.py", "(batch.slices[0].state.number, batch.variant", "(0, batch.variant"),
            ("what is repeated outlives a change", "edgemoe/model/decoder.py", "        self._ops.forget_work()\n", ""),
            ("recurrent states take turns unseen", "edgemoe/model/recurrent.py", "tuple(id(arrays) for both in parts[0][0].values() for arrays in both)", "()"),
            ("tables are not filled anew", "edgemoe/ops/cuda/ahead.py", "where != self._where or", "self._where is None or"),
            ("experts that left are chosen", "edgemoe/model/decoder.py", "ahead = ahead and self._routers.ahead(is_start=False)", "pass"),
            ("who looks on sees no plan", "edgemoe/experts.py", "if self.observer is not None or not scheduler", "if not scheduler"),
            ("what ran ahead is not counted", "edgemoe/model/decoder.py", "self._experts.count(ran)", "pass"),
        )
    ),
)  # fmt: skip
