// Requests to the server. If it wants a key, the user is asked once; the key is kept until the tab is closed.
import { $ } from "./dom.js";

const KEY = "edgemoe.key";
let asking = null;

function askKey(wasWrong) {
  asking ??= new Promise((resolve) => {
    const dialog = $("key");
    $("key-wrong").textContent = wasWrong ? "That key is not one of this server's." : "";
    $("key-text").value = "";
    dialog.addEventListener("close", () => {
      sessionStorage.setItem(KEY, $("key-text").value);
      asking = null;
      resolve();
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

/** Returns a response; throws an Error with the server's message for one that is not OK. */
export async function call(path, { body, signal } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = key ? { Authorization: `Bearer ${key}` } : {};
    if (body) headers["Content-Type"] = "application/json";
    const response = await fetch(path, {
      method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body),
    });
    if (response.ok) return response;
    if (response.status === 401) {
      if (sessionStorage.getItem(KEY) === key) await askKey(Boolean(key));
      continue;
    }
    const said = await response.json().catch(() => null);
    throw new Error(said?.error?.message ?? `${response.status} ${response.statusText}`);
  }
}

/** Yields [name, value] for each event of a stream of server-sent events. */
export async function* events(path, options) {
  const response = await call(path, options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      let name = "message", data = "";
      for (const line of part.split("\n")) {
        if (line.startsWith("event: ")) name = line.slice(7).trim();
        else if (line.startsWith("data: ")) data += line.slice(6);
      }
      if (data === "[DONE]") return;
      if (data) yield [name, JSON.parse(data)];
    }
  }
}
