// What is stored in this browser: conversations and settings. They leave it only as the fields of requests.

export function load(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(`edgemoe.${name}`)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

/** Stores a value; returns whether there was room for it. */
export function save(name, value) {
  try {
    localStorage.setItem(`edgemoe.${name}`, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}
