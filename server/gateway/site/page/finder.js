// Finds an account by its id or its name.

import { nameOf } from "./account.js";
import { get, target } from "./api.js";
import { h } from "./dom.js";
import { errorPanel } from "./parts.js";
import { fragment } from "./routes.js";

const SHOWN_MAX = 50;
const PAGES_PER_STEP = 10;

function plain(text) {
  return text.normalize("NFD").replace(/\p{M}/gu, "").toLowerCase();
}

// Fills the element. The API lists accounts in the order of their ids, so this reads up to 10,000 and searches them here;
// an exact id is always found. `names` gets the name of each account.
export function finder(element, names, lifetime) {
  const accounts = [];
  let pageToken = "";
  let failure = null;
  let loaded = false;
  const input = h("input", { type: "search", id: "find", autocomplete: "off", spellcheck: "false", placeholder: "Id or name", "aria-describedby": "found" });
  const status = h("p", { class: "muted", id: "found", role: "status" });
  const results = h("ul", { class: "accounts" });
  const below = h("div", {});
  const form = h("form", { role: "search", "aria-label": "Accounts" }, h("label", { for: "find" }, "Find an account"), h("div", { class: "field" }, input, h("button", {}, "Open")));
  element.replaceChildren(form, h("div", { class: "found" }, status, results, below));

  function matches() {
    const words = plain(input.value.trim());
    return words ? accounts.filter((each) => each.text.includes(words)) : accounts;
  }

  function draw() {
    const found = matches();
    const current = decodeURIComponent(/^#\/accounts\/([^/?]+)/.exec(location.hash)?.[1] ?? "");
    results.replaceChildren(
      ...found.slice(0, SHOWN_MAX).map(({ id, name }) =>
        h("li", {}, h("a", { href: fragment(id), "aria-current": id === current && "page" }, h("span", { class: "name" }, name || id), name && h("span", { class: "id" }, id))),
      ),
    );
    const count = found.length.toLocaleString("en");
    status.textContent = !loaded ? "Loading accounts\u2026" : failure ? "" : `${count} ${found.length === 1 ? "account" : "accounts"}${input.value.trim() ? " found" : ""}${found.length > SHOWN_MAX ? `, the first ${SHOWN_MAX} shown` : ""}`;
    below.replaceChildren(
      ...[
        failure && errorPanel(failure, load),
        !failure && loaded && found.length === 0 && h("p", { class: "muted" }, accounts.length ? "No such id or name. Open finds an exact id." : "This key has no accounts yet."),
        !failure && pageToken && h("p", { class: "muted" }, `Searched the first ${accounts.length.toLocaleString("en")} accounts. An exact id is found anyway.`),
        !failure && pageToken && h("button", { type: "button", class: "quiet", click: load }, "Search more accounts"),
      ].filter(Boolean),
    );
  }

  async function load() {
    failure = null;
    try {
      for (let page = 0; page < PAGES_PER_STEP; page += 1) {
        const answer = await get(target(["accounts"], { pageSize: 1000, pageToken }), lifetime);
        for (const each of answer.accounts) {
          const id = each.name.split("/")[1];
          names.set(id, nameOf(each));
          accounts.push({ id, name: nameOf(each), text: `${plain(id)}\n${plain(nameOf(each))}` });
        }
        pageToken = answer.nextPageToken;
        loaded = true;
        draw();
        if (!pageToken) {
          break;
        }
      }
    } catch (error) {
      if (lifetime.aborted) {
        return;
      }
      if (error.status === 401) {
        dispatchEvent(new CustomEvent("refused", { detail: error }));
        return;
      }
      failure = error;
    }
    loaded = true;
    draw();
  }

  input.addEventListener("input", draw);
  input.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown") {
      event.preventDefault();
      results.querySelector("a")?.focus();
    }
  });
  results.addEventListener("keydown", (event) => {
    const links = [...results.querySelectorAll("a")];
    const index = links.indexOf(event.target);
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      (links[index + (event.key === "ArrowDown" ? 1 : -1)] ?? (index === 0 ? input : event.target)).focus();
    }
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = input.value.trim();
    const found = matches();
    const exact = accounts.find((each) => each.id === text) ?? (found.length === 1 ? found[0] : null);
    if (text) {
      location.hash = fragment(exact?.id ?? text);
    }
  });
  addEventListener("hashchange", draw, { signal: lifetime });
  draw();
  return load();
}

