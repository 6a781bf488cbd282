// Tabs. On a wide page the chat is always visible, and one of the other tabs is shown next to it.
import { $, h } from "./dom.js";
import { load, save } from "./kept.js";

const WIDE = matchMedia("(min-width: 900px)");

export function tabs(place, names) {
  const all = names.map(([id, text]) => h("button", {
    type: "button", role: "tab", id: `tab-${id}`, "aria-controls": `panel-${id}`, onclick: () => open(id),
  }, text));
  place.append(...all);
  let narrow = "chat", wide = load("tab", "now");

  function draw() {
    const chosen = WIDE.matches ? wide : narrow;
    names.forEach(([id], i) => {
      const isOpen = id === chosen;
      all[i].setAttribute("aria-selected", isOpen);
      all[i].tabIndex = isOpen ? 0 : -1;
      all[i].hidden = WIDE.matches && id === "chat";
      $(`panel-${id}`).hidden = !(isOpen || (WIDE.matches && id === "chat"));
    });
    dispatchEvent(new Event("resize")); // canvases that were hidden now have a size
  }

  function open(id) {
    narrow = id;
    if (id !== "chat") save("tab", (wide = id));
    draw();
  }

  place.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    const there = all.filter((tab) => !tab.hidden);
    const next = there[(there.indexOf(document.activeElement) + step + there.length) % there.length];
    next.focus();
    next.click();
  });
  WIDE.addEventListener("change", draw);
  if (!names.some(([id]) => id === wide && id !== "chat")) wide = "now";
  draw();
}
