// What stays in this browser: conversations and settings. Nothing of it is sent but what a request says.

export function load(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(`edgemoe.${name}`)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

/** Returns whether there was room. */
export function save(name, value) {
  try {
    localStorage.setItem(`edgemoe.${name}`, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}
