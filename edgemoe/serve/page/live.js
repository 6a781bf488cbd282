// What can be changed while the model runs: for all who use the server, from the next token on.
import { call } from "./api.js";
import { h } from "./dom.js";

export class Live {
  constructor(place) {
    const field = (label, ...inputs) => h("label", { className: "field" }, h("span", {}, label), inputs);
    this.bits = h("input", { type: "range", min: 0, step: 1, oninput: () => this.tell(), onchange: () => this.put({ bits: this.chosen() }) });
    this.shown = h("output");
    this.experts = h("input", { type: "number", min: 1, step: 1, onchange: () => this.put({ experts: Number(this.experts.value) }) });
    this.scheduler = h("select", { onchange: () => this.put({ scheduler: this.scheduler.value }) });
    this.options = h("input", { spellcheck: false, placeholder: "name=value, name=value", onchange: () => this.putOptions() });
    this.said = h("p", { role: "status", className: "hint" });
    this.wrong = h("p", { role: "alert", className: "error" });
    this.restart = h("p", { className: "hint" });
    place.append(
      h("h3", {}, "The model, for all who use it, from the next token on"),
      h("div", { className: "bits" }, field("Bits of experts", this.bits), this.shown),
      h("div", { className: "grid" }, field("Experts for each token", this.experts), field("Scheduler", this.scheduler),
        field("Its options", this.options)),
      this.wrong, this.said, this.restart,
    );
  }

  begin(all) {
    this.all = all;
    this.levels = all.level_bits.filter((bits) => bits <= all.most.bits);
    const at = this.levels.findIndex((bits) => bits >= all.set.bits);
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

  tell() {
    this.shown.value = `${this.chosen()} of ${this.all.level_bits.at(-1)}`;
    this.bits.setAttribute("aria-valuetext", `${this.chosen()} bits`);
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
