// The view of a transaction: what it is, the lots that it moved credits in, and the transactions that belong to it.

import { display, toMillionths, toText } from "./amounts.js";
import { get, listTarget, transactionTarget } from "./api.js";
import { h } from "./dom.js";
import { lotNumber, opener, readLots, readOpeners } from "./lots.js";
import { about, amount, curlSection, empty, errorPanel, expiry, kind, loadInto, longestFraction, person, time } from "./parts.js";
import { fragment, fragmentOf } from "./routes.js";
import { exact } from "./times.js";

function link(name, text) {
  return name && h("a", { href: fragmentOf(name) }, text);
}

// A link to a receipt. Any other scheme than http and https stays a text.
function receipt(uri) {
  const safe = /^https?:\/\//i.test(uri);
  return uri && (safe ? h("a", { href: uri, rel: "noreferrer noopener", target: "_blank" }, uri) : uri);
}

function json(value) {
  return value && Object.keys(value).length > 0 && h("pre", { tabindex: "0" }, JSON.stringify(value, null, 2));
}

function facts(transaction, names) {
  const account = transaction.name.split("/")[1];
  const { kind, refundOf, transferPeer, labels, metadata, booking, order, eventTicket, usage } = transaction;
  const rows = [
    ["Time", h("time", { datetime: transaction.createTime }, exact(transaction.createTime))],
    ["Account", h("a", { href: fragment(account) }, names.label(account))],
    ["Account id", h("code", {}, account)],
    ["Category", transaction.category],
    ["Description", about(transaction)],
    ["Balance after", display(transaction.balanceAfter)],
    ["Expiring part", transaction.expiringAmount !== "0" && display(transaction.expiringAmount, true)],
    ["Permanent part", transaction.permanentAmount !== "0" && display(transaction.permanentAmount, true)],
    ["Credits expire", transaction.expireTime && expiry(transaction.expireTime)],
    ["Refund of", link(refundOf, "the charge")],
    ["Other side of the transfer", link(transferPeer, kind === "TRANSFER_OUT" ? "the transfer in" : "the transfer out")],
    ["Owner", person(transaction.owner)],
    ["Created by", person(transaction.creator)],
    ["Receipt", receipt(transaction.receiptUri)],
    ["Labels", Object.keys(labels ?? {}).length > 0 && h("ul", { class: "plain" }, Object.entries(labels).map(([name, value]) => h("li", {}, `${name}: ${value}`)))],
    ["Request id", transaction.requestId && h("code", {}, transaction.requestId)],
    ["Number in the account", transaction.sequence],
    ["Transaction id", h("code", {}, transaction.uid)],
    ["Booking", json(booking)],
    ["Order", json(order)],
    ["Event ticket", json(eventTicket)],
    ["Usage", json(usage)],
    ["Metadata", json(metadata)],
  ];
  const item = ([name, value]) => h("div", { class: value.tagName === "PRE" ? "wide" : null }, h("dt", {}, name), h("dd", {}, value));
  return h("dl", { class: "facts" }, rows.filter(([, value]) => value).map(item));
}

function allocations(account, transaction, { lots }, openers) {
  const found = new Map(lots.map((each) => [each.name, each]));
  const moved = transaction.allocations;
  const length = longestFraction(moved.map((each) => each.amount));
  const head = (text, className) => h("th", { scope: "col", class: className }, text);
  return h(
    "table",
    { class: "allocations" },
    h("caption", { class: "hidden" }, "Amounts moved in each lot"),
    h("thead", {}, h("tr", {}, head("Lot"), head("Opened by", "text"), head("Expires (UTC)"), head("Moved", "number"), head("Left now", "number left"))),
    h(
      "tbody",
      {},
      moved.map((each) => {
        const lot = found.get(each.lot);
        const number = each.lot && each.lot.split("/")[3];
        return h(
          "tr",
          {},
          h("th", { scope: "row" }, number ? h("a", { href: fragment(account, null, { lot: number }) }, `Lot ${number}`) : "Debt"),
          h("td", { class: "text" }, lot ? opener(lot.sequence, openers) : number ? "" : "borrowed within the credit limit"),
          h("td", {}, number ? expiry(each.expireTime) : ""),
          h("td", { class: "number" }, amount(each.amount, { signed: true, length })),
          h("td", { class: "number left" }, lot ? `${display(lot.remainingAmount)} of ${display(lot.amount)}` : ""),
        );
      }),
    ),
  );
}

