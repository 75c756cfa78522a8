// --- the map, moved by its slider -------------------------------------------------------------------------------
const maps = new Map(); // run -> view
const MARKS = { idle: "–", frozen: "·", unknown: "?" };
const slider = document.getElementById("moment");
const at = document.getElementById("at");
const longest = Math.max(...data.maps.map((map) => map.steps.length));
slider.max = longest - 1;
slider.value = longest - 1;
if (longest < 2) slider.parentElement.remove();

function pointOf(run) {
  const count = data.maps[run].steps.length;
  return longest < 2 ? 0 : Math.round(Number(slider.value) / (longest - 1) * (count - 1));
}
function fillMap(run) {
  const map = data.maps[run], view = maps.get(run), count = map.steps.length, point = pointOf(run);
  const classes = bytesOf(map, "class"), efficiency = bytesOf(map, "efficiency");
  const values = [];
  map.cells.forEach(([r, c, tensors], i) => {
    const code = classes[i * count + point];
    if (code >= data.classes.length) return;
    const verdict = data.classes[code];
    values.push({
      r, c, verdict, mark: MARKS[verdict] || "", name: map.worst[i],
      efficiency: efficiency ? valueOf(map.efficiency, efficiency[i * count + point]) : null,
      tensors: tensors === 1 ? "this tensor" : `worst of ${whole(tensors)} tensors`,
    });
  });
  view.data("cells", values);
  return view.runAsync();
}
function showMoment() {
  at.textContent = data.runs.length === 1 ? whole(data.maps[0].steps[pointOf(0)]) : percent(longest < 2 ? 1 : Number(slider.value) / (longest - 1)) + " of the run";
  for (const run of maps.keys()) fillMap(run);
}
function mapDrawn(run, view) {
  maps.set(run, view);
  view.addEventListener("click", (event, item) => { if (item && item.datum && item.datum.name) openTensor(run, item.datum.name); });
  return fillMap(run);
}
slider.addEventListener("input", showMoment);
// A click in a chart over time moves the map there.
function moveTo(run, place) {
  const steps = data.maps[run].steps;
  let best = 0;
  steps.forEach((step, i) => { if (Math.abs(placeOf(run, step) - place) < Math.abs(placeOf(run, steps[best]) - place)) best = i; });
  slider.value = steps.length < 2 ? 0 : Math.round(best / (steps.length - 1) * (longest - 1));
  showMoment();
}
// Only classes that some map shows are in the legend.
const shownClasses = new Set(data.maps.flatMap((map) => [...new Set(bytesOf(map, "class") || [])]));
for (const item of document.querySelectorAll(".legend [data-class]")) {
  if (!shownClasses.has(data.classes.indexOf(item.dataset.class))) item.remove();
}

// --- runs that are switched off ----------------------------------------------------------------------------------
const hiddenRuns = new Set((saved.hiddenRuns || []).filter((run) => run < data.runs.length));
function showRuns() {
  for (const element of document.querySelectorAll("[data-run]")) element.hidden = hiddenRuns.has(Number(element.dataset.run));
}
const runChips = document.getElementById("runchips");
if (runChips) {
  data.runs.forEach((name, run) => {
    const button = make("button", "");
    button.type = "button";
    button.append(make("i", `swatch s${run % data.runColors}`), cutMiddle(name, 26));
    button.title = name;
    button.setAttribute("aria-pressed", String(!hiddenRuns.has(run)));
    button.addEventListener("click", () => {
      if (hiddenRuns.has(run)) hiddenRuns.delete(run);
      else if (hiddenRuns.size < data.runs.length - 1) hiddenRuns.add(run);
      button.setAttribute("aria-pressed", String(!hiddenRuns.has(run)));
      save({ hiddenRuns: [...hiddenRuns] });
      showRuns();
      fill();
      redraw();
    });
    runChips.append(button);
  });
}
