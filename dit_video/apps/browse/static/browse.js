// The page of a data set: what is selected, and the rows that are shown of it.
import { Charts } from "./browse_charts.js";
import { openDetail } from "./browse_detail.js";
import { makeTable, makeTiles, resumeThumbnails, stopThumbnails } from "./browse_rows.js";
import { ServerSource, StaticSource, describeLimit, formatOption, formatWhere } from "./browse_source.js";
import { countClips, formatDuration, formatNumber, formatTitle } from "./browse_text.js";
import { byId, copyText, make, makeButton } from "./dom.js";

const PAGE_ROWS = 100;
const DELAY = 120; // milliseconds without a change after which rows are asked for
const TILE_COLUMNS = ["name", "captions", "outcome", "seconds", "width", "height"];
const TABLE_COLUMNS = ["name", "captions", "outcome", "reason", "seconds", "width", "height", "fps"];
const SHOWN = { kept: "Kept", left_out: "Left out", all: "All" };
const MEASURES = ["motion", "sharpness", "black", "frozen", "letterbox"];

const embedded = byId("data");
const source = embedded ? new StaticSource(JSON.parse(embedded.textContent)) : new ServerSource();
const state = { expression: "", limits: new Map(), search: "", show: "kept", sort: "", descending: false, view: "tiles", first: 0, columns: TABLE_COLUMNS };
let data, charts, timer, request = 0;
let rows = [];

/** Read the selection from the page's address. */
function readAddress() {
  const values = new URLSearchParams(location.hash.slice(1));
  for (const name of ["expression", "search", "show", "sort", "view"]) state[name] = values.get(name) ?? state[name];
  state.descending = values.get("descending") === "true";
  try {
    state.limits = new Map(JSON.parse(values.get("limits") ?? "[]").filter(([name]) => charts.charts.has(name)));
  } catch {
    state.limits = new Map();
  }
  if (!(state.show in SHOWN)) state.show = "kept";
  if (!source.hasExpressions) state.expression = "";
}

function writeAddress() {
  const values = { expression: state.expression, search: state.search, show: state.show, sort: state.sort, view: state.view };
  const set = Object.entries(values).filter(([name, value]) => value && !(name === "show" && value === "kept") && !(name === "view" && value === "tiles"));
  if (state.descending) set.push(["descending", "true"]);
  if (state.limits.size) set.push(["limits", JSON.stringify([...state.limits])]);
  history.replaceState(null, "", set.length ? `#${new URLSearchParams(set)}` : location.pathname + location.search);
}

/** Return the table's columns: those that all kept clips share are not shown of them. */
const listColumns = () => state.columns.filter((name) => state.show !== "kept" || !["outcome", "reason"].includes(name));

/** Change the selection, and show its first page soon. */
function change(values, delay = DELAY) {
  Object.assign(state, { first: 0 }, values);
  showControls();
  writeAddress();
  clearTimeout(timer);
  timer = setTimeout(load, delay);
}

async function load() {
  const number = ++request;
  const columns = [...data.captions, ...(state.view === "table" ? listColumns() : [state.sort, ...TILE_COLUMNS].filter(Boolean))];
  byId("list").setAttribute("aria-busy", "true");
  stopThumbnails(byId("list"));
  let answer;
  try {
    answer = await source.getRows({ ...state, count: PAGE_ROWS, columns });
  } catch (error) {
    if (number === request) showError(error);
    return;
  }
  if (number !== request) return; // a newer one is on its way
  showError(null);
  ({ rows } = answer);
  charts.update(answer.counts, state.limits);
  showSelected(answer.selected);
  showRows(answer.total);
}

function showError(error) {
  const isExpression = error !== null && error.status === 422;
  const text = byId("expression-error"), banner = byId("connection");
  text.hidden = !isExpression;
  banner.hidden = error === null || isExpression;
  (isExpression ? text : banner).textContent = error?.message.replace(/^where=.* is invalid: /, "") ?? "";
  byId("expression").setAttribute("aria-invalid", String(isExpression));
  byId("copy-where").disabled = isExpression || !byId("where").textContent;
  if (!error) return;
  resumeThumbnails(byId("list"));
  byId("list").removeAttribute("aria-busy");
}

function showSelected({ clips, seconds }) {
  const { total } = data;
  byId("selected-clips").textContent = `${countClips(clips)}, ${formatDuration(seconds)}`;
  const share = total.clips ? (100 * clips) / total.clips : 0;
  byId("selected-share").textContent = clips === total.clips ? "all that are kept" : `${share < 10 ? share.toFixed(1) : share.toFixed(0)} % of ${formatNumber(total.clips)}`;
}

function showRows(total) {
  const list = byId("list"), onOpen = (index) => openDetail(source, rows, index, data.captions);
  const kinds = new Map(data.columns.map((column) => [column.name, column.kind]));
  const onSort = (name) => change({ sort: name, descending: state.sort === name ? !state.descending : kinds.get(name) === "number" }, 0);
  const options = { ...state, captions: data.captions, columns: listColumns(), kinds, onOpen, onSort };
  const table = list.querySelector(".table-frame"), left = table?.scrollLeft ?? 0;
  if (rows.length) list.replaceChildren((state.view === "table" ? makeTable : makeTiles)(source, rows, options));
  else list.replaceChildren(make("p", { class: "empty", textContent: "No rows match. Widen a limit, or clear the search." }));
  if (left && list.firstChild.classList.contains("table-frame")) list.firstChild.scrollLeft = left;
  list.removeAttribute("aria-busy");
  const last = state.first + rows.length;
  byId("position").textContent = total ? `${formatNumber(state.first + 1)}–${formatNumber(last)} of ${formatNumber(total)}` : "no rows";
  byId("previous").disabled = state.first === 0;
  byId("next").disabled = last >= total;
}

