// The state of the view, in the fragment of the address: reload, back and links work.

const ROWS = 25;

// The page's own fragment for an account (null for all accounts), a transaction of it, and the list's parameters.
export function fragment(account, uid = null, query = {}) {
  const path = account === null ? "" : `accounts/${encodeURIComponent(account)}${uid ? `/transactions/${encodeURIComponent(uid)}` : ""}`;
  const given = Object.entries(query).filter(([, value]) => value);
  return `#/${path}${given.length ? `?${new URLSearchParams(given)}` : ""}`;
}

// The fragment of the resource with an API name, such as accounts/a/transactions/b.
export function fragmentOf(name) {
  const [, account, , uid] = name.split("/");
  return fragment(account, uid);
}

// Reads the fragment; null if it isn't the page's.
export function readFragment(text) {
  const [path, search = ""] = text.replace(/^#/, "").split("?");
  const match = /^\/?(?:accounts\/([^/]+)(?:\/transactions\/([^/]+))?)?$/.exec(path);
  const query = Object.fromEntries(new URLSearchParams(search));
  for (const day of ["from", "through"]) {
    if (Number.isNaN(Date.parse(`${query[day]}T00:00:00Z`))) {
      delete query[day];
    }
  }
  try {
    return match && {
      account: match[1] === undefined ? null : decodeURIComponent(match[1]),
      uid: match[2] === undefined ? null : decodeURIComponent(match[2]),
      query,
    };
  } catch {
    return null;
  }
}

function quoted(text) {
  return `"${text.replace(/[\\"]/g, "\\$&")}"`;
}

// The comparisons of the period, which is in whole days; `through` is included.
function period({ from, through }) {
  const after = through && new Date(Date.parse(`${through}T00:00:00Z`) + 86_400_000).toISOString().slice(0, 10);
  return [from && `create_time >= "${from}T00:00:00Z"`, after && `create_time < "${after}T00:00:00Z"`];
}

// The API's filter for the period alone.
export function periodFilter(query) {
  return period(query).filter(Boolean).join(" AND ");
}

// The parameters of ListTransactions and ExportTransactions for the list.
export function listParameters(query) {
  const filter = [
    query.kind && `kind = ${query.kind}`,
    query.category && `category = ${quoted(query.category)}`,
    query.state && `state = ${query.state}`,
    query.label && query.value && `labels.${query.label} = ${quoted(query.value)}`,
    ...period(query),
  ];
  return { filter: filter.filter(Boolean).join(" AND "), orderBy: query.order ?? "" };
}

// The parameters of the page of the list.
export function pageParameters(query) {
  return { pageSize: ROWS, ...listParameters(query), pageToken: query.token ?? "" };
}
