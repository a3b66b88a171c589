// The view of an account: balance, plots, lots, transactions.

import { display, toMillionths, toText } from "./amounts.js";
import { accountTarget, balanceTarget, exportTarget, get, listTarget, lotsTarget } from "./api.js";
import { h } from "./dom.js";
import { transactionList } from "./list.js";
import { lotsTable, readLots, readOpeners } from "./lots.js";
import { amount, curlSection, empty, errorPanel, loadInto, longestFraction, person } from "./parts.js";
import { balancePlot, bar } from "./plots.js";
import { fragment, listParameters, pageParameters, periodFilter } from "./routes.js";
import { exact, toDay } from "./times.js";

const KINDS = { SPACE: "Space", USER: "User", COMPANY: "Company", MEMBERSHIP: "Membership", ORGANIZATION: "Organization", OTHER: "Other" };
const HISTORY_ROWS = 1000;

export function nameOf(account) {
  return account.displayName || account.company?.title || person(account.user) || "";
}

function figure(label, text, className) {
  return h("div", { class: className }, h("dt", {}, label), h("dd", {}, display(text)));
}

function balanceFigures(balance) {
  return [
    h(
      "dl",
      { class: "figures" },
      figure("Balance", balance.amount, "main"),
      figure("Can be charged", balance.availableAmount),
      figure("Expires at some time", balance.expiringAmount),
      figure("Never expires", balance.permanentAmount),
    ),
    h("p", { class: "muted" }, `In credits, as of ${exact(balance.readTime.slice(0, 19) + "Z")}`),
  ];
}

function useByCategory(account, rows, query) {
  const uses = new Map();
  for (const { kind, state, category, amount } of rows) {
    if (kind === "CHARGE" && state === "SUCCEEDED") {
      const use = uses.get(category) ?? { charges: 0, sum: 0n };
      uses.set(category, { charges: use.charges + 1, sum: use.sum - toMillionths(amount) });
    }
  }
  if (uses.size === 0) {
    return empty("No charges in this period.");
  }
  const sorted = [...uses].sort(([, one], [, other]) => (one.sum < other.sum ? 1 : -1));
  const largest = sorted[0][1].sum;
  const length = longestFraction(sorted.map(([, { sum }]) => toText(sum)));
  const head = (text, className) => h("th", { scope: "col", class: className }, text);
  return h(
    "table",
    { class: "uses" },
    h("caption", { class: "hidden" }, "Charges by category, without refunds"),
    h("thead", {}, h("tr", {}, head("Category", "text"), head("Charges", "number count"), head("Credits", "number"))),
    h(
      "tbody",
      {},
      sorted.map(([category, { charges, sum }]) =>
        h(
          "tr",
          {},
          h("th", { scope: "row", class: "text" }, h("a", { href: fragment(account, null, { ...query, category, kind: "CHARGE", page: "", token: "" }), title: `List the charges of ${category}` }, category), bar(sum, largest)),
          h("td", { class: "number count" }, charges.toLocaleString("en")),
          h("td", { class: "number" }, amount(toText(sum), { length })),
        ),
      ),
    ),
  );
}

