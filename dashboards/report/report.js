"use strict";
// Everything from the run reaches the page as text (textContent) or as data of a chart, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const kept = window.sessionStorage; // search, order and place outlive a reload of a live report
const key = "update-watch:" + location.pathname;
const saved = (() => { try { return JSON.parse(kept.getItem(key)) || {}; } catch { return {}; } })();
function save(values) {
  Object.assign(saved, values);
  try { kept.setItem(key, JSON.stringify(saved)); } catch { /* a browser may forbid it */ }
}

// --- charts -------------------------------------------------------------------------------------------
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const pressed = document.querySelector(".views [aria-pressed=true]");
const buttons = [...document.querySelectorAll(".views button")];
let view = pressed ? pressed.dataset.view : (Object.keys(data.charts).find((id) => id.startsWith("heatmap-0-")) || "").split("-")[2];
if (buttons.some((b) => b.dataset.view === saved.view)) view = saved.view;

function specification(id) {
  return data.charts[id] || data.charts[id + "-" + view];
}

async function draw(element) {
  const spec = specification(element.dataset.chart);
  if (!spec) return;
  const config = data.themes[dark.matches ? "dark" : "light"];
  if (element.drawn) element.drawn.finalize();
  performance.mark("draw " + element.dataset.chart);
  element.drawn = await vegaEmbed(element, spec, {
    actions: false,
    ast: true, // expressions are interpreted: the page's policy forbids eval
    config,
    renderer: spec.usermeta.embedOptions.renderer,
    tooltip: { theme: "update-watch" },
  });
}

let drawing = Promise.resolve();
function drawAll(elements) {
  delete root.dataset.height;
  for (const element of elements) {
    drawing = drawing.then(() => draw(element)).catch((error) => {
      root.dataset.failed = element.dataset.chart;
      console.error(element.dataset.chart, error);
    }).then(() => new Promise((next) => setTimeout(next)));
  }
  drawing = drawing.then(() => {
    root.dataset.height = Math.ceil(document.body.getBoundingClientRect().height);
    root.dataset.drawn = Math.round(performance.now());
  });
}

const charts = [...document.querySelectorAll("[data-chart]")];
function press() {
  for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.view === view));
}
for (const button of buttons) {
  button.addEventListener("click", () => {
    view = button.dataset.view;
    save({ view });
    press();
    drawAll(charts.filter((element) => element.dataset.chart.startsWith("heatmap-")));
  });
}
dark.addEventListener("change", () => drawAll(charts));

// --- the table of tensors --------------------------------------------------------------------------------
const { fields, texts, causes, healths } = data.tensors;
const rows = data.tensors.rows.map((cells, place) => {
  const row = { place };
  fields.forEach((field, i) => { row[field] = cells[i]; });
  row.why = causes[row.cause] ? causes[row.cause].replaceAll("_", " ") : "";
  row.words = [row.name, healths[row.health], row.why, causes[row.cause], texts[row.advice], row.dtype, data.runs[row.run], ...row.also].join("\n").toLowerCase();
  return row;
});
const fixed = (digits) => (v) => (v === null ? "–" : v.toFixed(digits));
const percent = (v) => (v === null ? "–" : v > 0 && v < 0.005 ? "<1%" : v < 1 && v >= 0.995 ? ">99%" : Math.round(100 * v) + "%");
const whole = (v) => (v === null ? "–" : v.toLocaleString("en-US"));
const small = (v) => (v === null ? "–" : v === 0 ? "0" : v.toExponential(1));
const factor = (v) => (v === null ? "–" : v >= 100 ? Math.round(v) : v >= 0.01 ? v.toPrecision(2) : v.toExponential(0));
const columns = [
  ...(data.runs.length > 1 ? [{ field: "run", title: "Run", text: (v) => data.runs[v] }] : []),
  { field: "name", title: "Tensor" },
  { field: "health", title: "Health" },
  { field: "efficiency", title: "Efficiency", text: fixed(2), numeric: true },
  { field: "lost", title: "Lost", text: percent, numeric: true, first: -1 },
  { field: "displacement", title: "Net progress", text: fixed(2), numeric: true },
  { field: "ratio", title: "Update / weight", text: small, numeric: true },
  { field: "critical", title: "Edge", text: factor, numeric: true, first: -1, hint: "critical over current learning rate: above 1 more than half is lost" },
  { field: "numel", title: "Elements", text: whole, numeric: true, first: -1 },
  { field: "since", title: "Since step", text: whole, numeric: true },
  { field: "why", title: "Cause" },
];
const STEP = 100;
let limit = STEP;
let order = columns.some((c) => c.field === saved.field) ? { field: saved.field, way: saved.way } : { field: "place", way: 1 };
let only = new Set(saved.only || []);
const opened = new Set();
const head = document.querySelector("#table thead tr");
const body = document.querySelector("#table tbody");
const search = document.getElementById("search");
search.value = saved.search || "";

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

