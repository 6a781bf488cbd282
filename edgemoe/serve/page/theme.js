// The theme: light, dark, or the system's.
import { load, save } from "./kept.js";

const THEMES = ["system", "light", "dark"];

export function theme(button) {
  let at = Math.max(0, THEMES.indexOf(load("theme", "system")));
  function draw() {
    document.documentElement.dataset.theme = THEMES[at];
    button.textContent = `Theme: ${THEMES[at]}`;
    dispatchEvent(new Event("themechange"));
  }
  button.addEventListener("click", () => { save("theme", THEMES[(at = (at + 1) % 3)]); draw(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
}

/** Returns a colour of the style sheet. */
export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
