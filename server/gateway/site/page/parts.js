// Parts that several views share.

import { display, fractionLength } from "./amounts.js";
import { curl } from "./api.js";
import { h } from "./dom.js";
import { exact, fromNow, toSecond } from "./times.js";

export const KINDS = {
  GRANT: "Grant",
  CHARGE: "Charge",
  REFUND: "Refund",
  TRANSFER_IN: "Transfer in",
  TRANSFER_OUT: "Transfer out",
  EXPIRATION: "Expiration",
  ADJUSTMENT: "Adjustment",
};
export const STATES = { SUCCEEDED: "Succeeded", FAILED: "Failed", CANCELED: "Canceled" };

const FIGURE_SPACE = "\u2007";
const POINT_SPACE = "\u2008";

// An amount, padded to `length` characters after its whole part, so that the points of a column are aligned.
export function amount(text, { signed = false, length = 0 } = {}) {
  const own = fractionLength(text);
  const padding = (own === 0 && length > 0 ? POINT_SPACE : "") + FIGURE_SPACE.repeat(Math.max(0, length - Math.max(own, 1)));
  const added = signed && text !== "0" && !text.startsWith("-");
  return h("span", { class: added ? "amount added" : "amount" }, h("span", { class: "digits" }, display(text, signed)), padding && h("span", { class: "padding", "aria-hidden": "true" }, padding));
}

// The longest fraction of a column.
export function longestFraction(texts) {
  return Math.max(0, ...texts.map(fractionLength));
}

// A time to the second. On narrow screens the date and the clock are below each other.
export function time(text) {
  const [day, clock] = toSecond(text).split(" ");
  return h("time", { datetime: text, title: exact(text) }, h("span", {}, day), " ", h("span", {}, clock));
}

// The expiry of credits: when, and how far away that is.
export function expiry(text) {
  return text ? h("span", { class: "expiry" }, time(text), h("span", { class: "far" }, fromNow(text))) : h("span", { class: "muted" }, "never");
}

export function kind(transaction) {
  const state = transaction.state;
  return [
    KINDS[transaction.kind] ?? transaction.kind,
    state !== "SUCCEEDED" && h("span", { class: "tag" }, STATES[state] ?? state),
  ];
}

// What a transaction is about: its description, or its subject.
export function about(transaction) {
  const { booking, order, eventTicket, usage } = transaction;
  return (
    transaction.description ||
    booking?.resource?.title ||
    [order?.product?.title, order?.option?.name].filter(Boolean).join(", ") ||
    eventTicket?.event?.title ||
    usage?.model ||
    ""
  );
}

export function person(user) {
  return user && ([user.name, user.surname].filter(Boolean).join(" ") || user.id);
}

export function loading(what) {
  return h("p", { class: "loading", role: "status" }, `Loading ${what}\u2026`);
}

export function empty(title, ...advice) {
  return h("div", { class: "empty" }, h("p", {}, title), advice.length > 0 && h("p", { class: "muted" }, ...advice));
}

// What to do about an error, by its reason or its status.
function advice({ status, reason, metadata, retrySeconds }) {
  const byReason = {
    ACCOUNT_NOT_PERMITTED: "This key is bound to one account. Open that account by its id.",
    SCOPE_MISSING: `Use a key with the scope ${metadata.scope}, or ask its issuer for it. Other parts of this page may work without it.`,
    ACCOUNT_NOT_FOUND: "Check the id: letters count as large or small. Or find the account by its name.",
    TRANSACTION_NOT_FOUND: "Check the address. The account's list has all its transactions.",
    PAGE_TOKEN_INVALID: "Start again from the first page.",
    PAGE_TOKEN_MISMATCH: "Start again from the first page.",
    FILTER_INVALID: "Change the filters above.",
  };
  const byStatus = {
    0: "Check your connection, then try again. Nothing was changed: this page only reads.",
    400: "Change what you entered, or start again from the first page.",
    401: "Paste another key, or get a new one from the operator of this service.",
    429: `Too many calls at once. You can try again in ${retrySeconds || 1} s.`,
    503: "The service is away, or can't reach its database. Try again in a moment.",
    504: "The service was too slow. Try again in a moment, or narrow the period.",
  };
  return byReason[reason] ?? byStatus[status] ?? "Try again. If it fails again, send the request id to the operator of this service.";
}

// An error in the API's own words, with what to do. The button waits as long as the API says.
export function errorPanel(error, retry) {
  const button = retry && error.status !== 403 && h("button", { type: "button", click: retry }, "Try again");
  const wait = error.status === 429 ? error.retrySeconds || 1 : 0;
  if (button && wait) {
    button.disabled = true;
    let left = wait;
    const show = () => {
      button.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
      button.disabled = left > 0;
      left -= 1;
      if (left >= 0) {
        setTimeout(show, 1000);
      }
    };
    show();
  }
  return h(
    "div",
    { class: "error", role: "alert" },
    h("p", { class: "words" }, error.message),
    h("p", {}, advice({ metadata: {}, ...error })),
    h(
      "p",
      { class: "muted" },
      [error.status && `HTTP ${error.status}`, error.reason, error.requestId && `request id ${error.requestId}`].filter(Boolean).join(" \u00b7 "),
    ),
    button,
  );
}

// Fills an element with what `load` returns: first a loading state, then the result, or the error with a retry.
export async function loadInto(element, what, signal, load) {
  const state = loading(what);
  element.setAttribute("aria-busy", "true");
  if (element.childElementCount === 0) {
    element.replaceChildren(state);
  }
  try {
    const content = await load();
    signal.throwIfAborted();
    element.replaceChildren(...[content].flat().filter(Boolean));
  } catch (error) {
    if (signal.aborted) {
      return;
    }
    if (error.status === undefined) {
      throw error;
    }
    if (error.status === 401) {
      dispatchEvent(new CustomEvent("refused", { detail: error }));
      return;
    }
    element.replaceChildren(errorPanel(error, () => loadInto(element, what, signal, load)));
  } finally {
    element.removeAttribute("aria-busy");
  }
}

function copyButton(text, label) {
  const button = h("button", { type: "button", class: "quiet", "aria-label": `Copy: ${label}` }, "Copy");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text());
      button.textContent = "Copied";
    } catch {
      // Browsers permit access to the clipboard only on HTTPS and on this machine.
      getSelection().selectAllChildren(button.parentElement.querySelector("code"));
      button.textContent = "Press Ctrl-C";
    }
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });
  return button;
}

// The commands that get what the view shows. `commands` has a title, a path and perhaps a file name each.
export function curlSection(commands) {
  return h(
    "section",
    { class: "curl", "aria-labelledby": "curl" },
    h("h2", { id: "curl" }, "The same with curl"),
    h("p", { class: "muted" }, "Put the key into the environment variable DAYBOOK_KEY first."),
    commands.map(([title, path, file]) =>
      h("div", { class: "command" }, h("span", { class: "title" }, title), h("code", { tabindex: "0" }, curl(path, file)), copyButton(() => curl(path, file), title)),
    ),
  );
}
