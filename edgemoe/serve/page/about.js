// The panel "Model": which model runs, and how.
import { bytes, h } from "./dom.js";

export class About {
  constructor(place) {
    this.list = h("dl");
    place.append(this.list);
  }

  begin(all) {
    const rows = [
      ["Name", all.name], ["Family", all.family], ["File", bytes(all.file_bytes)], ["Levels", `${all.level_bits.join(", ")} bits`],
      ["Experts", `${all.layers} layers × ${all.experts}, ${all.set.experts} for each token`],
      ["Experts run at", `${all.set.is_auto ? "their own bits, at most " : ""}${all.set.bits} bits`], ["Other weights", all.dense_bits === "auto" ? "their own bits" : `${all.dense_bits} bits`],
      ["Context", `${all.context} tokens`], ["Keys and values", all.kv_types.join(" and ")], ["Scheduler", all.set.scheduler],
      ["Answers", all.notes.length ? all.notes.join("; ") : "exact"], ["Calls of tools", all.tools],
      ["Server", `edgemoe ${all.version}, ${all.isa}, ${all.threads} threads`], ["Fingerprint", all.fingerprint],
    ];
    this.list.replaceChildren(...rows.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
  }
}
