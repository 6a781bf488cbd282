// Settings that act at once: how replies are sampled, and the form that they follow.
import { h } from "./dom.js";
import { load, save } from "./kept.js";
import { Live } from "./live.js";

const NUMBERS = [
  ["temperature", "Temperature", 0, 5, 0.05], ["top_k", "Top k", 0, 1000, 1], ["top_p", "Top p", 0, 1, 0.01],
  ["min_p", "Min p", 0, 1, 0.01], ["repeat_penalty", "Repeat penalty", 0.5, 2, 0.01],
  ["max_tokens", "Most tokens (-1: until it ends)", -1, 1e6, 1], ["seed", "Seed (-1: another each time)", -1, 2 ** 53, 1],
];

export class Settings {
  constructor(place) {
    this.place = place;
    this.own = load("settings", {});
    this.inputs = {};
    const field = (label, input, hint) => h("label", { className: "field" }, h("span", {}, label), input, hint ? h("small", {}, hint) : null);
    this.system = h("textarea", { rows: 3, oninput: () => { if (this.chat) { this.chat.talk.system = this.system.value; this.chat.talks.keep(); } } });
    this.thinks = h("select", { onchange: () => this.put("thinks", this.thinks.value) },
      h("option", { value: "" }, "as the model does"), h("option", { value: "off" }, "off"));
    this.schema = this.json("schema", "response_format");
    this.tools = this.json("tools", "tools");
    this.thinking = field("Reasoning", this.thinks);
    const live = h("div");
    this.live = new Live(live);
    place.append(
      live,
      h("h3", {}, "This conversation"), field("System text", this.system),
      h("h3", {}, "Sampling, from the next reply on"), h("div", { className: "grid" }, NUMBERS.map(([name, label, min, max, step]) => {
        const input = (this.inputs[name] = h("input", { type: "number", min, max, step, oninput: () => this.put(name, input.value) }));
        return field(label, input);
      })), this.thinking,
      h("h3", {}, "Form and tools"),
      field("JSON schema that replies keep to", this.schema.area), this.schema.said,
      field("Tools, as a JSON list of {\"type\": \"function\", \"function\": …}", this.tools.area), this.tools.said,
      h("button", { type: "button", onclick: () => this.reset() }, "As the server has it"),
    );
    this.show();
  }

  json(name) {
    const said = h("p", { className: "error", role: "status" });
    const area = h("textarea", { rows: 3, spellcheck: false, value: this.own[name] ?? "", oninput: () => {
      said.textContent = isJson(area.value) ? "" : "This is no JSON, and is not sent.";
      this.put(name, area.value);
    } });
    return { area, said };
  }

  follow(chat) {
    this.chat = chat;
    chat.opened = (talk) => (this.system.value = talk.system);
    this.system.value = chat.talk.system;
  }

  put(name, value) {
    if (value === "") delete this.own[name];
    else this.own[name] = value;
    save("settings", this.own);
  }

  reset() {
    this.own = {};
    save("settings", this.own);
    this.show();
  }

  show() {
    for (const [name] of NUMBERS) this.inputs[name].value = this.own[name] ?? "";
    this.thinks.value = this.own.thinks ?? "";
    this.schema.area.value = this.own.schema ?? "";
    this.tools.area.value = this.own.tools ?? "";
  }

  begin(all) {
    this.live.begin(all);
    for (const [name] of NUMBERS) this.inputs[name].placeholder = String(all.sampling[name]);
    this.thinking.hidden = !all.can_reason;
    this.schema.area.disabled = !all.can_form;
  }

  /** Returns the fields of a request other than its messages. */
  request() {
    const out = {};
    for (const [name] of NUMBERS) if (this.own[name] !== undefined && Number.isFinite(Number(this.own[name]))) out[name] = Number(this.own[name]);
    if (this.own.thinks === "off") out.enable_thinking = false;
    if (this.own.schema && isJson(this.own.schema)) {
      out.response_format = { type: "json_schema", json_schema: { name: "reply", schema: JSON.parse(this.own.schema) } };
    }
    if (this.own.tools && isJson(this.own.tools)) out.tools = JSON.parse(this.own.tools);
    return out;
  }
}

function isJson(text) {
  try {
    return text === "" || typeof JSON.parse(text) === "object";
  } catch {
    return false;
  }
}
