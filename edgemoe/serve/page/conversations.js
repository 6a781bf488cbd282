// The conversations of this browser, and which of them is open. Saved files have the format of the chat's /save.
import { h } from "./dom.js";
import { load, save } from "./kept.js";

const fresh = () => ({ id: crypto.randomUUID?.() ?? String(Date.now() + Math.random()), system: "", turns: [] });

/** Returns the first `until` turns of a conversation as the messages of a request. */
export function messages(talk, until = talk.turns.length) {
  const system = talk.system.trim() ? [{ role: "system", content: talk.system }] : [];
  return [...system, ...talk.turns.slice(0, until).map(message)];
}

function message(turn) {
  if (turn.role === "tool") return { role: "tool", tool_call_id: turn.call, content: turn.text };
  if (!turn.calls?.length) return { role: turn.role, content: turn.text };
  const calls = turn.calls.map(({ id, name, words }) => ({ id, type: "function", function: { name, arguments: words } }));
  return { role: "assistant", content: turn.text, tool_calls: calls };
}

export function title(talk) {
  const first = talk.turns.find((turn) => turn.role === "user")?.text.trim() ?? "";
  return first ? first.slice(0, 60) : "New conversation";
}

export class Conversations {
  /** `changed` is called when another conversation is opened. */
  constructor(place, changed) {
    this.all = load("chats", []);
    if (!this.all.length) this.all = [fresh()];
    this.open = this.all[0];
    this.changed = changed;
    this.select = h("select", { "aria-label": "Conversation", onchange: () => this.choose(this.select.value) });
    this.file = h("input", { type: "file", accept: ".json,application/json", hidden: true, "aria-label": "Saved conversation",
      onchange: () => this.read(this.file.files[0]) });
    const button = (text, does) => h("button", { type: "button", className: "small", onclick: does }, text);
    this.said = h("span", { role: "status", className: "hint" });
    place.append(this.select, button("New", () => this.add(fresh())), button("Delete", () => this.drop()),
      button("Save to file", () => this.write()), button("Open file", () => this.file.click()), this.file, this.said);
    this.list();
  }

  list() {
    this.select.replaceChildren(...this.all.map((talk) => h("option", { value: talk.id }, title(talk))));
    this.select.value = this.open.id;
  }

  choose(id) {
    this.open = this.all.find((talk) => talk.id === id) ?? this.all[0];
    this.list();
    this.changed();
  }

  add(talk) {
    this.all.unshift(talk);
    this.keep();
    this.choose(talk.id);
  }

  drop() {
    this.all = this.all.filter((talk) => talk !== this.open);
    if (!this.all.length) this.all = [fresh()];
    this.keep();
    this.choose(this.all[0].id);
  }

  /** Saves all conversations in this browser. */
  keep() {
    const isKept = save("chats", this.all);
    this.said.textContent = isKept ? "" : "This browser has no room for more: delete or save conversations.";
    this.list();
  }

  write() {
    const text = JSON.stringify({ messages: messages(this.open).map(({ role, content }) => ({ role, content })) }, null, 1);
    const link = h("a", { href: URL.createObjectURL(new Blob([`${text}\n`], { type: "application/json" })), download: "chat.json" });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  }

  async read(file) {
    if (!file) return;
    try {
      const found = JSON.parse(await file.text()).messages;
      const isSound = found.every((m) => ["system", "user", "assistant"].includes(m.role) && typeof m.content === "string");
      if (!isSound) throw new TypeError();
      const turns = found.filter((m) => m.role !== "system").map((m) => ({ role: m.role, text: m.content }));
      this.add({ ...fresh(), system: found.filter((m) => m.role === "system").map((m) => m.content).join("\n\n"), turns });
    } catch {
      this.said.textContent = `${file.name}: not a saved chat; expected {"messages": [{"role", "content"}, …]}`;
    }
    this.file.value = "";
  }
}
