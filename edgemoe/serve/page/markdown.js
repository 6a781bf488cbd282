// The Markdown that a model writes, which is not trusted: marked turns it into HTML, and DOMPurify sanitises that. HTML
// in it is shown as text, and an image becomes a link, so that nothing is fetched unless the user clicks.
import { marked } from "./vendor/marked.js";
import DOMPurify from "./vendor/purify.js";
import { h } from "./dom.js";

const TAGS = [
  "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre",
  "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
];

const escaped = (text) => text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);

marked.use({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text }) => escaped(text),
    image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || href)}</a>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

/** Returns a text rendered as a fragment of the document. */
export function shown(text) {
  const found = DOMPurify.sanitize(marked.parse(text), {
    ALLOWED_TAGS: TAGS, ALLOWED_ATTR: ["href", "start"], ALLOW_DATA_ATTR: false, ALLOW_ARIA_ATTR: false,
    ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i, RETURN_DOM_FRAGMENT: true,
  });
  for (const link of found.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer";
  }
  for (const block of found.querySelectorAll("pre")) block.replaceWith(copied(block));
  for (const table of found.querySelectorAll("table")) {
    const frame = h("div", { className: "wide", tabIndex: 0, role: "region", "aria-label": "Table" });
    table.replaceWith(frame);
    frame.append(table);
  }
  return found;
}

/** Returns a block of code with a button that copies it. */
function copied(block) {
  const text = block.textContent;
  const button = h("button", {
    type: "button", className: "small",
    onclick: async () => {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
      setTimeout(() => (button.textContent = "Copy"), 1500);
    },
  }, "Copy");
  return h("div", { className: "code" }, button, h("pre", { tabIndex: 0 }, h("code", {}, text)));
}
