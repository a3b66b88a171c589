// The public REST API, called with the key of this tab.

const STORED = "daybook-key";

// An error of the API, or of the way to it (status 0).
export class ApiError extends Error {
  constructor(status, message, { reason = "", metadata = {}, retrySeconds = 0, requestId = "" } = {}) {
    super(message);
    Object.assign(this, { status, reason, metadata, retrySeconds, requestId });
  }
}

export function key() {
  return sessionStorage.getItem(STORED);
}

// Whether a text can be a key: a header carries it.
export function isKey(text) {
  return /^[\x21-\x7e]+$/.test(text);
}

export function keepKey(value) {
  sessionStorage.setItem(STORED, value);
}

export function forgetKey() {
  sessionStorage.clear();
}

// The part of the key that isn't secret.
export function keyName() {
  return key().startsWith("eyJ") ? "access token" : key().split(".")[0];
}

// Takes the key out of a fragment `#key=KEY`, which a route may follow. Returns the rest of the fragment, or null.
export function takeKey(text) {
  const match = /^#key=([^/&]+)&?(.*)$/.exec(text);
  if (!match) {
    return null;
  }
  forgetKey();
  if (isKey(match[1])) {
    keepKey(match[1]);
  }
  return `#${match[2] || "/"}`;
}

// The path and query of a method. The parts of the path are encoded; parameters without a value are left out.
export function target(parts, parameters = {}, verb = "") {
  const path = parts.map((part) => encodeURIComponent(part)).join("/") + verb;
  const given = Object.entries(parameters).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  const query = given.map(([name, value]) => `${name}=${encodeURIComponent(value)}`).join("&");
  return `/v1/${path}${query && `?${query}`}`;
}

export function accountTarget(account) {
  return target(["accounts", account]);
}

export function balanceTarget(account) {
  return target(["accounts", account, "balance"]);
}

export function lotsTarget(account, parameters = {}) {
  return target(["accounts", account, "lots"], { pageSize: 1000, ...parameters });
}

export function listTarget(account, parameters) {
  return target(["accounts", account ?? "-", "transactions"], parameters);
}

export function exportTarget(account, parameters) {
  return target(["accounts", account ?? "-", "transactions"], { format: "CSV", ...parameters }, ":export");
}

export function transactionTarget(account, uid) {
  return target(["accounts", account, "transactions", uid], { view: "TRANSACTION_VIEW_FULL" });
}

// The command that gets the same; the key is in the variable DAYBOOK_KEY.
export function curl(path, file = "") {
  const url = `${location.origin}${path}`.replaceAll("'", "%27");
  return `curl ${file ? `-fsS -o ${file}` : "-sS"} -H "Authorization: Bearer $DAYBOOK_KEY" '${url}'`;
}

async function toError(response) {
  const requestId = response.headers.get("x-request-id") ?? "";
  const retrySeconds = Number(response.headers.get("retry-after")) || 0;
  try {
    const { message, details } = await response.json();
    const { reason, metadata } = details.find((each) => each.reason);
    return new ApiError(response.status, message, { reason, metadata, retrySeconds, requestId });
  } catch {
    return new ApiError(response.status, `HTTP ${response.status}, not in the form of the API`, { retrySeconds, requestId });
  }
}

// The response to a GET. Throws ApiError, or AbortError if the signal aborts it.
export async function open(path, signal) {
  let response;
  try {
    response = await fetch(path, { headers: { authorization: `Bearer ${key()}` }, signal, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") {
      throw error;
    }
    throw new ApiError(0, "No answer: the network or the gateway is away.");
  }
  if (!response.ok) {
    throw await toError(response);
  }
  return response;
}

// The JSON of a GET.
export async function get(path, signal) {
  const response = await open(path, signal);
  try {
    return await response.json();
  } catch (error) {
    if (error.name === "AbortError") {
      throw error;
    }
    throw new ApiError(0, "The answer was cut off.");
  }
}

// A file of any length. Calls `progress` with the bytes received so far.
export async function download(path, signal, progress) {
  const response = await open(path, signal);
  const chunks = [];
  let bytes = 0;
  let last = 0;
  try {
    for (const reader = response.body.getReader(); ; ) {
      const { done, value } = await reader.read();
      if (done) {
        break;
      }
      chunks.push(value);
      bytes += value.length;
      last = value.at(-1) ?? last;
      progress(bytes);
    }
  } catch (error) {
    if (error.name === "AbortError") {
      throw error;
    }
    last = 0;
  }
  // A complete file ends with a line break.
  if (last !== 10) {
    throw new ApiError(0, "The file is incomplete: the export was cut off.");
  }
  return new Blob(chunks, { type: response.headers.get("content-type") });
}