/** Show the state in the controls, before the rows arrive. */
function showControls() {
  const where = formatWhere(state.expression, state.limits);
  byId("where").textContent = where ? formatOption(where) : "";
  byId("copy-where").disabled = !where;
  document.querySelector(".copy-line").hidden = !where;
  const chips = [...state.limits].map(([name, limit]) => {
    const button = makeButton("×", () => setLimit(name, null), { "aria-label": `Remove the limit of ${formatTitle(name)}` });
    return make("li", {}, make("span", {}, make("b", { textContent: formatTitle(name) }), ` ${describeLimit(limit)}`), button);
  });
  if (chips.length > 1) chips.push(make("li", { class: "all-chips" }, makeButton("Remove all", () => change({ limits: new Map() }))));
  byId("limits").replaceChildren(...chips);
  for (const [name, chart] of charts.charts) chart.update(null, state.limits.get(name) ?? null);
  for (const id of ["show", "view"]) for (const button of byId(id).children) button.setAttribute("aria-pressed", String(button.value === state[id]));
  byId("sort").value = state.sort;
  byId("direction").textContent = state.descending ? "↓" : "↑";
  byId("direction").setAttribute("aria-label", state.descending ? "Descending: sort ascending" : "Ascending: sort descending");
  byId("direction").disabled = !state.sort;
  byId("columns").hidden = state.view !== "table";
}

function setLimit(name, limit) {
  const limits = new Map(state.limits);
  if (limit) limits.set(name, limit);
  else limits.delete(name);
  change({ limits });
}

function makeSegments(id, titles) {
  byId(id).append(...Object.entries(titles).map(([value, title]) => makeButton(title, () => change({ [id]: value }, 0), { value })));
}

function makeColumnMenu(names) {
  const chosen = new Set(state.columns);
  const boxes = names.map((name) => {
    const toggle = (event) => {
      event.target.checked ? chosen.add(name) : chosen.delete(name);
      state.columns = names.filter((each) => chosen.has(each));
      load();
    };
    return make("label", {}, make("input", { type: "checkbox", checked: chosen.has(name), on: { change: toggle } }), formatTitle(name));
  });
  byId("columns").querySelector(".menu").append(...boxes);
}

/** Order columns: measures that are chosen by, then other numbers, then texts. */
function orderColumns(columns) {
  const rank = ({ name, kind }) => (MEASURES.includes(name) ? 0 : kind === "number" ? 1 : 2);
  return [...columns].sort((a, b) => rank(a) - rank(b));
}

const isConstant = ({ all }) => all.filter((count) => count).length < 2;

function showMove(step) {
  state.first = Math.max(0, state.first + step * PAGE_ROWS);
  load().then(() => byId("rows").scrollIntoView({ block: "start" }));
}

async function start() {
  try {
    data = await source.getData();
  } catch (error) {
    showError(Object.assign(error, { status: 0 }));
    return;
  }
  byId("size").textContent = `${countClips(data.total.clips)} · ${formatDuration(data.total.seconds)} · ${formatNumber(data.rows)} rows`;
  const drawn = orderColumns(data.columns.filter((column) => column.chart));
  const constant = drawn.filter(isConstant).map((column) => formatTitle(column.name));
  charts = new Charts(byId("charts"), drawn.filter((column) => !isConstant(column)), setLimit);
  byId("constant").hidden = !constant.length;
  byId("constant").textContent = `The same for all rows: ${constant.join(", ")}.`;
  readAddress();
  const sortable = ["name", ...data.columns.filter((column) => column.kind !== "other").map((column) => column.name)];
  byId("sort").append(make("option", { value: "", textContent: "Stored order" }), ...sortable.map((name) => make("option", { value: name, textContent: formatTitle(name) })));
  const names = ["name", ...data.columns.map((column) => column.name)];
  const measured = MEASURES.filter((name) => names.includes(name));
  state.columns = [...TABLE_COLUMNS.filter((name) => names.includes(name)), ...measured];
  makeColumnMenu([...state.columns, ...names.filter((name) => !state.columns.includes(name))]);
  makeSegments("show", SHOWN);
  makeSegments("view", { tiles: "Grid", table: "Table" });
  byId("expression-field").hidden = !source.hasExpressions;
  byId("expression").value = state.expression;
  byId("search").value = state.search;
  byId("expression").addEventListener("input", (event) => change({ expression: event.target.value }, 200));
  byId("search").addEventListener("input", (event) => change({ search: event.target.value }, 150));
  byId("sort").addEventListener("change", (event) => {
    const column = data.columns.find((each) => each.name === event.target.value);
    change({ sort: event.target.value, descending: column?.kind === "number" }, 0);
  });
  byId("direction").addEventListener("click", () => change({ descending: !state.descending }, 0));
  byId("copy-where").addEventListener("click", (event) => copyText(byId("where").textContent, event.target));
  byId("previous").addEventListener("click", () => showMove(-1));
  byId("next").addEventListener("click", () => showMove(1));
  byId("toggle-filters").addEventListener("click", (event) => {
    const isOpen = document.body.classList.toggle("filters-open");
    event.target.setAttribute("aria-expanded", String(isOpen));
  });
  addEventListener("hashchange", () => {
    readAddress();
    change({}, 0);
  });
  showControls();
  load();
}

start();