const TITLES = {
  CHARGE: "Lots that the charge took from",
  REFUND: "Lots that the credits returned to",
  GRANT: "Lot that the grant opened",
  TRANSFER_IN: "Lots that the transfer opened",
  TRANSFER_OUT: "Lots that the transfer took from",
  EXPIRATION: "Lot that expired",
};

// The refunds of a charge. The API doesn't list them, so this searches the refunds of the account since the charge.
async function refunds(account, charge, signal) {
  const filter = `kind = REFUND AND create_time >= "${charge.createTime}"`;
  const { transactions, nextPageToken } = await get(listTarget(account, { pageSize: 1000, filter, orderBy: "create_time" }), signal);
  const own = transactions.filter((each) => each.refundOf === charge.name);
  if (own.length === 0) {
    return h("p", { class: "muted" }, nextPageToken ? "None among the first 1,000 refunds since the charge." : "None.");
  }
  const sum = own.reduce((total, each) => total + toMillionths(each.amount), 0n);
  const length = longestFraction(own.map((each) => each.amount));
  return [
    h(
      "table",
      {},
      h("caption", { class: "hidden" }, "Refunds of this charge"),
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Time (UTC)"), h("th", { scope: "col", class: "text" }, "Description"), h("th", { scope: "col", class: "number" }, "Amount"))),
      h("tbody", {}, own.map((each) => h("tr", {}, h("td", {}, h("a", { href: fragmentOf(each.name) }, time(each.createTime))), h("td", { class: "text" }, about(each)), h("td", { class: "number" }, amount(each.amount, { signed: true, length }))))),
    ),
    h("p", { class: "muted" }, `Refunded ${display(toText(sum))} of ${display(charge.amount.replace("-", ""))} credits`),
  ];
}

export function transactionView(account, uid, names, lifetime) {
  const title = h("h1", { tabindex: "-1" }, "Transaction");
  const content = h("div", { class: "parts" });
  const element = h(
    "div",
    { class: "view" },
    h("nav", { class: "path", "aria-label": "Path" }, h("a", { href: fragment(account) }, names.label(account))),
    h("header", {}, title),
    content,
    curlSection([["Transaction", transactionTarget(account, uid)]]),
  );

  function part(heading, id, what, load) {
    const inner = h("div", {});
    loadInto(inner, what, lifetime, load);
    return h("section", { "aria-labelledby": id }, h("h2", { id }, heading), inner);
  }

  async function load() {
    const transaction = await get(transactionTarget(account, uid), lifetime);
    const effective = transaction.state === "SUCCEEDED";
    title.replaceChildren(...kind(transaction).filter(Boolean), " ", h("span", { class: effective ? "sum" : "sum ineffective" }, amount(transaction.amount, { signed: true })));
    document.title = `${title.textContent} \u2013 Daybook`;
    const parts = [facts(transaction, names)];
    if (!effective) {
      parts.unshift(h("p", { class: "note" }, "This transaction is a record only. It moved no credits."));
    } else if (transaction.allocations.length > 0) {
      parts.push(
        part(TITLES[transaction.kind] ?? "Lots", "allocations", "lots", async () => {
          const [lots, openers] = await Promise.all([readLots(account, lifetime), readOpeners(account, lifetime).catch(() => null)]);
          return allocations(account, transaction, lots, openers);
        }),
      );
    }
    if (effective && transaction.kind === "CHARGE") {
      parts.push(part("Refunds", "refunds", "refunds", () => refunds(account, transaction, lifetime)));
    }
    return parts;
  }

  return {
    element,
    title: () => title.textContent,
    focus: () => title.focus(),
    list: null,
    show: () => loadInto(content, "the transaction", lifetime, load),
  };
}
