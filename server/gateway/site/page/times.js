// Times in UTC.

export const DAY = 86_400_000;

// `2024-10-31 10:00:00` of an RFC 3339 time in UTC.
export function toSecond(text) {
  return text.slice(0, 19).replace("T", " ");
}

// The time with all its digits, and its zone.
export function exact(text) {
  return text.replace("T", " ").replace("Z", " UTC");
}

// `2024-10-31` of milliseconds.
export function toDay(milliseconds) {
  return new Date(milliseconds).toISOString().slice(0, 10);
}

// `in 3 days`, `2 hours ago`: roughly, from now.
export function fromNow(text) {
  const difference = Date.parse(text) - Date.now();
  const size = Math.abs(difference);
  const [unit, length] = [["year", 365 * DAY], ["month", 30 * DAY], ["day", DAY], ["hour", DAY / 24], ["minute", DAY / 1440]].find(
    ([, length]) => size >= 2 * length,
  ) ?? ["second", 1000];
  const format = new Intl.RelativeTimeFormat("en", { numeric: "always" });
  return format.format(Math.trunc(difference / length), unit);
}
