// The list of transactions of an account, or of all accounts: filters, order, pages, and the CSV file.

import { download, exportTarget, get, listTarget } from "./api.js";
import { h } from "./dom.js";
import { KINDS, STATES, about, amount, empty, errorPanel, kind, loadInto, longestFraction, time } from "./parts.js";
import { fragment, fragmentOf, listParameters, pageParameters } from "./routes.js";

const ORDERS = { "": "Newest first", create_time: "Oldest first" };
const ORDERS_OF_ACCOUNT = { ...ORDERS, amount: "Amount, lowest first", "amount desc": "Amount, highest first" };
const LABELS = { "": "Any", location: "location", membership: "membership", company: "company" };
const FILTERS = ["kind", "category", "state", "from", "through", "label", "value"];

function select(name, label, options, value) {
  return h(
    "label",
    {},
    h("span", {}, label),
    h("select", { name }, Object.entries(options).map(([each, text]) => h("option", { value: each, selected: each === (value ?? "") }, text))),
  );
}

function input(name, label, value, attributes) {
  return h("label", {}, h("span", {}, label), h("input", { name, value: value ?? "", ...attributes }));
}

function filters(account, query, categories) {
  const any = { "": "Any" };
  const form = h(
    "form",
    { class: "filters", role: "search", "aria-label": "Transactions" },
    select("kind", "Kind", { ...any, ...KINDS }, query.kind),
    input("category", "Category", query.category, { list: "categories", autocomplete: "off", spellcheck: "false" }),
    h("datalist", { id: "categories" }, [...categories].sort().map((each) => h("option", { value: each }))),
    select("state", "State", { ...any, ...STATES }, query.state),
    input("from", "From (UTC)", query.from, { type: "date" }),
    input("through", "Through (UTC)", query.through, { type: "date" }),
    account === null && select("label", "Label", LABELS, query.label),
    account === null && input("value", "Value of the label", query.value, { autocomplete: "off", spellcheck: "false" }),
    select("order", "Order", account === null ? ORDERS : ORDERS_OF_ACCOUNT, query.order),
    h(
      "div",
      { class: "buttons" },
      h("button", {}, "Apply"),
      [...FILTERS, "order"].some((each) => query[each]) && h("a", { class: "button quiet", href: fragment(account) }, "Clear"),
    ),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const { lots } = query;
    location.hash = fragment(account, null, { lots, ...Object.fromEntries(new FormData(form)) });
  });
  return form;
}

function row(transaction, withAccount, names, lengths) {
  const account = transaction.name.split("/")[1];
  const text = about(transaction);
  return h(
    "tr",
    { class: transaction.state === "SUCCEEDED" ? null : "ineffective" },
    h("td", { class: "time" }, h("a", { href: fragmentOf(transaction.name) }, time(transaction.createTime))),
    withAccount && h("td", { class: "account" }, h("a", { href: fragment(account) }, names.label(account))),
    h("td", { class: "kind" }, kind(transaction)),
    h("td", { class: "category" }, transaction.category),
    h(
      "td",
      { class: "text" },
      text,
      h("span", { class: "narrow" }, kind(transaction), ` \u00b7 ${transaction.category}`, withAccount && [" \u00b7 ", names.label(account)]),
    ),
    h("td", { class: "number" }, amount(transaction.amount, { signed: true, length: lengths[0] })),
    h("td", { class: "number balance" }, amount(transaction.balanceAfter, { length: lengths[1] })),
  );
}

function table(transactions, withAccount, names) {
  const lengths = ["amount", "balanceAfter"].map((field) => longestFraction(transactions.map((each) => each[field])));
  const head = (text, className) => h("th", { scope: "col", class: className }, text);
  return h(
    "table",
    { class: "transactions" },
    h("caption", { class: "hidden" }, "Transactions"),
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        head("Time (UTC)", "time"),
        withAccount && head("Account", "account"),
        head("Kind", "kind"),
        head("Category", "category"),
        head("Description", "text"),
        head("Amount", "number"),
        head("Balance after", "number balance"),
      ),
    ),
    h("tbody", {}, transactions.map((each) => row(each, withAccount, names, lengths))),
  );
}

