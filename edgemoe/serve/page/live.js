// Settings that can be changed while the model runs: for all users of the server, from the next token on.
import { call } from "./api.js";
import { h, percent } from "./dom.js";

/** Formats the measured cost of a level. */
const said = (cost) => (cost.is_reference ? "the reference" : `${cost.change >= 0 ? "+" : ""}${(100 * cost.change).toFixed(2)} ± ${(100 * cost.error).toFixed(2)}%`);

export class Live {
  constructor(place) {
    const field = (label, ...inputs) => h("label", { className: "field" }, h("span", {}, label), inputs);
    this.bits = h("input", { type: "range", min: 0, step: 1, oninput: () => this.tell(), onchange: () => this.put({ bits: this.chosen() }) });
    this.shown = h("output");
    this.told = { quality: {}, measured_on: "", has_allocation: false };
    this.costs = h("div");
    this.experts = h("input", { type: "number", min: 1, step: 1, onchange: () => this.put({ experts: Number(this.experts.value) }) });
    this.scheduler = h("select", { onchange: () => this.put({ scheduler: this.scheduler.value }) });
    this.options = h("input", { spellcheck: false, placeholder: "name=value, name=value", onchange: () => this.putOptions() });
    this.said = h("p", { role: "status", className: "hint" });
    this.wrong = h("p", { role: "alert", className: "error" });
    this.restart = h("p", { className: "hint" });
    place.append(
      h("h3", {}, "The model, for all who use it, from the next token on"),
      h("div", { className: "bits" }, field("Bits of experts", this.bits), this.shown),
      this.costs,
      h("div", { className: "grid" }, field("Experts for each token", this.experts), field("Scheduler", this.scheduler),
        field("Its options", this.options)),
      this.wrong, this.said, this.restart,
    );
  }

  begin(all) {
    this.all = all;
    this.levels = all.level_bits.filter((bits) => bits <= all.most.bits);
    if (this.told.has_allocation) this.levels.push("auto");
    const at = this.levels.findIndex((bits) => (all.set.is_auto ? bits === "auto" : bits >= all.set.bits));
    this.bits.max = this.levels.length - 1;
    this.bits.value = at < 0 ? this.levels.length - 1 : at;
    this.experts.max = all.most.experts;
    this.experts.value = all.set.experts;
    this.scheduler.replaceChildren(...all.schedulers.map((name) => h("option", { value: name }, name)));
    this.scheduler.value = all.set.scheduler;
    this.options.value = Object.entries(all.set.options).map(([name, value]) => `${name}=${value}`).join(", ");
    this.said.textContent = all.notes.length ? all.notes.join("; ") : "exact: the file's bits and the model's own choice of experts";
    this.restart.textContent = "--ram, -c, -np, --dense-bits and -ctk, -ctv take a new start, as do more bits and experts than it was started with.";
    this.tell();
  }

  chosen() { return this.levels[Number(this.bits.value)]; }

  /** Takes what the server found in the model's file: the measured cost of levels, and whether it has an allocation. */
  know(told) {
    this.told = told;
    if (this.all) this.begin(this.all);
  }

  tell() {
    const chosen = this.chosen(), cost = this.told.quality[chosen];
    this.shown.value = chosen === "auto" ? "each expert its own" : `${chosen} of ${this.all.level_bits.at(-1)}`;
    this.bits.setAttribute("aria-valuetext", `${chosen} bits${cost ? `: ${said(cost)}` : ""}`);
    const rows = this.levels.filter((bits) => this.told.quality[bits]);
    if (!rows.length) {
      this.costs.replaceChildren(h("p", { className: "hint" }, `What fewer bits cost was not measured: edgemoe quality ${this.all.name} --store`));
      return;
    }
    const marked = (bits) => (bits === chosen ? { className: "chosen", "aria-current": "true" } : {});
    const line = (bits) => {
      const row = this.told.quality[bits];
      return h("tr", marked(bits), h("th", { scope: "row" }, bits === "auto" ? "auto" : `${bits} bits`), h("td", {}, said(row)),
        h("td", {}, row.same_top === undefined || row.same_top === null ? "" : percent(row.same_top)));
    };
    this.costs.replaceChildren(h("table", {}, h("caption", { className: "hint" }, `Measured on ${this.told.measured_on}`),
      h("thead", {}, h("tr", {}, ["Level", "Perplexity", "Same first choice"].map((text) => h("th", { scope: "col" }, text)))),
      h("tbody", {}, rows.map(line))));
  }

  putOptions() {
    const pairs = this.options.value.split(",").map((pair) => pair.trim()).filter(Boolean).map((pair) => pair.split("=").map((word) => word.trim()));
    this.put({ options: Object.fromEntries(pairs.map(([name, value]) => [name, value ?? "on"])) });
  }

  async put(body) {
    this.said.textContent = "Changing…";
    try {
      Object.assign(this.all, await (await call("settings", { body })).json());
      this.wrong.textContent = "";
    } catch (error) {
      this.wrong.textContent = error.message;
    }
    this.begin(this.all);
  }
}
