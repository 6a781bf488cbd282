// The other models on the server's machine: how each would fit this server's memory, and the command that serves it.
import { call } from "./api.js";
import { bytes, h, percent } from "./dom.js";

const HEADS = ["Name", "Size", "Family", "Context", "In this server's memory", "To serve it instead"];

export class Shelf {
  /** `tell` is called with the server's answer each time it comes. */
  constructor(place, tell) {
    this.tell = tell;
    this.body = h("tbody");
    this.said = h("p", { className: "hint", role: "status" });
    place.append(
      h("div", { className: "wide", tabIndex: 0, role: "region", "aria-label": "Other models that are here" },
        h("table", {}, h("thead", {}, h("tr", {}, HEADS.map((text) => h("th", { scope: "col" }, text)))), this.body)),
      this.said, h("button", { type: "button", onclick: () => this.look() }, "Look again"));
  }

  begin(all) {
    const isNew = this.all === undefined || this.all.name !== all.name;
    this.all = all;
    if (isNew) this.look();
  }

  async look() {
    try {
      const told = await (await call("shelf")).json();
      this.show(told.models);
      this.tell(told);
    } catch (error) {
      this.said.textContent = error.message;
    }
  }

  show(models) {
    const ram = `${Math.round(this.all.budget.ram / 2 ** 20)}MiB`;
    this.body.replaceChildren(...models.map((model) => {
      if (model.broken) return h("tr", {}, h("td", {}, model.name), h("td", { colSpan: HEADS.length - 1, className: "error" }, model.broken));
      const best = model.plan.find((row) => row.resident !== undefined);
      const fits = model.plan.map((row) => (row.resident === undefined ? `${row.bits} bits: too large` : `${row.bits} bits: ${percent(row.resident)}`));
      const command = best ? `edgemoe serve ${model.name} --ram ${ram} --bits ${best.bits}` : "a larger --ram";
      return h("tr", {}, h("td", {}, model.name), h("td", {}, bytes(model.bytes)), h("td", {}, model.family), h("td", {}, `${model.context}`),
        h("td", {}, fits.join(", ")), h("td", {}, best ? h("code", {}, command) : command));
    }));
    this.said.textContent = models.length
      ? "Another model takes a new start: stop this server, and start it with the line. The shares are of experts in memory."
      : "There are no others: edgemoe pull user/repo gets one.";
  }
}
