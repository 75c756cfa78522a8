// --- the table of tensors --------------------------------------------------------------------------------------
const { fields, texts, causes, codes, healths, counts, traces } = data.tensors;
const rows = data.tensors.rows.map((cells, place) => {
  const row = { place };
  fields.forEach((field, i) => { row[field] = cells[i]; });
  row.why = causes[row.cause] || "";
  row.words = [row.name, healths[row.health], row.why, codes[row.cause], texts[row.advice], row.dtype, data.runs[row.run], ...row.also].join("\n").toLowerCase();
  return row;
});
const columns = [
  ...(data.runs.length > 1 ? [{ field: "run", title: "Run", text: (v) => data.runs[v] }] : []),
  { field: "name", title: "Tensor" },
  { field: "health", title: "Health" },
  { field: "efficiency", title: "Arrived", text: (v) => percent(v === null ? null : Math.max(0, v)), numeric: true, hint: "of each update, in the last window" },
  { field: "trace", title: "Over the run", fixed: true },
  { field: "ratio", title: "Update / weight", text: small, numeric: true },
  { field: "margin", title: "Rate margin", text: times, numeric: true, hint: "how far the learning rate may fall before half of its updates are lost: under 1x more than half is lost now, and at 1/50 the learning rate would have to be 50 times as large" },
  { field: "numel", title: "Elements", text: whole, numeric: true, first: -1 },
  { field: "since", title: "Since step", text: whole, numeric: true },
  { field: "why", title: "Cause" },
];
const byNumbers = new Intl.Collator("en", { numeric: true }).compare; // made once: `localeCompare` makes one for each pair
const STEP = 30;
const NAME_LETTERS = window.innerWidth < 760 ? 28 : 44;
let limit = STEP;
let order = columns.some((c) => c.field === saved.field) ? { field: saved.field, way: saved.way } : { field: "place", way: 1 };
let only = new Set(saved.only || []);
const opened = new Map(); // row -> its charts
const head = document.querySelector("#table thead tr");
const body = document.querySelector("#table tbody");
const search = document.getElementById("search");
search.value = saved.search || "";

for (const column of columns) {
  const th = make("th", column.numeric ? "num" : "");
  th.scope = "col";
  column.th = th;
  head.append(th);
  if (column.fixed) { th.textContent = column.title; continue; }
  th.dataset.title = column.title;
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
}

const chips = document.getElementById("chips");
function chip(label, name, health) {
  const button = make("button", health ? "health " + health : "");
  button.type = "button";
  if (health) button.append(make("i"));
  button.append(label);
  button.setAttribute("aria-pressed", String(only.has(name)));
  button.addEventListener("click", () => {
    if (only.has(name)) only.delete(name); else only.add(name);
    button.setAttribute("aria-pressed", String(only.has(name)));
    save({ only: [...only] });
    limit = STEP;
    fill();
  });
  button.chip = name;
  chips.append(button);
}
const known = new Set();
healths.forEach((name, i) => {
  const count = counts[i]; // of all tensors, also of those that the table leaves out
  if (count) { known.add("health" + i); chip(`${name} ${whole(count)}`, "health" + i, name); }
});
only = new Set([...only].filter((name) => known.has(name)));

function chosen() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const states = [...only].map((name) => Number(name.slice(6)));
  const found = rows.filter((row) => !hiddenRuns.has(row.run) && (!states.length || states.includes(row.health)) && words.every((word) => row.words.includes(word)));
  const { field, way } = order;
  return found.sort((a, b) => {
    const x = a[field], y = b[field];
    if (x === y) return a.place - b.place;
    if (x === null || x === "") return 1; // what is not known comes last either way
    if (y === null || y === "") return -1;
    return way * (typeof x === "string" ? byNumbers(x, y) : x - y);
  });
}