for (const column of columns) {
  const th = make("th", column.numeric ? "num" : "");
  const button = make("button", "", column.title);
  button.type = "button";
  if (column.hint) button.title = column.hint;
  button.addEventListener("click", () => {
    const first = column.first || 1;
    order = order.field !== column.field ? { field: column.field, way: first } : order.way === first ? { field: column.field, way: -first } : { field: "place", way: 1 };
    save({ field: order.field, way: order.way });
    fill();
  });
  th.append(button);
  head.append(th);
  column.th = th;
}

const chips = document.getElementById("chips");
function chip(label, key, health) {
  const button = make("button", health ? "health " + health : "");
  button.type = "button";
  if (health) button.append(make("i"));
  button.append(label);
  button.setAttribute("aria-pressed", String(only.has(key)));
  button.addEventListener("click", () => {
    if (only.has(key)) only.delete(key); else only.add(key);
    button.setAttribute("aria-pressed", String(only.has(key)));
    save({ only: [...only] });
    limit = STEP;
    fill();
  });
  chips.append(button);
}
const known = new Set();
if (data.runs.length > 1) data.runs.forEach((name, i) => { known.add("run" + i); chip(name, "run" + i); });
healths.forEach((name, i) => {
  const count = rows.filter((row) => row.health === i).length;
  if (count) { known.add("health" + i); chip(`${name} ${count.toLocaleString("en-US")}`, "health" + i, name); }
});
only = new Set([...only].filter((key) => known.has(key)));

function chosen() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const runs = [...only].filter((k) => k.startsWith("run")).map((k) => Number(k.slice(3)));
  const states = [...only].filter((k) => k.startsWith("health")).map((k) => Number(k.slice(6)));
  const found = rows.filter((row) => (!runs.length || runs.includes(row.run)) && (!states.length || states.includes(row.health)) && words.every((word) => row.words.includes(word)));
  const { field, way } = order;
  return found.sort((a, b) => {
    const x = a[field], y = b[field];
    if (x === y) return a.place - b.place;
    if (x === null || x === "") return 1; // what is not known comes last either way
    if (y === null || y === "") return -1;
    return way * (typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y);
  });
}

function detail(row) {
  const tr = make("tr", "detail");
  const td = make("td");
  td.colSpan = columns.length;
  td.append(make("p", "say", texts[row.advice] || "Nothing to say: its updates arrive."));
  const facts = [row.dtype, row.shape, row.group && "optimizer/group " + row.group, row.state !== null && "state factor " + row.state, row.also.length && "also called " + row.also.join(", ")];
  td.append(make("p", "more", facts.filter(Boolean).join("  ·  ")));
  if (row.accumulators.length) {
    const table = make("table"), top = make("tr");
    for (const title of ["Beside it", "Stored in", "Health", "Efficiency", "Growth", "Decay", ""]) top.append(make("th", "", title));
    table.append(top);
    for (const [name, dtype, health, efficiency, growth, decay, advice] of row.accumulators) {
      const line = make("tr"), state = make("td", "health " + healths[health]);
      state.append(make("i"), healths[health]);
      line.append(make("td", "", name), make("td", "", dtype), state);
      for (const value of [efficiency, growth, decay]) line.append(make("td", "", fixed(2)(value)));
      line.append(make("td", "advice", texts[advice]));
      table.append(line);
    }
    td.append(table);
  }
  tr.append(td);
  return tr;
}

