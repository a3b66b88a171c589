// Plots in SVG, drawn in the pixels of their element.

import { display, toText } from "./amounts.js";
import { h, svg } from "./dom.js";
import { DAY, exact, toDay } from "./times.js";

const HEIGHT = 220;
const TOP = 12;
const BOTTOM = 26;
const CHARACTER = 7.2;

// About `count` round values that cover a range, in millionths.
function roundValues(low, high, count) {
  const least = (high - low) / BigInt(count) || 1n;
  let step = 1n;
  while (step < least) {
    step *= 10n;
  }
  // The smallest of 1, 2 and 5 times a power of ten that is enough.
  step = [step / 5n, step / 2n, step].find((each) => each >= least) ?? step;
  const first = low < 0n ? -((-low + step - 1n) / step) * step : (low / step) * step;
  const values = [first];
  while (values.at(-1) < high) {
    values.push(values.at(-1) + step);
  }
  return values;
}

const MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

// At most `count` round times within a range of milliseconds, with their labels.
function roundTimes(from, to, count) {
  const length = (to - from) / count;
  const hours = [1, 3, 6, 12].map((each) => (each * DAY) / 24).find((each) => each >= length);
  const days = [1, 2, 7, 14].map((each) => each * DAY).find((each) => each >= length);
  const times = [];
  if (hours ?? days) {
    const step = hours ?? days;
    for (let time = Math.ceil(from / step) * step; time <= to; time += step) {
      const date = new Date(time);
      const day = `${date.getUTCDate()} ${MONTHS[date.getUTCMonth()]}`;
      times.push([time, time % DAY ? date.toISOString().slice(11, 16) : day]);
    }
    return times;
  }
  const months = [1, 2, 3, 6, 12, 24, 60, 120].find((each) => each * 31 * DAY >= length) ?? 600;
  const start = new Date(from);
  for (let month = start.getUTCFullYear() * 12; ; month += months) {
    const year = Math.floor(month / 12);
    const time = Date.UTC(year, month % 12);
    if (time > to) {
      return times;
    }
    if (time >= from) {
      times.push([time, months >= 12 ? `${year}` : `${MONTHS[month % 12]} ${year}`]);
    }
  }
}

// The balances at the end of each day, newest first.
function byDay(points) {
  const days = new Map();
  for (const { time, value } of points) {
    days.set(toDay(Date.parse(time)), value);
  }
  return [...days].reverse();
}

function balanceTable(points) {
  return h(
    "table",
    { class: "small" },
    h("caption", {}, "Balance at the end of each day with transactions, in UTC"),
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Day"), h("th", { scope: "col", class: "number" }, "Balance"))),
    h("tbody", {}, byDay(points).map(([day, value]) => h("tr", {}, h("td", {}, day), h("td", { class: "number" }, display(toText(value)))))),
  );
}

function draw(points, width) {
  const values = points.map((each) => each.value);
  const low = values.reduce((least, each) => (each < least ? each : least), 0n);
  const high = values.reduce((most, each) => (each > most ? each : most), low + 1n);
  const ticks = roundValues(low, high, 4);
  const [bottom, top] = [ticks[0], ticks.at(-1)];
  const left = Math.max(...ticks.map((each) => display(toText(each)).length)) * CHARACTER + 10;
  const first = Date.parse(points[0].time);
  const last = Math.max(Date.parse(points.at(-1).time), first + 1000);
  // Only the position on the screen is a floating-point number.
  const y = (value) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - Number(((value - bottom) * 100_000n) / (top - bottom)) / 100_000);
  const x = (time) => left + ((width - left - 8) * (time - first)) / (last - first);
  let line = "";
  points.forEach(({ time, value }, index) => {
    const at = x(Date.parse(time)).toFixed(1);
    line += index === 0 ? `M${at},${y(value).toFixed(1)}` : `H${at}V${y(value).toFixed(1)}`;
  });
  const plot = svg(
    "svg",
    {
      viewBox: `0 0 ${width} ${HEIGHT}`,
      width,
      height: HEIGHT,
      role: "img",
      "aria-label": `Balance from ${toDay(first)} to ${toDay(last)}: at first ${toText(values[0])}, at last ${toText(values.at(-1))}, lowest ${toText(values.reduce((a, b) => (b < a ? b : a)))}, highest ${toText(values.reduce((a, b) => (b > a ? b : a)))} credits`,
    },
    ticks.map((each) => [
      svg("line", { class: each === 0n ? "base" : "grid", x1: left, x2: width, y1: y(each), y2: y(each) }),
      svg("text", { class: "tick", x: left - 8, y: y(each) + 4, "text-anchor": "end" }, display(toText(each))),
    ]),
    roundTimes(first, last, Math.max(2, Math.floor((width - left) / 84))).map(([time, label]) => [
      svg("line", { class: "notch", x1: x(time), x2: x(time), y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM + 5 }),
      svg("text", { class: "tick", x: Math.min(x(time), width - label.length * 3.6), y: HEIGHT - 6, "text-anchor": "middle" }, label),
    ]),
    svg("path", { class: "area", d: `${line}V${y(0n).toFixed(1)}H${x(first).toFixed(1)}Z` }),
    svg("path", { class: "line", d: line }),
  );
  return { plot, x, y };
}

// The balance after each point, as steps. Points have a time, a value in millionths, and are in order. `reading` gets the
// balance below the pointer.
export function balancePlot(points, reading) {
  const holder = h("div", { class: "plot" });
  const table = h("details", {}, h("summary", {}, "Balance as a table"));
  table.addEventListener("toggle", () => table.open && table.childElementCount === 1 && table.append(balanceTable(points)));
  let width = 0;
  const resize = () => {
    const available = Math.floor(holder.clientWidth);
    if (available === 0 || available === width) {
      return;
    }
    width = available;
    const { plot, x, y } = draw(points, width);
    const marker = svg("circle", { class: "marker", r: 4, visibility: "hidden" });
    plot.append(marker);
    plot.addEventListener("pointermove", (event) => {
      const at = event.clientX - plot.getBoundingClientRect().left;
      const point = points.findLast((each) => x(Date.parse(each.time)) <= at) ?? points[0];
      marker.setAttribute("cx", Math.max(x(Date.parse(point.time)), 0));
      marker.setAttribute("cy", y(point.value));
      marker.setAttribute("visibility", "visible");
      reading.textContent = `${display(toText(point.value))} from ${exact(point.time)}`;
    });
    plot.addEventListener("pointerleave", () => {
      marker.setAttribute("visibility", "hidden");
      reading.textContent = "";
    });
    holder.replaceChildren(plot);
    performance.mark("plot");
  };
  new ResizeObserver(resize).observe(holder);
  return h("div", {}, holder, table);
}

// A bar whose length is a share of the largest value.
export function bar(value, largest) {
  const share = largest > 0n ? Number((value * 1000n) / largest) / 10 : 0;
  return svg(
    "svg",
    { class: "bar", width: "100%", height: 8, "aria-hidden": "true", focusable: "false" },
    svg("rect", { class: "whole", width: "100%", height: 8, rx: 2 }),
    svg("rect", { class: "part", width: `${Math.max(share, value > 0n ? 0.5 : 0)}%`, height: 8, rx: 2 }),
  );
}
