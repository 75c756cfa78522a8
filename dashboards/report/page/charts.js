// --- drawing ------------------------------------------------------------------------------------------------
const STEP_LABEL = "format(datum.value, ',')";
const views = new Map(); // element -> view of a chart over time
const runOf = (id) => Number((/-(\d+)$/.exec(id) || [0, 0])[1]);

// The x axis: steps, hours since the begin of the run, or the clock. Times between windows are interpolated.
let axis = ["hours", "time"].includes(saved.axis) ? saved.axis : "step";
function placeOf(run, step) {
  if (axis === "step") return step;
  const { steps, times, first } = data.tensors.traces[run];
  const begin = steps.length > 1 ? times[0] - (times[1] - times[0]) / Math.max(1, steps[1] - steps[0]) * (steps[0] - first) : times[0];
  const xs = [first, ...steps], ts = [begin, ...times];
  let i = 1;
  while (i < xs.length - 1 && xs[i] < step) i += 1;
  const share = xs[i] === xs[i - 1] ? 1 : (step - xs[i - 1]) / (xs[i] - xs[i - 1]);
  const seconds = ts[i - 1] + share * (ts[i] - ts[i - 1]);
  return axis === "time" ? 1000 * seconds : (seconds - begin) / 3600;
}
function axisOf(domain, runs, until) {
  if (axis === "step") return { domain, labelExpr: STEP_LABEL };
  const ends = runs.flatMap((run) => {
    const trace = data.tensors.traces[run];
    return [placeOf(run, trace.first), placeOf(run, trace.steps[trace.steps.length - 1])];
  });
  if (until) ends.push(placeOf(runs[0], until)); // a forecast: at the pace of the last steps
  const span = [Math.min(...ends), Math.max(...ends)];
  const isLong = span[1] - span[0] > 86400000;
  return { domain: span, labelExpr: axis === "hours" ? "format(datum.value, '~g') + ' h'" : `timeFormat(datum.value, '${isLong ? "%b %d" : "%H:%M"}')` };
}
const placed = (run, row) => {
  const moved = { ...row };
  for (const field of ["step", "begin", "end"]) {
    if (field in row) { moved[field + "Shown"] = row[field]; moved[field] = placeOf("run" in row ? row.run : run, row[field]); }
  }
  return moved;
};
// A copy of a specification on the axis of choice; tooltips go on to say steps.
function onAxis(id, spec) {
  if (!spec.usermeta.time || axis === "step") return spec;
  const run = runOf(id), runs = id === "arrived" ? data.runs.map((_, i) => i) : [run];
  const walk = (node) => {
    if (Array.isArray(node)) return node.map(walk);
    if (node === null || typeof node !== "object") return node;
    const made = {};
    for (const [name, value] of Object.entries(node)) {
      if (name === "values" && Array.isArray(value)) made.values = value.map((row) => (row && typeof row === "object" ? placed(run, row) : row));
      else if (name === "tooltip" && Array.isArray(value)) made.tooltip = value.map((t) => (["step", "begin", "end"].includes(t.field) ? { ...t, field: t.field + "Shown" } : t));
      else made[name] = walk(value);
    }
    if (made.axis && made.axis.labelExpr === STEP_LABEL) {
      const { domain, labelExpr } = axisOf(made.scale.domain, runs, spec.usermeta.until);
      made.axis = { ...made.axis, labelExpr };
      made.scale = { ...made.scale, domain };
    }
    return made;
  };
  return walk(spec);
}

// On a phone the names of rows leave the chart half of the width.
const NARROW = 480, SHORT = 0.32;
function narrowed(node, width) {
  if (Array.isArray(node)) return node.map((one) => narrowed(one, width));
  if (node === null || typeof node !== "object") return node;
  const made = {};
  for (const [name, value] of Object.entries(node)) {
    if (name === "labelLimit") made[name] = Math.min(value, SHORT * width);
    else made[name] = name === "values" ? value : narrowed(value, width);
  }
  return made;
}

async function embed(element, id, spec) {
  const old = element.drawn;
  let shown = onAxis(id, spec);
  if (shown.usermeta.map && shown.width > element.clientWidth) shown = { ...shown, width: element.clientWidth };
  if (element.clientWidth < NARROW) shown = narrowed(shown, element.clientWidth);
  element.drawn = await vegaEmbed(element, shown, {
    actions: false,
    ast: true, // expressions are interpreted: the page's policy forbids eval
    config: data.themes[isDark() ? "dark" : "light"],
    renderer: shown.usermeta.embedOptions.renderer,
    tooltip: { theme: "update-watch" },
  });
  if (old) old.finalize();
  if (spec.usermeta.time) follow(element, id);
  return element.drawn.view;
}

