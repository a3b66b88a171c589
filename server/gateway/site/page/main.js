// The page: takes the key, and shows the view that the fragment of the address names.

import { accountView } from "./account.js";
import { exportTarget, forgetKey, isKey, keepKey, key, keyName, listTarget, takeKey, target } from "./api.js";
import { h } from "./dom.js";
import { finder } from "./finder.js";
import { transactionList } from "./list.js";
import { curlSection, empty, errorPanel } from "./parts.js";
import { Names } from "./names.js";
import { listParameters, pageParameters, readFragment } from "./routes.js";
import { transactionView } from "./transaction.js";

const main = document.querySelector("main");
const aside = document.querySelector("aside");
const session = document.querySelector(".session");

let opened = null;
let names = new Names();
let view = null;

function overview(names, lifetime) {
  const title = h("h1", { tabindex: "-1" }, "All accounts");
  const list = transactionList(null, { names, lifetime });
  const commands = h("div", {});
  return {
    element: h("div", { class: "view" }, h("header", {}, title), list.element, commands),
    title: () => title.textContent,
    focus: () => title.focus(),
    list,
    async show(query, signal) {
      commands.replaceChildren(
        curlSection([
          ["Accounts", target(["accounts"], { pageSize: 1000 })],
          ["This page of transactions", listTarget(null, pageParameters(query))],
          ["All of them, as CSV", exportTarget(null, listParameters(query)), "transactions.csv"],
        ]),
      );
      await list.show(query, signal);
    },
  };
}

function close() {
  opened?.lifetime.abort();
  view?.lifetime.abort();
  opened = view = null;
  names = new Names();
  aside.replaceChildren();
  session.replaceChildren();
  document.body.classList.remove("open");
}

function askForKey(error) {
  close();
  document.title = "Daybook";
  const input = h("input", { id: "key", name: "key", type: "password", autocomplete: "off", spellcheck: "false", required: true, "aria-describedby": "about-key" });
  const problem = h("div", {}, error && errorPanel(error));
  const form = h("form", { class: "key" }, h("label", { for: "key" }, "API key"), h("div", { class: "field" }, input, h("button", {}, "Open")));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = input.value.trim();
    if (!isKey(text)) {
      problem.replaceChildren(h("p", { class: "error", role: "alert" }, "A key has only letters, digits and signs, without spaces."));
      return;
    }
    keepKey(text);
    render();
  });
  main.replaceChildren(
    h(
      "div",
      { class: "view welcome" },
      h("h1", { tabindex: "-1" }, "Open a ledger"),
      problem,
      form,
      h("p", { class: "muted", id: "about-key" }, "This page reads accounts, balances and transactions with your key. It keeps the key in this tab only, and sends it to this server only."),
    ),
  );
  input.focus();
}

function open() {
  opened = { lifetime: new AbortController() };
  session.replaceChildren(
    h("span", { class: "keyname" }, "Key ", h("code", {}, keyName())),
    h(
      "button",
      {
        type: "button",
        class: "quiet",
        click: () => {
          forgetKey();
          askForKey();
        },
      },
      "Forget key",
    ),
  );
  document.body.classList.add("open");
  finder(aside, names, opened.lifetime.signal);
}

function viewOf(route, lifetime) {
  if (route.uid !== null) {
    return transactionView(route.account, route.uid, names, lifetime);
  }
  return route.account !== null ? accountView(route.account, names, lifetime) : overview(names, lifetime);
}

function render() {
  const rest = takeKey(location.hash);
  if (rest !== null) {
    history.replaceState(null, "", rest);
    close();
  }
  if (key() === null) {
    askForKey();
    return;
  }
  const first = opened === null;
  if (first) {
    open();
  }
  const route = readFragment(location.hash);
  if (route === null) {
    view?.lifetime.abort();
    view = null;
    main.replaceChildren(h("div", { class: "view" }, empty("This address leads nowhere.", h("a", { href: "#/" }, "All accounts"))));
    return;
  }
  const place = JSON.stringify([route.account, route.uid]);
  const isSame = view?.place === place;
  if (!isSame) {
    view?.lifetime.abort();
    const lifetime = new AbortController();
    view = { ...viewOf(route, lifetime.signal), place, lifetime };
    main.replaceChildren(view.element);
    scrollTo(0, 0);
  }
  view.showing?.abort();
  view.showing = new AbortController();
  view.lifetime.signal.addEventListener("abort", () => view?.showing.abort());
  document.title = `${view.title()} \u2013 Daybook`;
  const shown = view.show(route.query, AbortSignal.any([view.showing.signal, view.lifetime.signal]));
  if (isSame && !route.query.lot) {
    view.list?.focus();
  } else if (!first) {
    view.focus();
  }
  return shown;
}

document.querySelector(".skip").addEventListener("click", (event) => {
  // The fragment of the address is the view's.
  event.preventDefault();
  main.focus();
});
addEventListener("hashchange", render);
addEventListener("refused", (event) => {
  if (opened !== null) {
    forgetKey();
    askForKey(event.detail);
  }
});
render();
