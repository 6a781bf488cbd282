// Helpers: make elements, and format numbers.

/** Returns an element with properties, listeners (`onclick`) and attributes (`aria-label`, `data-x`, `for`). */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name in element && !name.startsWith("aria") && name !== "list") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((c) => c !== null && c !== undefined));
  return element;
}

export const $ = (id) => document.getElementById(id);

/** Formats bytes as the command line does, in powers of 1024. */
export function bytes(n) {
  for (const [unit, size] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
    if (n >= size) return `${(n / size).toFixed(n >= 10 * size ? 0 : 1)} ${unit}`;
  }
  return `${Math.round(n)} B`;
}

export const percent = (share) => `${(100 * share).toFixed(share > 0.0995 ? 0 : 1)}%`;

export const seconds = (s) => (s >= 10 ? `${s.toFixed(0)} s` : s >= 1 ? `${s.toFixed(1)} s` : `${(1000 * s).toFixed(0)} ms`);