// Newer browsers lay out what lies in a closed <details>, older ones do not: `offsetParent` alone does not tell.
const hasLayout = (element) => element.offsetParent !== null;
const isShown = (element) => hasLayout(element) && !element.closest("details:not([open])");

async function draw(element) {
  const id = element.dataset.chart, spec = data.charts[id];
  if (!spec || !hasLayout(element)) return; // drawn when it is opened
  performance.mark("draw " + id);
  const view = await embed(element, id, id === "arrived" ? withRuns(spec) : spec);
  if (spec.usermeta.map) mapDrawn(runOf(id), view);
}
// Runs that are switched off leave the chart of all.
function withRuns(spec) {
  if (data.runs.length < 2) return spec;
  return { ...spec, data: { values: spec.data.values.filter((row) => !hiddenRuns.has(row.run)) }, layer: spec.layer.map((layer) => (layer.data && layer.data.values ? { ...layer, data: { ...layer.data, values: layer.data.values.filter((row) => !hiddenRuns.has(row.run)) } } : layer)) };
}

let drawing = Promise.resolve();
function drawSoon(element) { // one at a time, with the page alive between two
  drawing = drawing.then(() => draw(element)).catch((error) => {
    root.dataset.failed = element.dataset.chart;
    console.error(element.dataset.chart, error);
  }).then(() => new Promise((next) => setTimeout(next)));
}
function drawAll(elements) {
  delete root.dataset.height;
  if (isDark()) root.dataset.drawnDark = ""; else delete root.dataset.drawnDark;
  elements.forEach(drawSoon);
  drawing = drawing.then(() => {
    root.dataset.height = Math.ceil(document.body.getBoundingClientRect().height);
    root.dataset.drawn = Math.round(performance.now());
  });
  return drawing;
}
const charts = () => [...document.querySelectorAll("[data-chart]")];
// First what is seen; what is folded, when there is time: it is open at once then, and on paper.
function drawPage() {
  drawAll(charts().filter(isShown)).then(() => {
    const rest = () => charts().filter((element) => !element.drawn).forEach(drawSoon);
    if (window.requestIdleCallback) requestIdleCallback(rest); else setTimeout(rest, 200);
  });
}
const redraw = () => { drawAll(charts().filter((element) => element.drawn || isShown(element))); redrawOpened(); };

// --- one line at the pointer in every chart over time ---------------------------------------------------------
let pending = null;
function follow(element, id) {
  views.set(element, element.drawn.view);
  if (element.follows) return;
  element.follows = true;
  const at = (event) => {
    const view = views.get(element), box = element.querySelector("svg, canvas").getBoundingClientRect();
    const x = (event.clientX - box.left) * (view.width() + view.padding().left + view.padding().right > 0 ? 1 : 1) - view.origin()[0];
    return x < 0 || x > view.width() ? null : view.scale("x").invert(x);
  };
  element.addEventListener("mousemove", (event) => cross(at(event)));
  element.addEventListener("mouseleave", () => cross(null));
  element.addEventListener("click", (event) => { const place = at(event); if (place !== null) moveTo(runOf(id), place); });
}
function cross(place) {
  if (pending === null) requestAnimationFrame(() => {
    const rows = pending.place === null ? [] : [{ step: pending.place }];
    pending = null;
    for (const [element, view] of views) {
      if (!element.isConnected) views.delete(element);
      else if (isShown(element)) view.data("cursor", rows).runAsync();
    }
  });
  pending = { place };
}

// --- charts as pictures ---------------------------------------------------------------------------------------
for (const button of document.querySelectorAll("[data-png]")) {
  button.addEventListener("click", async () => {
    const id = button.dataset.png, element = document.querySelector(`[data-chart="${id}"]`);
    if (!element.drawn) return;
    const view = element.drawn.view, before = view.background();
    view.background(getComputedStyle(root).getPropertyValue("--page").trim());
    download(fileName(data.runs.join("-") + "-" + id) + ".png", await view.toImageURL("png", 2));
    view.background(before);
  });
}
document.getElementById("axis").value = axis;
document.getElementById("axis").addEventListener("change", (event) => {
  axis = event.target.value;
  save({ axis });
  drawAll(charts().filter((element) => (data.charts[element.dataset.chart] || { usermeta: {} }).usermeta.time && isShown(element)));
  redrawOpened();
});
if (data.tensors.traces.some((trace) => !(trace.times[0] > 0))) document.querySelector("label.axis").remove();
themeButton.addEventListener("click", () => {
  save({ theme: { undefined: "light", light: "dark", dark: "" }[saved.theme || undefined] || undefined });
  showTheme();
  redraw();
});
system.addEventListener("change", () => { if (!saved.theme) redraw(); });
for (const folded of document.querySelectorAll("details[data-lazy]")) {
  folded.addEventListener("toggle", () => { if (folded.open) drawAll([...folded.querySelectorAll("[data-chart]")].filter((element) => !element.drawn)); });
}
