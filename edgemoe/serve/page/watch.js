// Listens to the server's events while the page is visible.
import { events } from "./api.js";

const PAUSE = 2000;

/** Calls begin(all) on `who` for a new state, now(now, all) for new figures, and lost(why) when the stream ends. */
export function watch(who) {
  let running = null;

  async function listen() {
    const mine = (running = new AbortController());
    while (!mine.signal.aborted) {
      try {
        let all = null;
        for await (const [name, what] of events("events", { signal: mine.signal })) {
          if (name === "all") who.begin((all = what));
          else if (name === "set") who.begin(Object.assign(all, what));
          else if (name === "now") who.now(what, all);
        }
        if (!mine.signal.aborted) who.lost("the server has ended");
      } catch (error) {
        if (mine.signal.aborted) return;
        who.lost(error instanceof TypeError ? "the server does not answer" : error.message);
      }
      await new Promise((resolve) => setTimeout(resolve, PAUSE));
    }
  }

  document.addEventListener("visibilitychange", () => {
    if (document.hidden) running?.abort();
    else listen();
  });
  if (!document.hidden) listen();
}
