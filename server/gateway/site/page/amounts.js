// Exact amounts. They are text, or whole millionths in a BigInt, and never floating-point numbers.

const ONE = 1_000_000n;

// The millionths of an amount as the API writes it.
export function toMillionths(text) {
  const match = /^(-?)(\d+)(?:\.(\d{1,6}))?$/.exec(text);
  if (!match) {
    throw new Error(`not an amount: ${text}`);
  }
  const [, minus, whole, fraction = ""] = match;
  const absolute = BigInt(whole) * ONE + BigInt(fraction.padEnd(6, "0"));
  return minus ? -absolute : absolute;
}

// The shortest text of an amount in millionths, as the API writes it.
export function toText(millionths) {
  const absolute = millionths < 0n ? -millionths : millionths;
  const fraction = String(absolute % ONE).padStart(6, "0").replace(/0+$/, "");
  return `${millionths < 0n ? "-" : ""}${absolute / ONE}${fraction && `.${fraction}`}`;
}

// An amount for reading: digits in groups, a real minus sign, and a plus if `signed`.
export function display(text, signed = false) {
  const [, minus, whole, fraction] = /^(-?)(\d+)(\.\d+)?$/.exec(text);
  const sign = minus ? "\u2212" : signed && text !== "0" ? "+" : "";
  return `${sign}${whole.replace(/\B(?=(\d{3})+$)/g, ",")}${fraction ?? ""}`;
}

// The characters after the whole part, by which amounts of a column are padded to align their points.
export function fractionLength(text) {
  const point = text.indexOf(".");
  return point < 0 ? 0 : text.length - point;
}
