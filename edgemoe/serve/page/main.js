// The page: a chat, and parts that show the state of the server.
import { About } from "./about.js";
import { Budget } from "./budget.js";
import { Chat } from "./chat.js";
import { $ } from "./dom.js";
import { Log } from "./log.js";
import { ResidencyMap } from "./map.js";
import { Settings } from "./settings.js";
import { Shelf } from "./shelf.js";
import { tabs } from "./tabs.js";
import { theme } from "./theme.js";
import { Timeline } from "./timeline.js";
import { watch } from "./watch.js";

theme($("theme"));
tabs($("tabs"), [["chat", "Chat"], ["now", "Now"], ["settings", "Settings"], ["model", "Model"], ["log", "Log"]]);

const settings = new Settings($("settings"));
const chat = new Chat(() => settings.request());
settings.follow(chat);

const parts = [
  new Budget($("budget")), new ResidencyMap($("map")), new Timeline($("timeline")), settings,
  new About($("about")), new Shelf($("shelf"), (told) => settings.live.know(told)), new Log($("log")),
];

function header(all, now) {
  $("model").textContent = `${all.name} · ${all.set.is_auto ? "auto, at most " : ""}${all.set.bits} bits · ${all.notes.length ? "lossy" : "exact"}`;
  $("model").title = all.notes.join("\n");
  if (!now) return;
  const running = now.busy.filter(([, isBusy]) => isBusy).length;
  $("state").textContent = running || now.waiting ? `${running} running, ${now.waiting} waiting` : "idle";
}

watch({
  begin(all) { header(all); for (const part of parts) part.begin?.(all); },
  now(now, all) { header(all, now); for (const part of parts) part.now?.(now, all); },
  lost(why) { $("state").textContent = why; },
});