function line(row) {
  const tr = make("tr", "row " + healths[row.health]);
  for (const column of columns) {
    const value = row[column.field];
    const td = make("td", column.numeric ? "num" : "");
    if (column.field === "name") {
      td.className = "name";
      td.title = value;
      const button = make("button", "", value);
      button.setAttribute("aria-expanded", String(opened.has(row)));
      td.append(button);
    } else if (column.field === "health") {
      td.className = "health " + healths[value];
      td.append(make("i"), healths[value]);
    } else if (column.field === "why") {
      td.className = "why";
      td.textContent = value;
      td.title = texts[row.advice];
    } else {
      td.textContent = column.text ? column.text(value) : value;
      if (column.field === "efficiency" && value !== null) {
        const meter = make("span", "meter"), inner = make("i");
        inner.style.width = 100 * Math.min(1, Math.max(0, value)) + "%";
        meter.append(inner);
        td.append(meter);
      }
    }
    tr.append(td);
  }
  tr.addEventListener("click", () => {
    if (window.getSelection().toString()) return;
    const isOpen = opened.delete(row);
    if (!isOpen) opened.add(row);
    tr.classList.toggle("open", !isOpen);
    tr.querySelector("button").setAttribute("aria-expanded", String(!isOpen));
    if (isOpen) tr.nextSibling.remove(); else tr.after(detail(row));
  });
  return tr;
}

const more = document.getElementById("more");
function fill() {
  for (const column of columns) {
    if (column.field === order.field) column.th.setAttribute("aria-sort", order.way > 0 ? "ascending" : "descending");
    else column.th.removeAttribute("aria-sort");
  }
  const found = chosen();
  const lines = [];
  for (const row of found.slice(0, limit)) {
    const tr = line(row);
    lines.push(tr);
    if (opened.has(row)) { tr.classList.add("open"); lines.push(detail(row)); }
  }
  body.replaceChildren(...lines);
  document.getElementById("found").textContent = found.length === rows.length ? `${whole(rows.length)} tensors` : `${whole(found.length)} of ${whole(rows.length)} tensors`;
  more.replaceChildren();
  if (found.length > limit) {
    for (const [label, count] of [[`Show ${Math.min(STEP, found.length - limit)} more`, limit + STEP], [`Show all ${whole(found.length)}`, Infinity]]) {
      const button = make("button", "", label);
      button.type = "button";
      button.addEventListener("click", () => { limit = count; fill(); });
      more.append(button);
    }
  }
  if (!found.length) more.append(rows.length ? "No tensor matches." : "No tensor is watched.");
  if (data.tensors.left_out) more.append(`${whole(data.tensors.left_out)} further tensors, all better off, are left out of this table.`);
}
search.addEventListener("input", () => { save({ search: search.value }); limit = STEP; fill(); });

press();
fill();
drawAll(charts);

// --- a run that goes on ------------------------------------------------------------------------------------
if (data.reload) {
  if (saved.scroll) window.scrollTo({ top: saved.scroll, behavior: "instant" });
  window.addEventListener("beforeunload", () => save({ scroll: window.scrollY }));
  setInterval(() => {
    const isBusy = document.hidden || document.activeElement === search || opened.size || window.getSelection().toString();
    if (!isBusy) location.reload();
  }, 1000 * data.reload);
}
