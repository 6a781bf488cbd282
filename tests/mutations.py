"""Small mistakes that a test has to notice; `scripts/mutate` makes them, one at a time.

Each names the tests that should see it, so that trying one takes seconds. One that is known to go unnoticed says why
nobody can notice it.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MUTATIONS", "Mutation"]


@dataclass(frozen=True)
class Mutation:
    """Is one mistake: in `file`, `old`, which is there exactly once, becomes `new`."""

    area: str
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    """Files or tests of pytest, or one of the core's own programs."""
    survives: str = ""
    """Why no test can notice it; empty where one must."""


CACHE = ("tests/core/test_cache.py", "tests/core/test_resident.py", "core_test")
READS = ("reads_test",)
KERNELS = ("tests/core/test_kernels.py",)
ATTENTION = ("tests/model/test_attention.py",)
RINGS = (
    "tests/model/test_attention.py", "tests/model/test_key_biases.py", "tests/runtime/test_rings.py",
    "tests/runtime/test_budget.py",
)  # fmt: skip
PARTIAL = ("tests/file/test_partial.py",)
WHOLE = ("tests/file/test_whole.py",)
SECTIONS = ("tests/file/test_add_sections.py", "tests/file/test_partial.py")
SAMPLER = ("tests/text/test_sampler.py",)
SCHEDULERS = ("tests/scheduler/test_schedulers.py",)
NEXT_USE = ("tests/scheduler/test_next_use.py", "tests/scheduler/test_schedulers.py")
ORACLE = ("tests/model/test_oracle.py",)
ROOM = ("tests/runtime/test_room.py",)
BUDGET = ("tests/runtime/test_budget.py",)
SEQUENCES = ("tests/runtime/test_sequences.py", "tests/model/test_state.py")
STORE = ("tests/core/test_cache.py", "tests/runtime/test_engine.py")
FORMAT = ("tests/file/test_format.py", "tests/file/test_parse.py")

