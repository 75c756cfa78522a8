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

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}
function makeSvg(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

// --- numbers in words -----------------------------------------------------------------------------------
const percent = (v) => (v === null ? "–" : v > 0 && v < 0.005 ? "<1%" : v < 1 && v >= 0.995 ? ">99%" : Math.round(100 * v) + "%");
const thousands = new Intl.NumberFormat("en-US");
const whole = (v) => (v === null ? "–" : thousands.format(v));
const small = (v) => (v === null ? "–" : v === 0 ? "0" : v.toExponential(1));
const factor = (v) => (v === null ? "–" : v >= 100 ? whole(Math.round(v)) : v >= 0.01 ? String(Number(v.toPrecision(2))) : v.toExponential(0));
const times = (v) => (v === null ? "–" : v >= 10 ? whole(Math.round(v)) + "x" : v >= 0.5 ? v.toFixed(1) + "x" : "1/" + whole(Math.round(1 / v)));
function cutMiddle(text, width) {
  if (text.length <= width) return text;
  const head = Math.ceil((width - 1) * 0.4);
  return text.slice(0, head) + "…" + text.slice(text.length - (width - 1 - head));
}
// A tensor's name keeps its first number, which tells the layer, and its end: "…17…o_proj.weight".
function cutName(name, width) {
  const cut = cutMiddle(name, width), number = /(?:^|\.)(\d+)\./.exec(name);
  if (cut === name || !number || cut.split("…")[0].includes(number[0])) return cut;
  const from = "…" + name.slice(number.index).replace(/^\./, "");
  if (from.length <= width) return from;
  const head = "…" + number[1] + "…";
  return head + name.slice(name.length - (width - head.length));
}

// --- series in bytes --------------------------------------------------------------------------------------
function unpack(text) {
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i += 1) bytes[i] = raw.charCodeAt(i);
  return bytes;
}
function bytesOf(holder, name) {
  if (!holder[name]) return null;
  holder.unpacked = holder.unpacked || {};
  holder.unpacked[name] = holder.unpacked[name] || unpack(holder[name].bytes || holder[name]);
  return holder.unpacked[name];
}
function valueOf(coding, code) {
  if (code === 255) return null;
  const value = coding.low + (coding.high - coding.low) * code / 254;
  return coding.log ? 10 ** value : value;
}
// Values of one tensor (row) at every point of its run; null where nothing is known.
function seriesOf(holder, name, row) {
  const bytes = bytesOf(holder, name), count = holder.steps.length;
  if (!bytes) return null;
  return holder.steps.map((_, i) => valueOf(holder[name], bytes[row * count + i]));
}

// --- what is said aside, copied, saved ----------------------------------------------------------------------
const said = document.getElementById("said");
function say(text) {
  said.textContent = text;
  clearTimeout(say.timer);
  say.timer = setTimeout(() => { said.textContent = ""; }, 2500);
}
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const field = make("textarea");
    field.value = text;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  say("Copied");
}
function download(name, address) {
  const link = make("a");
  link.href = address;
  link.download = name;
  link.click();
}
const fileName = (text) => text.replace(/[^A-Za-z0-9._-]+/g, "-").slice(0, 80);

// --- light and dark -----------------------------------------------------------------------------------------
const system = window.matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (saved.theme || (system.matches ? "dark" : "light")) === "dark";
const themeButton = document.getElementById("theme");
function showTheme() {
  if (saved.theme) root.dataset.theme = saved.theme; else delete root.dataset.theme;
  themeButton.textContent = "Theme: " + (saved.theme || "system");
}
showTheme();

// --- the cure -----------------------------------------------------------------------------------------------
for (const block of document.querySelectorAll(".cure")) {
  const codes = data.cures[block.dataset.cure];
  const pane = block.querySelector("code");
  if (!pane) continue;
  const pressed = (kind) => block.querySelector(`[data-${kind}][aria-pressed=true]`);
  const show = () => {
    const ofCure = codes[pressed("option").dataset.option];
    pane.textContent = ofCure[pressed("trainer").dataset.trainer] || "There is no short way to it in this trainer.";
  };
  for (const kind of ["option", "trainer"]) {
    const buttons = block.querySelectorAll(`[data-${kind}]`);
    for (const button of buttons) {
      button.addEventListener("click", () => {
        for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
        show();
      });
    }
  }
  block.querySelector(".others").addEventListener("click", (event) => {
    for (const button of block.querySelectorAll("[data-trainer]")) button.hidden = false;
    event.target.remove();
  });
  block.querySelector(".copy").addEventListener("click", () => copy(pane.textContent));
  show();
}