// --- a tensor over the run ------------------------------------------------------------------------------------------
const WIDE = 88, HIGH = 18;
function sparkline(row) {
  const values = seriesOf(traces[row.run], "efficiency", row.trace);
  const svg = makeSvg("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, width: WIDE, height: HIGH, class: "spark", "aria-hidden": "true" });
  if (!values || values.every((v) => v === null)) return svg;
  let path = "", pen = "M";
  values.forEach((v, i) => {
    if (v === null) { pen = "M"; return; }
    const x = values.length < 2 ? WIDE : i / (values.length - 1) * WIDE;
    path += `${pen}${x.toFixed(1)} ${(HIGH - 2 - (HIGH - 4) * Math.min(1, Math.max(0, v))).toFixed(1)}`;
    pen = "L";
  });
  if (!path.includes("L")) path = `M0 ${path.split(" ")[1]}L${WIDE} ${path.split(" ")[1]}`;
  svg.append(makeSvg("path", { d: path }));
  return svg;
}
function tensorSpec(row, series) {
  const values = seriesOf(traces[row.run], series, row.trace);
  if (!values || values.filter((v) => v !== null).length < 2) return null;
  const steps = traces[row.run].steps;
  const filled = values.map((v, i) => ({ step: steps[i], v, run: row.run })).filter((point) => point.v !== null);
  const spec = structuredClone(data.tensorCharts[series]);
  for (const layer of spec.layer) if (layer.data && layer.data.name === "values") layer.data = { values: filled };
  return spec;
}
async function drawTensor(row, holder) {
  for (const series of Object.keys(data.tensorCharts)) {
    const spec = tensorSpec(row, series);
    if (!spec) continue;
    let element = holder.querySelector(`[data-series="${series}"]`);
    if (!element) {
      const figure = make("figure");
      figure.append(make("figcaption", "", spec.description));
      element = make("div", "chart");
      element.dataset.series = series;
      figure.append(element);
      holder.append(figure);
    }
    if (holder.isConnected) await embed(element, "tensor-" + row.run, { ...spec, description: `${row.name}: ${spec.description}` });
  }
}
function redrawOpened() {
  for (const [row, holder] of opened) if (holder && holder.isConnected) drawTensor(row, holder);
}

function detail(row) {
  const tr = make("tr", "detail");
  const cell = make("td"), td = make("div", "inside"); // no wider than the window, however wide the table is
  cell.colSpan = columns.length;
  cell.append(td);
  td.append(make("p", "full", row.name));
  td.append(make("p", "say", texts[row.advice] || "Nothing to say: its updates arrive."));
  const facts = [
    row.dtype, row.shape, row.group && "optimizer/group " + row.group,
    row.lost !== null && percent(row.lost) + " of the elements that should have changed did not",
    row.displacement !== null && "net progress " + percent(row.displacement),
    row.state !== null && "updates are " + factor(row.state) + " of what FP32 state would give",
    row.also.length && "also called " + row.also.join(", "),
  ];
  td.append(make("p", "more", facts.filter(Boolean).join("  ·  ")));
  const holder = make("div", "tensorcharts");
  td.append(holder);
  opened.set(row, holder);
  if (row.accumulators.length) {
    const table = make("table"), top = make("tr");
    for (const title of ["Beside it", "Stored in", "Health", "Arrives", "Growth", "Decay", "What to do"]) top.append(make("th", "", title));
    table.append(top);
    for (const [name, dtype, health, efficiency, growth, decay, advice] of row.accumulators) {
      const line = make("tr"), state = make("td", "health " + healths[health]);
      state.append(make("i"), healths[health]);
      line.append(make("td", "", name), make("td", "", dtype), state);
      for (const value of [efficiency, growth, decay]) line.append(make("td", "", percent(value)));
      line.append(make("td", "advice", texts[advice]));
      table.append(line);
    }
    td.append(table);
  }
  tr.append(cell);
  setTimeout(() => drawTensor(row, holder));
  return tr;
}

const address = (row) => "#tensor=" + encodeURIComponent(row.name) + (data.runs.length > 1 ? "&run=" + row.run : "");
function toggle(row, tr) {
  const isOpen = opened.delete(row);
  if (!isOpen) opened.set(row, null);
  tr.classList.toggle("open", !isOpen);
  tr.querySelector("button").setAttribute("aria-expanded", String(!isOpen));
  if (isOpen) tr.nextSibling.remove(); else tr.after(detail(row));
  history.replaceState(null, "", isOpen ? location.pathname + location.search : address(row));
}
function line(row) {
  const tr = make("tr", "row " + healths[row.health]);
  for (const column of columns) {
    const value = row[column.field];
    const td = make("td", column.numeric ? "num" : "");
    if (column.field === "name") {
      td.className = "name";
      td.title = value;
      const button = make("button", "", cutName(row.short, NAME_LETTERS));
      button.type = "button";
      button.setAttribute("aria-expanded", String(opened.has(row)));
      td.append(button);
    } else if (column.field === "health") {
      td.className = "health " + healths[value];
      td.append(make("i"), healths[value]);
    } else if (column.field === "trace") {
      td.append(sparkline(row));
    } else if (column.field === "why") {
      td.className = "why";
      td.textContent = value;
      td.title = texts[row.advice];
    } else {
      td.textContent = column.text ? column.text(value) : value;
    }
    tr.append(td);
  }
  tr.addEventListener("click", () => { if (!window.getSelection().toString()) toggle(row, tr); });
  return tr;
}

const total = counts.reduce((sum, count) => sum + count, 0);
const moreTensors = document.getElementById("moretensors");
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
  document.getElementById("found").textContent = found.length === total ? `${whole(total)} tensor${total === 1 ? "" : "s"}` : `${whole(found.length)} of ${whole(total)} tensors`;
  moreTensors.replaceChildren();
  if (found.length > limit) {
    for (const [label, count] of [[`Show ${Math.min(STEP, found.length - limit)} more`, limit + STEP], [`Show all ${whole(found.length)}`, Infinity]]) {
      const button = make("button", "", label);
      button.type = "button";
      button.addEventListener("click", () => { limit = count; fill(); });
      moreTensors.append(button);
    }
  }
  if (!found.length) moreTensors.append(rows.length ? "No tensor matches." : "No tensor is watched.");
  if (data.tensors.left_out) moreTensors.append(`${whole(data.tensors.left_out)} further tensors, all better off, are counted above and left out of this table; the journal has them: update_watch.dashboards.journal.read_journal.`);
}
search.addEventListener("input", () => { save({ search: search.value }); limit = STEP; fill(); });

