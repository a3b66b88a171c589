// The names of accounts. The page shows an id until it knows the name.

import { h } from "./dom.js";

export class Names {
  #names = new Map();
  #waiting = new Map();

  set(id, name) {
    this.#names.set(id, name);
    for (const label of this.#waiting.get(id) ?? []) {
      label.textContent = name || id;
    }
    this.#waiting.delete(id);
  }

  // A text with the name of an account, which changes when the name becomes known.
  label(id) {
    const label = h("span", {}, this.#names.get(id) || id);
    if (!this.#names.has(id)) {
      this.#waiting.set(id, [...(this.#waiting.get(id) ?? []), label]);
    }
    return label;
  }
}
