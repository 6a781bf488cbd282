// The residency map: a cell for each expert, whose colour shows how many of its bits are in memory. A cell flashes when
// its expert is read from disk. The map is drawn only when something changes, so that an open page costs little.
import { h } from "./dom.js";
import { colour } from "./theme.js";

const READ = 16, RAN = 32, LACKED = 64, BITS = 15;
const FADE = 4; // frames for which a flash lasts
const PAUSE = 400; // milliseconds after which the next frame is drawn even if the server sends nothing
const VIEWS = [["bits", "In memory"], ["reads", "Reads since the page opened"], ["runs", "Uses since the page opened"]];

/** Decodes base64 into bytes, or into words of `kind`. */
function decoded(text, kind = Uint8Array) {
  const raw = atob(text), out = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
  return kind === Uint8Array ? out : new kind(out.buffer);
}

export class ResidencyMap {
  constructor(place) {
    this.canvas = h("canvas", { tabIndex: 0, role: "img" });
    this.legend = h("ul", { className: "legend" });
    this.said = h("p", { className: "hint", role: "status" });
    this.select = h("select", { "aria-label": "What the map shows", onchange: () => this.draw() },
      VIEWS.map(([value, text]) => h("option", { value }, text)));
    place.append(h("div", { className: "row" }, this.select, (this.sum = h("span", { className: "hint" }))),
      this.canvas, this.legend, this.said);
    this.canvas.addEventListener("click", (event) => this.point(event));
    this.canvas.addEventListener("keydown", (event) => this.step(event));
    addEventListener("resize", () => this.draw());
    addEventListener("themechange", () => this.draw());
  }

  begin(all) {
    if (all.map === undefined) return;
    this.all = all;
    [this.layers, this.experts] = [all.layers, all.experts];
    // The longer of the two sides is horizontal; see `at`.
    this.columns = Math.max(this.layers, this.experts);
    this.rows = Math.min(this.layers, this.experts);
    this.isTurned = this.layers > this.experts;
    this.bits = decoded(all.map);
    delete all.map;
    const n = this.bits.length;
    this.flash = new Uint8Array(n);
    this.lacked = new Uint8Array(n);
    this.ran = new Uint8Array(n);
    this.reads = new Uint32Array(n);
    this.runs = new Uint32Array(n);
    this.cursor = -1;
    this.draw();
  }

  now(now) {
    clearTimeout(this.later);
    const hasFaded = this.fade();
    if (now.map) decoded(now.map).forEach((state, i) => this.put(i, state));
    else if (now.cells) for (const word of decoded(now.cells, Uint32Array)) this.put(word >>> 8, word & 255);
    else if (!hasFaded) return;
    this.draw();
    this.later = setTimeout(() => this.now({}), PAUSE);
  }

  /** Fades all flashes by a step; returns whether there were any. */
  fade() {
    const isNew = this.flash.some((f) => f > 0) || this.lacked.some((f) => f > 0) || this.ran.includes(1);
    if (!isNew) return false;
    for (const fading of [this.flash, this.lacked]) fading.forEach((f, i) => { if (f) fading[i] = f - 1; });
    this.ran.fill(0);
    return true;
  }

  /** Returns the column and the row of cell i, in the file's order of experts. */
  at(i) {
    const [layer, expert] = [Math.floor(i / this.experts), i % this.experts];
    return this.isTurned ? [layer, expert] : [expert, layer];
  }

  put(i, state) {
    this.bits[i] = state & BITS;
    if (state & READ) { this.flash[i] = FADE; this.reads[i] += 1; }
    if (state & LACKED) this.lacked[i] = FADE;
    if (state & RAN) { this.ran[i] = 1; this.runs[i] += 1; }
  }

  /** Sizes the canvas: cells as large as fit, 2 to 16 pixels; returns whether it is visible. */
  size() {
    const width = this.canvas.parentElement.clientWidth;
    if (!width) return false;
    const cell = Math.max(2, Math.min(16, Math.floor(width / this.columns)));
    this.cell = cell;
    const ratio = devicePixelRatio || 1;
    const [w, hgt] = [cell * this.columns, cell * this.rows];
    if (this.canvas.width !== w * ratio || this.canvas.height !== hgt * ratio) {
      Object.assign(this.canvas, { width: w * ratio, height: hgt * ratio });
      this.canvas.style.width = `${w}px`;
      this.canvas.style.height = `${hgt}px`;
    }
    return true;
  }

  colours() {
    const levels = [...this.all.level_bits].sort((a, b) => a - b);
    const of = { 0: colour("--absent") };
    levels.forEach((bits) => (of[bits] = colour(`--bits-${bits}`) || colour("--bits-8")));
    return { of, levels, flash: colour("--flash"), lacked: colour("--lacked"), ran: colour("--ran") };
  }