// Show one tensor, opened: from a click in the map, or from the page's address.
function openTensor(run, name) {
  const row = rows.find((one) => one.run === run && one.name === name);
  if (!row) { say(`${name} is not in the table`); return; }
  only.clear();
  for (const button of chips.children) button.setAttribute("aria-pressed", "false");
  search.value = name;
  opened.clear();
  opened.set(row, null);
  limit = STEP;
  fill();
  history.replaceState(null, "", address(row));
  document.getElementById("tensors").scrollIntoView();
}
function openAddress() {
  const found = new URLSearchParams(location.hash.slice(1));
  if (found.has("tensor")) openTensor(Number(found.get("run") || 0), found.get("tensor"));
}
window.addEventListener("hashchange", openAddress);

// --- taken along: Markdown, CSV -------------------------------------------------------------------------------------
const cell = (text) => String(text).replaceAll("|", "\\|").replaceAll("\n", " ");
function markdown() {
  const words = (selector) => [...document.querySelectorAll(selector)].map((element) => element.textContent.trim().replace(/\s+/g, " ")).filter(Boolean);
  const lines = [`**${words("#verdict h1").join(" ")}**`, "", ...words("#verdict .where"), ...words("#verdict .reason, #verdict .cards li"), ""];
  const code = document.querySelector("#verdict .cure code");
  if (code) lines.push("```", code.textContent, "```", "");
  lines.push("| " + columns.filter((c) => !c.fixed).map((c) => c.title).join(" | ") + " |", "|" + "---|".repeat(columns.length - 1));
  for (const row of chosen().slice(0, 12)) {
    lines.push("| " + columns.filter((c) => !c.fixed).map((c) => cell(c.field === "name" ? "`" + row.name + "`" : c.field === "health" ? healths[row.health] : c.text ? c.text(row[c.field]) : row[c.field])).join(" | ") + " |");
  }
  return lines.join("\n") + "\n";
}
function csv() {
  const quote = (v) => { const text = v === null || v === undefined ? "" : String(v); return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text; };
  const named = ["run", "name", "health", "why", "efficiency", "lost", "displacement", "ratio", "margin", "since", "numel", "dtype", "advice"];
  const value = (row, field) => ({ run: data.runs[row.run], health: healths[row.health], advice: texts[row.advice] }[field] ?? row[field]);
  return [named.join(","), ...chosen().map((row) => named.map((field) => quote(value(row, field))).join(","))].join("\n") + "\n";
}
document.getElementById("markdown").addEventListener("click", () => copy(markdown()));
document.getElementById("csv").addEventListener("click", () => download(fileName(data.runs.join("-")) + ".csv", "data:text/csv;charset=utf-8," + encodeURIComponent(csv())));