// The tokens of the pages that this tab has seen, so that it can go back.
function pagesOf(account, query) {
  const name = `pages ${account ?? "-"} ${JSON.stringify(listParameters(query))}`;
  const tokens = JSON.parse(sessionStorage.getItem(name) ?? '[""]');
  return {
    tokens,
    keep(number, token) {
      tokens[number - 1] = token;
      sessionStorage.setItem(name, JSON.stringify(tokens));
    },
  };
}

function pager(account, query, number, nextToken) {
  if (number === 1 && !nextToken) {
    return null;
  }
  const { tokens } = pagesOf(account, query);
  const to = (page, token) => fragment(account, null, { ...query, page: page > 1 ? page : "", token });
  const link = (text, page, token) =>
    token === undefined || token === null
      ? h("span", { class: "button quiet", "aria-disabled": "true" }, text)
      : h("a", { class: "button quiet", href: to(page, token) }, text);
  return h(
    "nav",
    { class: "pager", "aria-label": "Pages" },
    link("First", 1, number > 1 ? "" : null),
    link("Previous", number - 1, number > 1 ? tokens[number - 2] : null),
    h("span", { class: "page" }, `Page ${number}`),
    link("Next", number + 1, nextToken || null),
  );
}

function csvButton(account, parameters, signal) {
  const status = h("span", { class: "muted", role: "status" });
  const failure = h("div", {});
  const button = h("button", { type: "button", class: "quiet" }, "Download CSV");
  let canceling = null;
  button.addEventListener("click", async () => {
    if (canceling) {
      canceling.abort();
      return;
    }
    canceling = new AbortController();
    signal.addEventListener("abort", () => canceling?.abort());
    button.textContent = "Cancel download";
    failure.replaceChildren();
    try {
      const progress = (bytes) => (status.textContent = `${Math.ceil(bytes / 1024).toLocaleString("en")} KiB`);
      const file = await download(exportTarget(account, parameters()), canceling.signal, progress);
      const url = URL.createObjectURL(file);
      h("a", { href: url, download: `transactions-${account ?? "all"}.csv` }).click();
      setTimeout(() => URL.revokeObjectURL(url), 60_000);
      status.textContent = "Downloaded";
    } catch (error) {
      status.textContent = "";
      if (error.status === undefined && error.name !== "AbortError") {
        throw error;
      }
      if (error.status !== undefined) {
        failure.replaceChildren(errorPanel(error));
      }
    } finally {
      canceling = null;
      button.textContent = "Download CSV";
    }
  });
  return [h("div", { class: "tools" }, status, button), failure];
}

// The list as a section. `names` has the names of accounts; `categories` those seen so far.
export function transactionList(account, { names, categories = new Set(), lifetime }) {
  const title = account === null ? "Newest transactions" : "Transactions";
  const heading = h("h2", { id: "transactions", tabindex: "-1" }, title);
  const form = h("div", {});
  const results = h("div", { class: "results" });
  let current = {};
  const [tools, failure] = csvButton(account, () => listParameters(current), lifetime);
  const element = h("section", { "aria-labelledby": "transactions" }, h("div", { class: "head" }, heading, tools), failure, form, results);

  async function load(query, signal) {
    const number = Math.max(1, Number.parseInt(query.page ?? "1", 10) || 1);
    const page = await get(listTarget(account, pageParameters(query)), signal);
    const pages = pagesOf(account, query);
    pages.keep(number, query.token ?? "");
    if (page.nextPageToken) {
      pages.keep(number + 1, page.nextPageToken);
    }
    const filtered = FILTERS.some((each) => query[each]);
    const rows = page.transactions;
    for (const each of rows) {
      categories.add(each.category);
    }
    form.replaceChildren(filters(account, query, categories));
    if (rows.length > 0) {
      return [table(rows, account === null, names), pager(account, query, number, page.nextPageToken)];
    }
    if (page.nextPageToken) {
      return [
        empty("No match on this page.", "The server has read 10,000 transactions for it. Go on with the next page, or narrow the period."),
        pager(account, query, number, page.nextPageToken),
      ];
    }
    return filtered
      ? empty("No transaction matches these filters.", h("a", { href: fragment(account) }, "Clear the filters"))
      : empty("No transactions yet.", "They appear here as soon as a service posts one.");
  }

  return {
    element,
    focus() {
      heading.focus();
    },
    async show(query, signal) {
      current = query;
      form.replaceChildren(filters(account, query, categories));
      await loadInto(results, "transactions", signal, () => load(query, signal));
    },
  };
}
