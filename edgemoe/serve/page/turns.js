// The view of one turn of a conversation.
import { bytes, h, percent, seconds } from "./dom.js";
import { shown } from "./markdown.js";

const NAMES = { user: "You", assistant: "Model", tool: "Result of a tool" };

export class Turn {
  /** `acts` has edit(text), again() and result(call, text). */
  constructor(turn, acts) {
    this.turn = turn;
    this.acts = acts;
    this.content = h("div", { className: "content" });
    this.foot = h("div", { className: "foot" });
    this.thought = h("details", { hidden: true }, (this.summary = h("summary")), (this.thoughts = h("div", { className: "thoughts" })));
    this.calls = h("div");
    this.element = h("article", { className: `turn ${turn.role}`, "aria-label": NAMES[turn.role] },
      h("h3", {}, NAMES[turn.role]), this.thought, this.content, this.calls, this.foot);
    this.draw(turn.isRunning);
  }

  /** Shows the turn as it is now. While it runs, draws are spaced so that they take a small share of the time. */
  draw(isRunning = false) {
    const now = performance.now();
    if (isRunning && now < (this.due ?? 0)) {
      this.later ??= setTimeout(() => { this.later = null; this.draw(true); }, this.due - now);
      return;
    }
    clearTimeout(this.later);
    this.later = null;
    this.show(isRunning && this.turn.isRunning);
    const end = performance.now();
    this.due = end + Math.max(60, 8 * (end - now));
  }

  show(isRunning) {
    const { role, text, reasoning, error, figures } = this.turn;
    if (role === "assistant") this.content.replaceChildren(shown(text));
    else this.content.replaceChildren(h("p", { className: "plain" }, text));
    this.showThoughts(reasoning, isRunning && !text);
    this.showCalls(isRunning);
    const parts = [];
    if (isRunning) parts.push(h("span", { className: "hint" }, this.turn.state ?? "Waiting"));
    if (error) parts.push(h("span", { className: "error", role: "alert" }, error));
    if (this.turn.end && this.turn.end !== "stop") parts.push(h("span", {}, ENDS[this.turn.end] ?? this.turn.end));
    if (figures) parts.push(h("span", { className: "figures" }, said(figures)));
    if (!isRunning && role === "user") parts.push(this.button("Edit", () => this.edit()));
    if (!isRunning && role === "assistant") parts.push(this.button("Regenerate", this.acts.again));
    this.foot.replaceChildren(...parts);
  }

  showThoughts(reasoning, isRunning) {
    this.thought.hidden = !reasoning;
    if (!reasoning) return;
    const { thinking_s: s, thought } = this.turn;
    const took = s === undefined ? "" : `, ${seconds(s)}`;
    this.summary.textContent = isRunning ? `Reasoning${took}…` : `Reasoning: ${thought ? `${thought} tokens` : "done"}${took}`;
    this.thoughts.textContent = reasoning;
  }

  showCalls(isRunning) {
    this.calls.replaceChildren(...(this.turn.calls ?? []).map((call) => {
      const answer = h("textarea", { rows: 2, "aria-label": `Result of ${call.name}` });
      const send = this.button("Send result", () => this.acts.result(call, answer.value));
      return h("div", { className: "call" }, h("strong", {}, `Calls ${call.name}`), h("pre", { tabIndex: 0 }, pretty(call.words)),
        isRunning || call.isAnswered ? null : [answer, send]);
    }));
  }

  button(text, does) {
    return h("button", { type: "button", className: "small", onclick: does }, text);
  }

  edit() {
    const area = h("textarea", { value: this.turn.text, rows: Math.min(12, this.turn.text.split("\n").length + 2), "aria-label": "Edit message" });
    const done = () => this.draw();
    const send = () => this.acts.edit(area.value);
    area.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); send(); }
      if (event.key === "Escape") { event.stopPropagation(); done(); }
    });
    this.content.replaceChildren(area);
    this.foot.replaceChildren(this.button("Send", send), this.button("Cancel", done));
    area.focus();
  }
}

const ENDS = { length: "Ended: no more tokens allowed or no room", stopped: "Stopped", tool_calls: "Calls tools" };

function pretty(words) {
  try {
    return JSON.stringify(JSON.parse(words), null, 2);
  } catch {
    return words;
  }
}

/** Formats the figures of a reply. */
function said({ timings: t, edgemoe: e }) {
  const first = (t.queue_ms + t.prompt_ms) / 1000;
  return [
    t.predicted_per_second && `${t.predicted_per_second.toFixed(1)} tokens/s`, `first token after ${seconds(first)}`,
    `${t.predicted_n} tokens, ${t.prompt_n} of the prompt computed, ${t.cache_n} kept`, `${percent(e.hit_rate)} hits`,
    `${bytes(e.bytes_read)} read`, `${e.average_bits} bits`, `#${e.logits_hash}`,
    e.ignored.length && `without effect: ${e.ignored.join(", ")}`,
  ].filter(Boolean).join(" · ");
}