// The newest rows of a period, from which both plots are drawn; earlier ones are added on demand.
function activity(account, categories) {
  const balance = h("div", {});
  const use = h("div", {});
  const covered = h("p", { class: "muted covered" });
  const reading = h("output", { class: "muted" });
  const element = h(
    "div",
    { class: "plots" },
    h("section", { "aria-labelledby": "history" }, h("div", { class: "head" }, h("h2", { id: "history" }, "Balance over time"), reading), balance, covered),
    h("section", { "aria-labelledby": "use" }, h("h2", { id: "use" }, "Use by category"), use),
  );

  function draw(rows, query) {
    if (rows.length === 0) {
      balance.replaceChildren(empty(query.from || query.through ? "No transactions in this period." : "No transactions yet."));
      use.replaceChildren(empty("No charges yet."));
      return;
    }
    const oldest = rows.at(-1);
    const before = toMillionths(oldest.balanceAfter) - (oldest.state === "SUCCEEDED" ? toMillionths(oldest.amount) : 0n);
    const points = rows.map((each) => ({ time: each.createTime, value: toMillionths(each.balanceAfter) }));
    balance.replaceChildren(balancePlot([...points, { time: oldest.createTime, value: before }].reverse(), reading));
    use.replaceChildren(useByCategory(account, rows, query));
  }

  async function load(query, signal) {
    const rows = [];
    let pageToken = "";
    async function more() {
      const page = await get(listTarget(account, { pageSize: HISTORY_ROWS, filter: periodFilter(query), pageToken }), signal);
      signal.throwIfAborted();
      for (const { createTime, balanceAfter, amount, state, kind, category } of page.transactions) {
        rows.push({ createTime, balanceAfter, amount, state, kind, category });
        categories.add(category);
      }
      pageToken = page.nextPageToken;
      draw(rows, query);
      const days = rows.length ? `, ${toDay(Date.parse(rows.at(-1).createTime))} to ${toDay(Date.parse(rows[0].createTime))}` : "";
      covered.replaceChildren(
        `${pageToken ? "The newest " : ""}${rows.length.toLocaleString("en")} transactions${days}. `,
        pageToken ? h("button", { type: "button", class: "quiet", click: again }, "Add earlier ones") : "",
      );
    }
    const again = () => {
      more().catch((error) => {
        if (!signal.aborted) {
          covered.replaceChildren(errorPanel(error, again));
        }
      });
    };
    await more();
  }

  return {
    element,
    async show(query, signal) {
      await loadInto(balance, "the history", signal, async () => {
        await load(query, signal);
        return [...balance.childNodes];
      });
    },
  };
}

// The view of one account. `show` draws it for the parameters of a fragment, reading anew only what they change.
export function accountView(account, names, lifetime) {
  const categories = new Set();
  const title = h("h1", { tabindex: "-1" }, names.label(account));
  const facts = h("div", { class: "facts" }, h("code", {}, account));
  const balance = h("section", { "aria-label": "Balance" });
  const lots = h("div", {});
  const plots = activity(account, categories);
  const list = transactionList(account, { names, categories, lifetime });
  const commands = h("div", {});
  const element = h(
    "div",
    { class: "view" },
    h("header", {}, title, facts),
    balance,
    plots.element,
    h("section", { "aria-labelledby": "lots" }, h("h2", { id: "lots" }, "Lots"), lots),
    list.element,
    commands,
  );
  let period = null;
  let read = null;

  async function describe() {
    const found = await get(accountTarget(account), lifetime);
    const name = nameOf(found);
    names.set(account, name);
    document.title = `${name || account} \u2013 Daybook`;
    const limit = found.creditLimit !== "0" && ` \u00b7 credit limit ${display(found.creditLimit)}`;
    facts.replaceChildren(h("code", {}, account), ` \u00b7 ${KINDS[found.kind] ?? found.kind} \u00b7 created ${toDay(Date.parse(found.createTime))}`, limit || "");
    return [...facts.childNodes];
  }

  async function showLots(query, signal) {
    await loadInto(lots, "lots", signal, async () => {
      // Without the transactions, the table has their numbers.
      read ??= await Promise.all([readLots(account, lifetime), readOpeners(account, lifetime).catch(() => null)]);
      return lotsTable(account, ...read, query);
    });
    if (query.lot) {
      document.getElementById(`lot-${query.lot}`)?.focus();
    }
  }

  return {
    element,
    title: () => title.textContent,
    focus: () => title.focus(),
    list,
    async show(query, signal) {
      commands.replaceChildren(
        curlSection([
          ["Account", accountTarget(account)],
          ["Balance", balanceTarget(account)],
          ["Lots", lotsTarget(account)],
          ["This page of transactions", listTarget(account, pageParameters(query))],
          ["All of them, as CSV", exportTarget(account, listParameters(query)), "transactions.csv"],
        ]),
      );
      const waiting = [list.show(query, signal), showLots(query, signal)];
      if (period === null) {
        waiting.push(
          loadInto(facts, "the account", lifetime, describe),
          loadInto(balance, "the balance", lifetime, async () => balanceFigures(await get(balanceTarget(account), lifetime))),
        );
      }
      if (period !== periodFilter(query)) {
        period = periodFilter(query);
        waiting.push(plots.show(query, signal));
      }
      await Promise.all(waiting);
    },
  };
}
