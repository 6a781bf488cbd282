"""Planted mistakes in looked-up rows, recorded work, sketches, pruning, prefixes and codes; see tests/mutations.py."""

from __future__ import annotations

from mutation import Mutation

__all__ = ["ROWS"]

STORED = ("tests/core/test_stored_rows.py",)
EMBEDDING = ("tests/runtime/test_embedding.py",)
NOTES = ("tests/runtime/test_repeated_layers.py",)
SKETCH = ("tests/convert/test_sketch.py",)
PRUNE = ("tests/convert/test_prune.py",)
PREFIXES = ("tests/runtime/test_prefixes.py",)
CODES = ("tests/quant/test_quantize.py",)

ROWS = (
    # ------------------------------------------------------------ rows that are looked up in the file
    Mutation("rows", "of several rows in a block all are the first", "csrc/stored_rows.cpp",
             "if (id != before) row = decode_one(id);", "if (before < 0) row = decode_one(id);", STORED),
    Mutation("rows", "rows that were read last are not kept", "csrc/stored_rows.cpp",
             "  recent_ids_[at] = id;\n", "", STORED),
    Mutation("rows", "rungs that are missing are not summed", "csrc/stored_rows.cpp",
             "  check_rung(*file_, name_, int(rung), crc, stored.crcs[rung]);\n", "", (*STORED, *EMBEDDING)),
    Mutation("rows", "a block is not compared with what it was", "csrc/stored_rows.cpp",
             "if (verify_ && crc != part.sums[block]) {", "if (verify_ && crc != crc) {", (*STORED, *EMBEDDING)),
    Mutation("rows", "a failed read is no error", "csrc/stored_rows.cpp",
             "    if (!jobs_[i].error) continue;\n", "    if (i < jobs_.size()) continue;\n", STORED),
    Mutation("rows", "all blocks have the first one's correction", "csrc/stored_rows.cpp",
             "correction_ + u + size_t(block) * codes", "correction_ + u", STORED),
    Mutation("rows", "all blocks have the first one's scales", "csrc/stored_rows.cpp",
             "scales_ + size_t(block) * kTileRows * sizeof(uint16_t)", "scales_", STORED),
    Mutation("rows", "the last number is not scaled", "csrc/stored_rows.cpp",
             "scale != 1.0f && i < n * cols;", "scale != 1.0f && i + 1 < n * cols;", STORED),
    # ------------------------------------------------------------ work that is noted
    Mutation("notes", "what is repeated stays at its position", "csrc/bindings/work.h",
             "ws.notes.add([&ws, work = std::move(work)] { work(ws.notes.pos); });",
             "ws.notes.add([pos, work = std::move(work)] { work(pos); });", NOTES),
    Mutation("notes", "steps that were forgotten count", "csrc/notes.h",
             "    size_ -= found->second.size();\n", "", NOTES),
    Mutation("notes", "steps have no bound", "edgemoe/ops/notes.py",
             "        return self._cpu_ws.noted >= MOST_STEPS", "        return False", NOTES),
    Mutation("notes", "pieces have no bound", "edgemoe/ops/notes.py",
             "            if len(self._made) >= MOST_NOTED:", "            if False:", NOTES),
    Mutation("ahead", "a layer that has lost an expert stays ahead", "edgemoe/ops/cpu/ahead.py",
             "whole if is_start else self._layers & whole", "whole if is_start else self._layers", NOTES),
    Mutation("ahead", "other levels are the same work", "edgemoe/ops/cpu/ahead.py",
             "(slots, levels, rule), self._wish)", "(slots, self._wish[1], rule), self._wish)", NOTES),
    Mutation("ahead", "what routers chose ahead is not counted", "edgemoe/model/decoder.py",
             "            self._experts.routed += (len(ran) - before) * config.experts_per_token\n", "", NOTES),
    # ------------------------------------------------------------ conversion
    Mutation("sketch", "the weakest directions are kept", "edgemoe/convert/carve/sketch.py",
             ".T[: -_RANK - 1 : -1]", ".T[:_RANK]", SKETCH),
    Mutation("sketch", "what directions do not tell is lost", "edgemoe/convert/carve/sketch.py",
             "        np.fill_diagonal(out, np.maximum(squares, out.diagonal()))\n", "", SKETCH),
    Mutation("sketch", "every expert saw one token", "edgemoe/convert/carve/sketch.py",
             "            return hidden * count.astype(np.float32)[:, None]", "            return hidden", SKETCH),
    Mutation("prune", "what made up already is not counted", "edgemoe/convert/prune.py",
             "        inverse = (inverse - inverse[:, gone] @ shares)[np.ix_(stay, stay)]",
             "        inverse = inverse[np.ix_(stay, stay)]", PRUNE),
    Mutation("prune", "columns cost what they did at first", "edgemoe/convert/prune.py",
             "        w = (w - w[:, gone] @ shares)[:, stay]", "        w = w[:, stay]", PRUNE),
    Mutation("prune", "experts that saw few tokens are changed too", "edgemoe/convert/prune.py",
             "if moments is None or self._calibration.count(name) < self._calibration.min_tokens:",
             "if moments is None:", PRUNE),
    Mutation("prune", "products of the whole expert stay", "edgemoe/convert/prune.py",
             "found is None or kept is None else found[np.ix_(kept, kept)]",
             "found is None or kept is None else found[: len(kept), : len(kept)]", PRUNE),
    # ------------------------------------------------------------ prefixes
    Mutation("prefixes", "files of another version are used", "edgemoe/runtime/prefix_store.py",
             'if meta.get("edgemoe_prefix") != _VERSION or meta', "if meta", PREFIXES),
    Mutation("prefixes", "bits of single matrices do not matter", "edgemoe/runtime/prefix_store.py",
             '        most = "" if tensor.most is None else tensor.most\n', '        most = ""\n', PREFIXES),
    # ------------------------------------------------------------ the choice of codes
    Mutation("codes", "later columns of a group do not follow", "csrc/kernels/quantize-inl.h",
             "      if (!any) continue;\n", "      if (any >= 0) continue;\n", CODES),
    Mutation("codes", "other groups do not follow", "csrc/refine.cpp",
             "    if (changed) follow(first, moves);\n", "", CODES),
    Mutation("codes", "gradients keep the scales of before", "csrc/refine.cpp",
             "gain * seen[at] - whole_[at]", "seen[at] - whole_[at]", CODES),
    Mutation("codes", "codes are searched upwards only", "csrc/kernels/quantize-inl.h",
             "for (int step = -1; step <= 1; step += 2)", "for (int step = 1; step <= 1; step += 2)", CODES),
    Mutation("codes", "a row that moved is done", "csrc/refine.cpp",
             "is_done_ = ~moved_ & 0xffff;", "is_done_ = moved_;", CODES),
    Mutation("codes", "the full search tries no smaller scale", "csrc/kernels/quantize-inl.h",
             "kBelow = kThorough ? 2 : 0,", "kBelow = 0,", CODES),
    Mutation("codes", "two row blocks get the codes of the first", "csrc/quantize.cpp",
             "store(coded[size_t(block)], i + block,", "store(coded[0], i + block,", CODES),
    Mutation("codes", "far from zero there is one middle", "csrc/kernels/quantize-inl.h",
             "V::add(V::min(V::max(middle, V::zero()), V::set(15)), V::set(0.5f))",
             "V::add(middle, V::set(0.5f))", CODES),
)  # fmt: skip
