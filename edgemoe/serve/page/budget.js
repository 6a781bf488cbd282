// The budget bar: what each part takes of --ram, and the resident memory that the kernel counts.
import { bytes, h } from "./dom.js";

const PARTS = [
  ["process", "Process", "interpreter and libraries; --ram bounds it too"],
  ["server", "Server", "masks and connections; --no-grammar gives most of it back"],
  ["dense", "Dense weights", "--dense-bits"],
  ["kv", "Contexts", "keys and values; -c, -np, -ctk and -ctv change it"],
  ["scratch", "Scratch", "of one pass"],
  ["experts", "Experts", "what the rest is for"],
  ["free", "Free", "kept for what the process may grow by"],
];

export class Budget {
  constructor(place) {
    this.bar = h("div", { className: "bar", role: "img" });
    this.legend = h("ul", { className: "legend" });
    this.said = h("p", { className: "hint" });
    place.append(this.bar, this.legend, this.said);
  }

  begin(all) {
    this.budget = all.budget;
    this.rows = PARTS.map(([name, text, hint]) => {
      const piece = h("span", { className: `piece of-${name}`, title: hint });
      const size = h("span", { className: "size" });
      return { name, text, piece, size, line: h("li", { title: hint }, h("span", { className: `key of-${name}` }), `${text} `, size) };
    });
    this.kernel = h("span", { className: "kernel" });
    this.bar.replaceChildren(...this.rows.map((r) => r.piece), this.kernel);
    this.legend.replaceChildren(...this.rows.map((r) => r.line));
  }

  now(now) {
    const b = this.budget;
    const taken = { process: b.process, server: b.server, dense: b.dense, kv: b.kv, scratch: b.scratch, experts: now.resident };
    taken.free = Math.max(0, b.ram - Object.values(taken).reduce((sum, n) => sum + n, 0));
    for (const { name, piece, size } of this.rows) {
      piece.style.flexGrow = taken[name] / b.ram;
      size.textContent = name === "experts" ? `${bytes(taken[name])} of ${bytes(Math.min(now.slots, b.experts))}`
        : name === "kv" ? `${bytes(Math.min(now.kv, b.kv))} of ${bytes(b.kv)}` : bytes(taken[name]);
    }
    this.kernel.style.left = `${Math.min(100, (100 * now.rss) / b.ram)}%`;
    this.said.textContent = `The kernel counts ${bytes(now.rss)} of ${bytes(b.ram)} (the red line).`;
    this.bar.setAttribute("aria-label", `Memory: ${bytes(now.rss)} of ${bytes(b.ram)} taken; experts ${bytes(now.resident)}`);
  }
}