  draw() {
    if (!this.bits || !this.size()) return;
    const { of, levels, flash, lacked, ran } = this.colours();
    const pen = this.canvas.getContext("2d"), cell = this.cell, gap = cell > 3 ? 1 : 0;
    pen.setTransform(devicePixelRatio || 1, 0, 0, devicePixelRatio || 1, 0, 0);
    pen.clearRect(0, 0, cell * this.columns, cell * this.rows);
    const kind = this.select.value, counts = this[kind], most = kind === "bits" ? 0 : counts.reduce((a, b) => Math.max(a, b), 1);
    for (let i = 0; i < this.bits.length; i++) {
      const [x, y] = this.at(i).map((n) => n * cell);
      if (kind !== "bits") {
        pen.fillStyle = of[0];
        pen.fillRect(x, y, cell - gap, cell - gap);
        pen.globalAlpha = Math.sqrt(counts[i] / most);
        pen.fillStyle = kind === "reads" ? flash : of[levels.at(-1)];
        pen.fillRect(x, y, cell - gap, cell - gap);
        pen.globalAlpha = 1;
        continue;
      }
      pen.fillStyle = of[this.bits[i]];
      pen.fillRect(x, y, cell - gap, cell - gap);
      const fading = this.lacked[i] || this.flash[i]; // an expert that missed was read too
      if (fading) {
        pen.globalAlpha = fading / FADE;
        pen.fillStyle = this.lacked[i] ? lacked : flash;
        const edge = cell > 7 ? Math.floor(cell / 4) : 0; // so that the colour of the bits still shows around it
        pen.fillRect(x + edge, y + edge, cell - gap - 2 * edge, cell - gap - 2 * edge);
        pen.globalAlpha = 1;
      }
      if (this.ran[i] && cell > 4) {
        pen.strokeStyle = ran;
        pen.strokeRect(x + 0.5, y + 0.5, cell - gap - 1, cell - gap - 1);
      }
    }
    if (this.cursor >= 0) {
      pen.strokeStyle = colour("--text");
      pen.lineWidth = 2;
      const [x, y] = this.at(this.cursor).map((n) => n * cell);
      pen.strokeRect(x, y, cell, cell);
      pen.lineWidth = 1;
    }
    this.tell(of, levels);
  }

  tell(of, levels) {
    const held = {};
    for (const bits of this.bits) held[bits] = (held[bits] ?? 0) + 1;
    const here = this.bits.length - (held[0] ?? 0);
    const sum = `${here} of ${this.bits.length} experts (${this.layers} layers × ${this.experts}; a ${this.isTurned ? "column" : "row"} is a layer)`;
    this.sum.textContent = sum;
    this.canvas.setAttribute("aria-label", `Experts in memory: ${sum}. Arrow keys go from cell to cell.`);
    const key = (text, className, style) => {
      const mark = h("span", { className: `key ${className}` });
      if (style) mark.style.background = style;
      return h("li", {}, mark, text);
    };
    this.legend.replaceChildren(
      ...[0, ...levels].map((bits) => key(bits ? `${bits} bits: ${held[bits] ?? 0}` : `not in memory: ${held[0] ?? 0}`, "", of[bits])),
      key("read ahead just now", "of-flash"), key("wanted just now, and was not there", "of-lacked"), key("ran just now", "of-ran"));
    if (this.cursor >= 0) this.describe();
  }

  describe() {
    const i = this.cursor, bits = this.bits[i];
    this.said.textContent = `Layer ${Math.floor(i / this.experts)}, expert ${i % this.experts}: ${bits ? `${bits} bits in memory` : "not in memory"}; `
      + `read in ${this.reads[i]} and used in ${this.runs[i]} of the moments since the page opened.`;
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    const x = Math.floor((event.clientX - box.left) / this.cell), y = Math.floor((event.clientY - box.top) / this.cell);
    const [layer, expert] = this.isTurned ? [x, y] : [y, x];
    if (layer < this.layers && expert < this.experts) this.go(layer * this.experts + expert);
  }

  step(event) {
    const [across, down] = this.isTurned ? [this.experts, 1] : [1, this.experts];
    const by = { ArrowLeft: -across, ArrowRight: across, ArrowUp: -down, ArrowDown: down }[event.key];
    if (!by || !this.bits) return;
    event.preventDefault();
    const next = this.cursor < 0 ? 0 : this.cursor + by;
    if (next >= 0 && next < this.bits.length) this.go(next);
  }

  go(cell) {
    this.cursor = cell;
    this.draw();
  }
}
