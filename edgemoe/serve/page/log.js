// The last requests: their figures, and none of their texts.
import { bytes, h, percent, seconds } from "./dom.js";

const MOST = 200;
const HEADS = ["Time", "Route", "Status", "Prompt", "Kept", "Made", "First token", "Tokens/s", "Hits", "Read", "Bits", "End", "Without effect", "Hash"];

export class Log {
  constructor(place) {
    this.entries = [];
    this.body = h("tbody");
    place.append(h("div", { className: "wide", tabIndex: 0, role: "region", "aria-label": "Last requests" },
      h("table", {}, h("thead", {}, h("tr", {}, HEADS.map((text) => h("th", { scope: "col" }, text)))), this.body)),
      h("p", { className: "hint" }, "Since the server started, at most 200. Texts are not kept."));
  }

  begin(all) {
    if (!all.log) return;
    this.body.replaceChildren();
    this.add(all.log);
    delete all.log;
  }

  now(now) { if (now.log) this.add(now.log); }

  add(entries) {
    for (const entry of entries) this.body.prepend(h("tr", {}, row(entry).map((text) => h("td", {}, text))));
    while (this.body.rows.length > MOST) this.body.lastChild.remove();
  }
}

function row(e) {
  const time = new Date(1000 * e.at).toLocaleTimeString();
  if (e.end === undefined) return [time, e.route, `${e.status}`, ...Array(HEADS.length - 3).fill("")];
  const uses = e.hits + e.misses;
  return [
    time, e.route, `${e.status}`, `${e.prompt}`, `${e.cached}`, `${e.made}`, seconds(e.queue_s + e.prompt_s),
    e.made > 1 && e.decode_s ? ((e.made - 1) / e.decode_s).toFixed(1) : "", uses ? percent(e.hits / uses) : "",
    bytes(e.read), `${e.bits}`, e.end, e.ignored.join(", "), e.hash ? `#${e.hash}` : "",
  ];
}
