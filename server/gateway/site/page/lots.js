// The lots of an account, and the transactions that opened them.

import { toMillionths } from "./amounts.js";
import { get, listTarget, lotsTarget } from "./api.js";
import { h } from "./dom.js";
import { KINDS, about, amount, empty, expiry, longestFraction } from "./parts.js";
import { bar } from "./plots.js";
import { fragment, fragmentOf } from "./routes.js";

const PAGES_MAX = 10;
const ADDING = "(kind = GRANT OR kind = REFUND OR kind = TRANSFER_IN OR kind = ADJUSTMENT)";

// All lots of an account in the order of opening, at most 10,000, and whether there are more.
export async function readLots(account, signal) {
  const lots = [];
  let pageToken = "";
  for (let page = 0; page < PAGES_MAX; page += 1) {
    const answer = await get(lotsTarget(account, { pageToken }), signal);
    lots.push(...answer.lots);
    pageToken = answer.nextPageToken;
    if (!pageToken) {
      break;
    }
  }
  return { lots, more: Boolean(pageToken) };
}

// The newest 1,000 transactions that may have opened lots, by their sequence. The API finds none by its sequence.
export async function readOpeners(account, signal) {
  const { transactions } = await get(listTarget(account, { pageSize: 1000, filter: ADDING }), signal);
  return new Map(transactions.map((each) => [each.sequence, each]));
}

export function opener(sequence, openers) {
  const transaction = openers?.get(sequence);
  return transaction
    ? h("a", { href: fragmentOf(transaction.name) }, [KINDS[transaction.kind], about(transaction) || transaction.category].join(": "))
    : `Transaction ${sequence}`;
}

export function lotNumber(lot) {
  return lot.name.split("/")[3];
}

// Sorts lots in the order in which charges take from them.
function inSpendingOrder(lots) {
  const end = (lot) => lot.expireTime ?? "9999-12-31T23:59:59.999999Z";
  return lots.toSorted((one, other) => one.priority - other.priority || Date.parse(end(one)) - Date.parse(end(other)));
}

function row(lot, openers, lengths, marked) {
  return h(
    "tr",
    { id: `lot-${lotNumber(lot)}`, class: marked ? "marked" : null, tabindex: marked ? "-1" : null },
    h("th", { scope: "row" }, lotNumber(lot)),
    h("td", { class: "text" }, opener(lot.sequence, openers)),
    h("td", {}, expiry(lot.expireTime)),
    h("td", { class: "number priority" }, String(lot.priority)),
    h("td", { class: "share" }, bar(toMillionths(lot.remainingAmount), toMillionths(lot.amount))),
    h("td", { class: "number" }, amount(lot.remainingAmount, { length: lengths[0] })),
    h("td", { class: "number of" }, amount(lot.amount, { length: lengths[1] })),
  );
}

// The table of lots: the open ones in the order of spending, or all in the order of opening.
export function lotsTable(account, { lots, more }, openers, query) {
  const open = lots.filter((each) => each.remainingAmount !== "0");
  const all = query.lots === "all" || (query.lot && !open.some((each) => lotNumber(each) === query.lot));
  const shown = all ? lots : inSpendingOrder(open);
  const others = lots.length - open.length;
  const lengths = ["remainingAmount", "amount"].map((field) => longestFraction(shown.map((each) => each[field])));
  const head = (text, className) => h("th", { scope: "col", class: className }, text);
  const without = Object.fromEntries(Object.entries(query).filter(([name]) => name !== "lot" && name !== "lots"));
  return [
    shown.length === 0
      ? empty("No credits left in any lot.", "A grant opens a lot.")
      : h(
          "table",
          { class: "lots" },
          h("caption", {}, all ? "All lots, in the order of opening" : "Charges take from the first of these lots first"),
          h(
            "thead",
            {},
            h("tr", {}, head("Lot"), head("Opened by", "text"), head("Expires (UTC)"), head("Priority", "number priority"), head("Share left", "share"), head("Left", "number"), head("of", "number of")),
          ),
          h("tbody", {}, shown.map((each) => row(each, openers, lengths, lotNumber(each) === query.lot))),
        ),
    h(
      "p",
      { class: "muted" },
      others > 0 && !all && h("a", { href: fragment(account, null, { ...without, lots: "all" }) }, `Show spent and expired lots too (${others.toLocaleString("en")})`),
      all && open.length < lots.length && h("a", { href: fragment(account, null, without) }, "Show only lots with credits left"),
      more && " These are the 10,000 oldest lots; curl shows the others.",
    ),
  ];
}
