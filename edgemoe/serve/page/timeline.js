// The last five minutes: tokens per second, the hit rate, bytes read, and the share of time spent waiting for reads.
import { h } from "./dom.js";
import { colour } from "./theme.js";
import uPlot from "./vendor/uplot.js";

const SPAN = 300; // seconds
const STEP = 1;
const LINES = [
  ["made", "tokens/s", "--line-1", "n", (v) => v.toFixed(1)], ["computed", "prompt tokens/s", "--line-2", "n", (v) => v.toFixed(0)],
  ["hits", "% hits", "--line-3", "%", (v) => v.toFixed(1)], ["waited", "% of the time waiting for reads", "--line-5", "%", (v) => v.toFixed(0)],
  ["read", "MiB read/s", "--line-4", "n", (v) => v.toFixed(0)],
];

export class Timeline {
  constructor(place) {
    this.place = place;
    this.box = h("div");
    this.legend = h("ul", { className: "legend" });
    place.append(this.box, this.legend);
    addEventListener("resize", () => this.plot?.setSize({ width: this.width(), height: 170 }));
    addEventListener("themechange", () => { if (this.plot) this.make(); });
  }

  width() { return Math.max(200, this.place.clientWidth || 600); }

  begin(all) {
    if (!all.log) return;
    this.rows = [];
    this.before = null;
    this.make();
  }

  now(now) {
    const t = performance.now() / 1000, c = now.count;
    if (!this.before) { this.before = { t, c }; return; }
    const s = t - this.before.t;
    if (s < STEP) return;
    const d = Object.fromEntries(Object.keys(c).map((name) => [name, c[name] - this.before.c[name]]));
    this.before = { t, c };
    const uses = d.hits + d.misses;
    if (s > 3 * STEP) this.rows.push([t - s + 0.01, 0, 0, null, 0, 0]); // the server sends nothing while nothing happens
    this.rows.push([t, d.made / s, d.computed / s, uses ? (100 * d.hits) / uses : null, Math.min(100, (100 * d.wait_s) / s), d.read / s / 2 ** 20]);
    while (this.rows.length && this.rows[0][0] < t - SPAN) this.rows.shift();
    this.draw();
  }

  draw() {
    const end = performance.now() / 1000, last = this.rows.at(-1);
    const columns = [0, 1, 2, 3, 4, 5].map((i) => this.rows.map((row) => (i ? row[i] : row[0] - end)));
    if (this.place.offsetParent) this.plot.setData(columns);
    this.legend.replaceChildren(...LINES.map(([, text, line, , say], i) => {
      const mark = h("span", { className: "key" });
      mark.style.background = colour(line);
      const value = last?.[i + 1];
      return h("li", {}, mark, `${text}: ${value === null || value === undefined ? "–" : say(value)}`);
    }));
  }

  make() {
    this.plot?.destroy();
    const ink = colour("--muted"), grid = { stroke: colour("--edge"), width: 1 };
    const axis = { stroke: ink, grid, ticks: grid, font: "11px system-ui" };
    this.plot = new uPlot({
      width: this.width(), height: 170, legend: { show: false }, cursor: { show: false },
      scales: { x: { time: false, range: [-SPAN, 0] }, "%": { range: [0, 100] }, n: { range: (_, low, high) => [0, Math.max(1, high || 1)] } },
      series: [{}, ...LINES.map(([, label, line, scale]) => ({ label, scale, stroke: colour(line), width: 1.5, points: { show: false } }))],
      axes: [{ ...axis, values: (_, ticks) => ticks.map((v) => `${v} s`) }, { ...axis, scale: "n", size: 44 },
        { ...axis, scale: "%", side: 1, size: 44, grid: { show: false }, values: (_, ticks) => ticks.map((v) => `${v}%`) }],
    }, [[], [], [], [], [], []], this.box);
    this.draw();
  }
}