MUTATIONS = (
    # ------------------------------------------------------------ the cache's books
    Mutation("cache", "trimmed slots keep their pages", "csrc/cache_room.cpp",
             "  backing_->release(slot, size_t(keep) * kPage, size_t(s.pages) * kPage);\n", "", CACHE),
    Mutation("cache", "the host gives no pages back", "csrc/backing.cpp",
             "    memory_.release(size_t(slot) * window_ + begin, end - begin);\n", "", CACHE),
    Mutation("cache", "one page more than the budget", "csrc/cache_room.cpp",
             "  while (committed_pages_ + pages > budget_pages_) {",
             "  while (committed_pages_ + pages > budget_pages_ + 1) {", CACHE),
    Mutation("cache", "a lower budget drops nothing", "csrc/cache_room.cpp",
             "  if (make_room(0, -1, true)) return;\n", "  return;\n", CACHE),
    Mutation("cache", "an upgrade may evict its own lower rungs", "csrc/cache_room.cpp",
             "  pins_[e] += 1;  // an upgrade", "  pins_[e] += 0;  // an upgrade", CACHE),
    Mutation("cache", "what is wanted soon is dropped as all else", "csrc/cache_requests.cpp",
             "  for (int e : ahead_list_) note(e);\n", "", CACHE),
    Mutation("cache", "a use counts once, however many tokens", "csrc/cache_requests.cpp",
             "    policy_.use(e, offsets[i + 1] - offsets[i]);", "    policy_.use(e, 1);", CACHE),
    Mutation("cache", "hits are counted as misses", "csrc/cache_requests.cpp",
             "    stats_.hits += 1;", "    stats_.misses += 1;", CACHE),
    Mutation("cache", "a failed read is no error", "csrc/cache_requests.cpp",
             "    if (!ok && error && !*error) *error = why;\n", "", (*CACHE, "tests/runtime/test_engine.py")),
    Mutation("cache", "a read that failed keeps the pages of higher rungs", "csrc/cache_requests.cpp",
             "    trim(slot, pages_at(e, levels_[e]));\n", "", CACHE),
    Mutation("cache", "an upgrade reads the lower rungs again", "csrc/cache_requests.cpp",
             "bytes_at(e, from), size_t(need) * kPage, is_ahead}", "0, size_t(need) * kPage, is_ahead}", CACHE),
    Mutation("cache", "reads ahead start though wanted ones wait", "csrc/cache_requests.cpp",
             "  if (load_waiting()) load_ahead();\n}\n\n/// A fetch ended",
             "  load_waiting();\n  load_ahead();\n}\n\n/// A fetch ended", (*CACHE, *READS),
             "where a wanted expert finds no room, one that is ahead finds none either, unless it is smaller"),
    Mutation("cache", "what was read ahead and is used now is not counted", "csrc/cache_requests.cpp",
             "      stats_.ahead_used += 1;\n", "", CACHE),
    Mutation("victims", "a changed layer is not looked through again", "csrc/victims.cpp",
             "    if (!row.is_known || row.version != policy.version(layer)) row = look_through(layer, policy);",
             "    if (!row.is_known) row = look_through(layer, policy);", CACHE),
    Mutation("victims", "of equals the highest slot goes", "csrc/victims.cpp",
             "(score == least && slots_[size_t(row.best)] < slots_[size_t(victim)])",
             "(score == least && slots_[size_t(row.best)] > slots_[size_t(victim)])", CACHE),
    Mutation("victims", "the second lowest is not kept when a lower one comes", "csrc/victims.cpp",
             "    row.best = expert;\n    row.next = best;", "    row.best = expert;", CACHE),
    Mutation("policy", "uses never count less", "csrc/policy.cpp",
             "      weight_ /= left;", "      weight_ /= 1.0;", CACHE),
    Mutation("policy", "lru is by the oldest use", "csrc/policy.cpp",
             "last_[size_t(expert)] = step_;", "last_[size_t(expert)] = -step_;", CACHE),
    # ------------------------------------------------------------ reads
    Mutation("loader", "what is ahead goes first", "csrc/loader.cpp",
             "now_.empty() && active_ahead_ < most_ahead_ ? ahead_ : now_",
             "!ahead_.empty() && active_ahead_ < most_ahead_ ? ahead_ : now_", READS),
    Mutation("loader", "reads ahead may take every thread", "csrc/loader.cpp",
             "most_ahead_(std::max(1, num_threads - 1))", "most_ahead_(num_threads)", READS),
    Mutation("loader", "checksums are not compared", "csrc/loader.cpp",
             "    if (crc == c.crc) continue;", "    if (crc != crc + 1) continue;",
             ("tests/runtime/test_engine.py", "tests/file/test_format.py", "tests/core/test_cache.py")),
    Mutation("loader", "what is promoted stays behind", "csrc/loader.cpp",
             "    now_.push_back(job);\n  }\n  has_job_", "    ahead_.push_back(job);\n  }\n  has_job_", READS),
    Mutation("loader", "cancelled reads are done all the same", "csrc/loader.cpp",
             "    queue->erase(at);\n", "", READS),
    # ------------------------------------------------------------ kernels
    Mutation("kernels", "the middle of a group is one step off", "csrc/kernels/kernels-inl.h",
             "0.5f - float(1 << (bits - 1)) - 8 * step", "0.5f - float(1 << (bits - 1)) - 7 * step", KERNELS),
    Mutation("kernels", "many tokens add halves in another order", "csrc/kernels/kernels-inl.h",
             "return V::fma(V::set(x_scale), V::fma(scales[1], b, V::mul(scales[0], a)), acc);",
             "return V::fma(V::set(x_scale), V::fma(scales[0], a, V::mul(scales[1], b)), acc);", ORACLE,
             "one order is as good as another: all kernels share this one"),
    Mutation("kernels", "rows beyond the matrix are written", "csrc/kernels/kernels-inl.h",
             "for (int i = 0; i < rows; ++i) y[i] = all[i];", "for (int i = 0; i < kTileRows; ++i) y[i] = all[i];",
             KERNELS),
    Mutation("kernels", "the last few tokens are left out", "csrc/kernels/kernels-inl.h",
             "for (int j = 0; j < here; ++j) dot(Count<1>()", "for (int j = 1; j < here; ++j) dot(Count<1>()", KERNELS),
    Mutation("experts", "gates are not used", "csrc/expert.cpp",
             "gates[size_t(t) * K + i], cols, o)", "1.0f, cols, o)", (*ORACLE, *KERNELS)),
    Mutation("experts", "the last part of a token is left out", "csrc/expert.cpp",
             "      for (int i = 0; i < K; ++i) {", "      for (int i = 0; i + 1 < K; ++i) {", ORACLE),
    # ------------------------------------------------------------ attention
    Mutation("rings", "a ring is one position short", "csrc/kv.cpp",
             "size_t(window) + size_t(tokens) - 1, kKeyBlock", "size_t(window) + size_t(tokens) - 2, kKeyBlock", RINGS),
    Mutation("rings", "what would be written over is not refused", "csrc/kv.cpp",
             "int64_t(window) + T - 1 <= kv.capacity", "int64_t(window) - 1 <= kv.capacity", RINGS),
    Mutation("rings", "positions that keys lack are those of the first round", "csrc/mixers/attention.cpp",
             "queries[i].turns += size_t(before) * 2 * queries[i].half;", "queries[i].turns += 0;", RINGS),
    Mutation("rings", "snapshots are not saved before they are written over", "edgemoe/model/kv.py",
             "and self._seen(length) < first:", "and self._seen(length) < first - 1:", RINGS),
    Mutation("rings", "one position that was written over is gone back to", "edgemoe/model/kv.py",
             "if self._first <= self._seen(length):", "if self._first <= self._seen(length) + 1:", RINGS),
    Mutation("rings", "what a snapshot brought back is thought to reach further", "edgemoe/model/kv.py",
             "            self._first = self._seen(reached)\n", "            self._first = 0\n", RINGS),
    Mutation("rings", "small rings grow", "csrc/kv.cpp",
             "kv->bytes >= kHugeKvBytes || resident", "kv->bytes >= kHugeKvBytes",
             ("tests/core/test_resident.py",)),
    Mutation("rings", "a chunk may take what its rings need", "edgemoe/runtime/budget.py",
             "b.scratch + b.kv <= limit", "b.scratch + small.kv <= limit", RINGS),
    Mutation("attention", "a window is one position too long", "csrc/mixers/attention.cpp",
             "std::max(begin, position + 1 - s.window)", "std::max(begin, position - s.window)", ATTENTION),
    Mutation("attention", "biases of values are not added", "csrc/mixers/attention.cpp",
             "  for (int i = 0; v_bias_ && i < width; ++i) v[i] += v_bias_[i];\n", "",
             (*ATTENTION, "tests/model/test_key_biases.py")),
    Mutation("attention", "clipping has no lower end", "csrc/mixers/attention.cpp",
             "std::min(std::max(x[i], -p_.clip), p_.clip)", "std::min(x[i], p_.clip)", ATTENTION),
    Mutation("attention", "norms after RoPE are left out", "csrc/mixers/attention.cpp",
             "  if (norm && p_.norm_after_rope) norm_heads();\n", "", (*ATTENTION, *ORACLE)),
    Mutation("attention", "what a cache cannot hold is stored", "csrc/mixers/kv_store.cpp",
             "    return all_finite(halves, head_dim);", "    return true;", ATTENTION),
    # ------------------------------------------------------------ the store, experts, engine
    Mutation("store", "all experts are of layer 0", "edgemoe/store.py",
             "plan.experts + self._first[plan.layer]", "plan.experts + self._first[0]", STORE),
    Mutation("store", "the last group is not given", "edgemoe/store.py",
             "while left and (group := self.cache.next()):", "while left > 1 and (group := self.cache.next()):", STORE),
    Mutation("experts", "skipped slots are not counted", "edgemoe/experts.py",
             "        self.skipped += plan.rows.size - len(plan.tokens)\n", "", (*STORE, *SCHEDULERS)),
    Mutation("sequence", "of a batch only the first sequence's tokens count", "edgemoe/runtime/model.py",
             "        for part in batch.slices:\n            part.state.commit(",
             "        for part in batch.slices[:1]:\n            part.state.commit(", SEQUENCES),
    Mutation("sequence", "a broken pass leaves no trace", "edgemoe/model/state.py",
             "        self.is_dirty = True\n\n    def commit", "\n    def commit", SEQUENCES),
    Mutation("sequence", "going back keeps the tokens", "edgemoe/model/state.py",
             "        del self.ids[length:]\n", "", SEQUENCES),
    Mutation("sequence", "a reply starts from one token too many", "edgemoe/runtime/sequence.py",
             "    if held[: len(given)] == given:\n        return len(given)\n",
             "    if held[: len(given)] == given:\n        return len(given) + 1\n",
             ("tests/runtime/test_engine.py", "tests/runtime/test_chat.py")),
    Mutation("sequence", "negative tokens are taken", "edgemoe/runtime/sequence.py",
             "    if tokens.min() < 0 or tokens.max() >= vocab_size:", "    if tokens.max() >= vocab_size:",
             ("tests/runtime/test_engine.py",)),
    # ------------------------------------------------------------ the budget
    Mutation("budget", "page tables take nothing", "edgemoe/runtime/budget.py",
             "tables=ram // 480,", "tables=0,", (*BUDGET, "tests/runtime/test_limit.py")),
    Mutation("budget", "a second sequence takes nothing", "edgemoe/runtime/budget.py",
             "kv=sequences * sum(layers),", "kv=sum(layers),", (*BUDGET, *SEQUENCES)),
    Mutation("budget", "one expert need not fit", "edgemoe/runtime/budget.py",
             "if least.room < expert or ram < opening:", "if least.room < 0 or ram < opening:", BUDGET),
    Mutation("budget", "the dense weights take nothing", "edgemoe/runtime/budget.py",
             "        return self.process + self.growth + self.tables + self.dense + self.kv + self.scratch",
             "        return self.process + self.growth + self.tables + self.kv + self.scratch",
             (*BUDGET, "tests/runtime/test_limit.py")),
    Mutation("room", "what a sequence grows by is not taken from the slots", "edgemoe/runtime/room.py",
             "        return states + self._tokens * self._budget.row",
             "        return self._tokens * self._budget.row", ROOM),
    Mutation("room", "a chunk takes nothing", "edgemoe/runtime/room.py",
             "        return states + self._tokens * self._budget.row", "        return states", ROOM),
    Mutation("room", "the process is never measured", "edgemoe/runtime/room.py",
             "            self._base = self._measured() - self._counted()", "            pass", ROOM),
    Mutation("room", "measuring leaves no slack", "edgemoe/runtime/room.py",
             "+ budget.tables + late + budget.slack", "+ budget.tables + late", ROOM),
    Mutation("room", "what is lent stays with the experts", "edgemoe/runtime/room.py",
             "            self._resize(self._left(size))", "            self._resize(self._left())", ROOM),
    Mutation("room", "a trace does not hold the slots", "edgemoe/runtime/model.py",
             "        self.room.hold()  #", "        pass  #", ROOM),
    # ------------------------------------------------------------ files
    Mutation("writer", "a record is logged before it is on the disk", "edgemoe/file/partial.py",
             "        os.fsync(self._file.fileno())\n        lines =", "        lines =", PARTIAL),
    Mutation("writer", "the preamble does not wait for the index", "edgemoe/file/partial.py",
             "            os.fsync(self._file.fileno())\n            pwrite(self._file, ending.preamble, 0)",
             "            pwrite(self._file, ending.preamble, 0)", PARTIAL),
    Mutation("writer", "the name does not wait for the preamble", "edgemoe/file/partial.py",
             "            os.fsync(self._file.fileno())\n            self._require_unchanged()",
             "            self._require_unchanged()", PARTIAL),
    Mutation("writer", "what another process wrote is replaced", "edgemoe/file/partial.py",
             "            self._require_unchanged()\n            rename(", "            rename(", PARTIAL),
    Mutation("writer", "a partial file of something else is gone on with", "edgemoe/file/partial.py",
             "        if lines[:1] != [fingerprint]:", "        if not lines[:1]:", PARTIAL),
    Mutation("writer", "logged records are not checked", "edgemoe/file/partial.py",
             "            if at < end or crc != expected:", "            if at < end:", PARTIAL),
    Mutation("writer", "room on the disk is not asked for", "edgemoe/file/partial.py",
             "        if free < wanted:", "        if free < 0:", PARTIAL),
    Mutation("whole", "a link under our own name is followed", "edgemoe/file/whole.py",
             "os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK", "os.O_RDWR | os.O_NONBLOCK", (*WHOLE, *PARTIAL)),
    Mutation("whole", "a file that was replaced before the lock is kept", "edgemoe/file/whole.py",
             "                if is_at(file, target):\n", "                if True:\n", (*WHOLE, *PARTIAL)),
    Mutation("whole", "a file gets its name before it is on the disk", "edgemoe/file/whole.py",
             "                os.fsync(fd)\n", "", WHOLE),
    Mutation("whole", "the mode of a file is lost", "edgemoe/file/whole.py",
             "                    os.fchmod(fd, mode & 0o777)", "                    pass", WHOLE),
    Mutation("whole", "an error leaves the temporary file", "edgemoe/file/whole.py",
             "                os.unlink(temporary)", "                pass", WHOLE),
    Mutation("sections", "the preamble does not wait for the sections", "edgemoe/file/append.py",
             "        os.fsync(fd)\n    except OSError:", "    except OSError:", SECTIONS),
    Mutation("sections", "what was added to a replaced file is lost silently", "edgemoe/file/append.py",
             "        if not is_at(file, target):\n            raise _replaced(path)\n", "", SECTIONS),
    # ------------------------------------------------------------ sampling
    Mutation("sampler", "top_k keeps one more", "edgemoe/text/sampler.py",
             '    return ids[np.argsort(-logits[ids], kind="stable")[:k]]',
             '    return ids[np.argsort(-logits[ids], kind="stable")[: k + 1]]', SAMPLER),
    Mutation("sampler", "top_p leaves out the token that crosses it", "edgemoe/text/sampler.py",
             "params.top_p * total)) + 1\n", "params.top_p * total))\n", SAMPLER),
    Mutation("sampler", "temperature multiplies", "edgemoe/text/sampler.py",
             "np.exp(gaps / params.temperature)", "np.exp(gaps * params.temperature)", SAMPLER),
    Mutation("sampler", "negative logits are divided by the penalty", "edgemoe/text/sampler.py",
             "np.where(hit > 0, hit / params.repeat_penalty, hit * params.repeat_penalty)",
             "hit / params.repeat_penalty", SAMPLER),
    Mutation("sampler", "a frequency penalty counts a token once", "edgemoe/text/sampler.py",
             "hit - counts * params.frequency_penalty", "hit - params.frequency_penalty", SAMPLER),
    Mutation("sampler", "first tokens are banned always", "edgemoe/text/sampler.py",
             "    if is_first:\n        banned", "    if True:\n        banned", SAMPLER),
    Mutation("sampler", "the seed is not used", "edgemoe/text/sampler.py",
             "random.Random(None if params.seed == -1 else params.seed)", "random.Random(None)", SAMPLER),
    Mutation("sampler", "of equals the last is taken", "edgemoe/text/sampler.py",
             "        best = int(logits.argmax())", "        best = len(logits) - 1 - int(logits[::-1].argmax())",
             SAMPLER),
    # ------------------------------------------------------------ schedulers
    Mutation("next-use", "frequencies do not decay", "csrc/guesses.cpp",
             "uses[e] *= left;", "uses[e] *= 1.0;", NEXT_USE),
    Mutation("next-use", "margins are not averaged", "csrc/use_rows.cpp",
             "average[e] += (margin[e] - average[e]) * share;", "average[e] = margin[e];", NEXT_USE),
    Mutation("next-use", "rows of a lesson are not kept", "edgemoe/scheduler/predict.py",
             "            features.keep(layer)\n", "            pass\n", NEXT_USE),
    Mutation("next-use", "the soonest used goes first", "edgemoe/scheduler/evict.py",
             "        odds *= -L\n", "        odds *= L\n", NEXT_USE),
    Mutation("look-ahead", "guesses of any rank are read", "edgemoe/scheduler/look_ahead.py",
             "worth = self._right >= _WORTH * self._seen", "worth = self._right >= 0.0 * self._seen",
             ("tests/model/test_look_ahead.py", *SCHEDULERS)),
    Mutation("hobbit", "the most demanding token does not decide", "edgemoe/scheduler/hobbit.py",
             "        np.maximum.at(most, routing.experts, wanted)\n", "        most[routing.experts] = wanted\n",
             SCHEDULERS),
    Mutation("levers", "top-p keeps one expert less", "edgemoe/scheduler/levers.py",
             "sums[i - 1] > most", "sums[i] > most", SCHEDULERS),
    Mutation("levers", "cache-prior never reads what it displaced", "edgemoe/scheduler/combined.py",
             "        if displaced is not None and levers.admit:", "        if displaced is None and levers.admit:",
             SCHEDULERS),
)  # fmt: skip
