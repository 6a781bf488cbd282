// The chat: requests replies and shows them as they arrive.
import { events } from "./api.js";
import { Conversations, messages } from "./conversations.js";
import { $ } from "./dom.js";
import { Turn } from "./turns.js";

export class Chat {
  /** `wanted` returns the fields of requests other than the messages. */
  constructor(wanted) {
    this.wanted = wanted;
    this.running = null;
    this.talks = new Conversations($("chats"), () => this.open());
    $("ask").addEventListener("submit", (event) => { event.preventDefault(); this.send(); });
    $("text").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); this.send(); }
    });
    $("stop").addEventListener("click", () => this.stop());
    document.addEventListener("keydown", (event) => { if (event.key === "Escape") this.stop(); });
    this.open();
  }

  get talk() { return this.talks.open; }

  open() {
    this.stop();
    this.talk.turns.forEach((turn) => delete turn.isRunning);
    this.draw();
    this.opened?.(this.talk);
  }

  draw() {
    this.views = this.talk.turns.map((turn, i) => this.view(turn, i));
    $("turns").replaceChildren(...this.views.map((view) => view.element));
    this.scroll(true);
  }

  view(turn, i) {
    return new Turn(turn, {
      edit: (text) => { this.cut(i); this.say({ role: "user", text }); },
      again: () => { this.cut(i); this.reply(); },
      result: (call, text) => { call.isAnswered = true; this.say({ role: "tool", call: call.id, text }, turn.calls.every((c) => c.isAnswered)); },
    });
  }

  cut(length) {
    this.stop();
    this.talk.turns.length = length;
    this.draw();
  }

  send() {
    const text = $("text").value;
    if (!text.trim() || this.running) return;
    $("text").value = "";
    this.say({ role: "user", text });
  }

  say(turn, asks = true) {
    this.add(turn);
    if (asks) this.reply();
  }

  add(turn) {
    const view = this.view(turn, this.talk.turns.push(turn) - 1);
    this.views.push(view);
    $("turns").append(view.element);
    this.talks.keep();
    this.scroll(true);
    return view;
  }

  scroll(always = false) {
    const turns = $("turns");
    const isNear = turns.scrollHeight - turns.scrollTop - turns.clientHeight < 120;
    if (always || isNear) turns.scrollTop = turns.scrollHeight;
  }

  stop() { this.running?.abort(); }

  /** Requests the next turn. If it is stopped, what has come so far is kept. */
  async reply() {
    const asked = messages(this.talk), running = (this.running = new AbortController());
    const turn = { role: "assistant", text: "", reasoning: "", calls: [], isRunning: true };
    const view = this.add(turn);
    this.busy(true);
    try {
      const body = { messages: asked, stream: true, stream_options: { include_usage: true }, ...this.wanted() };
      for await (const [, chunk] of events("v1/chat/completions", { body, signal: running.signal })) {
        if (chunk.error) throw new Error(chunk.error.message);
        take(turn, chunk);
        view.draw(true);
        this.scroll();
      }
    } catch (error) {
      if (running.signal.aborted) turn.end = "stopped";
      else turn.error = error instanceof TypeError ? "The server does not answer." : error.message;
    }
    delete turn.isRunning;
    delete turn.state;
    delete turn.began;
    view.draw();
    this.talks.keep();
    if (this.running === running) {
      this.running = null;
      this.busy(false);
    }
    this.scroll();
  }

  busy(isBusy) {
    $("send").disabled = isBusy;
    $("stop").hidden = !isBusy;
  }
}

/** Adds a chunk of the stream to a turn. */
function take(turn, chunk) {
  const choice = chunk.choices[0];
  if (chunk.timings) turn.figures = { timings: chunk.timings, edgemoe: chunk.edgemoe };
  const thought = chunk.usage?.completion_tokens_details?.reasoning_tokens;
  if (thought) turn.thought = thought;
  if (!choice) return;
  const { content, reasoning_content: reasoning, tool_calls: calls } = choice.delta;
  if (reasoning) {
    turn.began ??= performance.now();
    turn.reasoning += reasoning;
    turn.thinking_s = (performance.now() - turn.began) / 1000;
  }
  if (content) turn.text += content;
  for (const { index, id, function: said } of calls ?? []) {
    const call = (turn.calls[index] ??= { id, name: said.name, words: "" });
    call.words += said.arguments ?? "";
  }
  if (choice.finish_reason) turn.end = choice.finish_reason;
  turn.state = reasoning ? "Reasoning" : "Writing";
}
