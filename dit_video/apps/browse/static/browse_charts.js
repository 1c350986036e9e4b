// Charts of columns, on which limits are set.
import { make, makeButton } from "./dom.js";
import { describeLimit } from "./browse_source.js";
import { formatNumber, formatTitle } from "./browse_text.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 320, HEIGHT = 56;
const HANDLE = 9; // pixels around an end of the range from which it is moved

function makeSvg(tag, properties, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(properties)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** The charts of all columns that tell clips apart. `onLimit` receives a name and a limit, or null for none. */
export class Charts {
  constructor(container, columns, onLimit) {
    this.charts = new Map();
    for (const column of columns) {
      const chart = column.edges.length ? new Histogram(column, onLimit) : new ValueBars(column, onLimit);
      this.charts.set(column.name, chart);
      container.append(chart.element);
    }
  }

  /** Show the numbers of selected rows, and the limits. */
  update(counts, limits) {
    for (const [name, chart] of this.charts) chart.update(counts[name], limits.get(name) ?? null);
  }
}

const canFilter = (name) => /^[A-Za-z_]\w*$/.test(name);

function makeHead(column, clear) {
  const limit = make("span", { class: "limit" });
  const button = makeButton("×", clear, { class: "clear", hidden: true, "aria-label": `Remove the limit of ${formatTitle(column.name)}` });
  return { limit, button, element: make("div", { class: "chart-head" }, make("h3", { textContent: formatTitle(column.name) }), limit, button) };
}

/** A histogram of numbers. */
class Histogram {
  constructor(column, onLimit) {
    this.column = column;
    this.edges = column.edges;
    this.onLimit = (limit) => onLimit(column.name, limit);
    this.head = makeHead(column, () => this.onLimit(null));
    this.max = Math.max(1, ...column.all.slice(0, -1));
    this.bars = makeSvg("path", { class: "some" });
    this.range = makeSvg("rect", { class: "range", y: 0, height: HEIGHT, width: 0 });
    this.ends = [0, 1].map(() => makeSvg("rect", { class: "end", y: 0, height: HEIGHT, width: 2 }));
    const all = makeSvg("path", { class: "all", d: this.#draw(column.all) });
    this.svg = makeSvg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", class: "histogram", "aria-hidden": "true" });
    this.svg.append(all, this.bars, this.range, ...this.ends);
    const missing = column.all.at(-1);
    this.inputs = ["low", "high"].map((end) => this.#makeInput(end));
    const note = make("span", { textContent: missing ? `${formatNumber(missing)} without a value` : "" });
    const fields = make("div", { class: "range-fields" }, this.inputs[0], note, this.inputs[1]);
    this.element = make("div", { class: "column-chart", "data-column": column.name }, this.head.element, this.svg, fields);
    if (canFilter(column.name)) this.#listen();
    else for (const input of this.inputs) input.disabled = true;
  }

  #makeInput(end) {
    const title = `${formatTitle(this.column.name)}, ${end === "low" ? "minimum" : "maximum"}`;
    const change = (event) => {
      const text = event.target.value.trim(), value = Number(text);
      if (text && !Number.isFinite(value)) return this.update(this.counts, this.limit);
      this.#set({ ...this.limit, [end]: text ? value : null });
    };
    return make("input", { type: "text", inputMode: "decimal", placeholder: formatNumber(end === "low" ? this.edges[0] : this.edges.at(-1)), "aria-label": title, on: { change } });
  }

  #set({ low = null, high = null }) {
    if (low !== null && high !== null && low > high) [low, high] = [high, low];
    this.onLimit(low === null && high === null ? null : { low, high });
  }

  #draw(counts) {
    const width = WIDTH / (this.edges.length - 1);
    const gap = width > 4 ? 1 : 0;
    return counts.slice(0, -1).map((count, index) => {
      // The square root, so that few clips beside many are seen.
      const height = count ? Math.max(1.5, Math.sqrt(count / this.max) * (HEIGHT - 2)) : 0;
      return height ? `M${(index * width).toFixed(2)} ${HEIGHT}v${-height.toFixed(2)}h${(width - gap).toFixed(2)}v${height.toFixed(2)}z` : "";
    }).join("");
  }

  /** Return the position of a value in 0..1; bins are equally wide. */
  #locate(value) {
    const { edges } = this, last = edges.length - 1;
    if (value <= edges[0]) return 0;
    if (value >= edges[last]) return 1;
    const index = edges.findLastIndex((edge) => edge <= value);
    return (index + (value - edges[index]) / (edges[index + 1] - edges[index])) / last;
  }

  /** Return the value at a position, with as many digits as a pixel tells. */
  #read(position) {
    const { edges } = this, last = edges.length - 1;
    const place = Math.min(Math.max(position, 0), 1) * last, index = Math.min(Math.floor(place), last - 1);
    const size = edges[index + 1] - edges[index];
    const value = edges[index] + (place - index) * size;
    if (this.column.integer) return Math.floor(value);
    const step = 10 ** Math.floor(Math.log10(size / 4));
    return Number((Math.round(value / step) * step).toPrecision(6));
  }

  #listen() {
    this.svg.classList.add("can-drag");
    let start = null; // the end of the range that does not move
    const locate = (event) => {
      const box = this.svg.getBoundingClientRect();
      return [(event.clientX - box.left) / box.width, box.width];
    };
    const drag = (event) => {
      const [position] = locate(event);
      const [low, high] = [Math.min(start, position), Math.max(start, position)];
      this.#set({ low: low <= 0.002 ? null : this.#read(low), high: high >= 0.998 ? null : this.#read(high) });
    };
    this.svg.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      const [position, width] = locate(event);
      start = position;
      if (this.limit) {
        const ends = [this.limit.low === null ? 0 : this.#locate(this.limit.low), this.limit.high === null ? 1 : this.#locate(this.limit.high)];
        const near = ends.findIndex((end) => Math.abs(end - position) * width < HANDLE);
        if (near >= 0) start = ends[1 - near];
      }
      this.svg.setPointerCapture(event.pointerId);
      this.origin = event.clientX;
      event.preventDefault();
    });
    this.svg.addEventListener("pointermove", (event) => {
      if (start !== null && (this.isDragged || Math.abs(event.clientX - this.origin) > 3)) {
        this.isDragged = true;
        drag(event);
      }
    });
    const end = () => {
      if (start !== null && !this.isDragged && this.limit) this.onLimit(null); // a click
      start = null;
      this.isDragged = false;
    };
    this.svg.addEventListener("pointerup", end);
    this.svg.addEventListener("pointercancel", end);
  }

  update(counts, limit) {
    [this.counts, this.limit] = [counts ?? this.counts, limit];
    if (this.counts) this.bars.setAttribute("d", this.#draw(this.counts));
    const [low, high] = [limit?.low ?? null, limit?.high ?? null];
    const left = low === null ? 0 : this.#locate(low) * WIDTH;
    // All of a bin of an integer is in the range.
    const right = high === null ? WIDTH : this.#locate(this.column.integer ? high + 1 : high) * WIDTH;
    this.range.setAttribute("x", left);
    this.range.setAttribute("width", limit ? Math.max(1, right - left) : 0);
    this.ends[0].setAttribute("x", Math.max(0, left - 1));
    this.ends[1].setAttribute("x", Math.min(WIDTH - 2, right - 1));
    this.element.classList.toggle("limited", limit !== null);
    [low, high].forEach((value, index) => {
      if (document.activeElement !== this.inputs[index] || value !== null) this.inputs[index].value = value ?? "";
    });
    this.head.limit.textContent = limit ? describeLimit(limit) : "";
    this.head.button.hidden = !limit;
  }
}

/** Bars of the values of a text, which are chosen by a click. */
class ValueBars {
  constructor(column, onLimit) {
    this.column = column;
    this.head = makeHead(column, () => onLimit(column.name, null));
    this.max = Math.max(1, ...column.all.slice(0, -1));
    this.rows = column.values.map((value, index) => {
      const input = make("input", { type: "checkbox", disabled: !canFilter(column.name) });
      const bar = make("span", { class: "value-bar" }, make("i", {}), make("b", {}));
      const number = make("span", { class: "value-count" });
      const text = describeLimit({ values: [value] });
      input.addEventListener("change", () => {
        const values = this.rows.filter((row) => row.input.checked).map((row) => row.value);
        onLimit(column.name, values.length ? { values } : null);
      });
      bar.firstChild.style.width = `${(100 * column.all[index]) / this.max}%`;
      const element = make("label", { class: "value" }, input, make("span", { class: "value-name", textContent: text, title: text }), bar, number);
      return { value, input, bar, number, element };
    });
    const others = column.all.at(-1);
    const rest = others ? make("p", { class: "hint", textContent: `${formatNumber(others)} others, or without a value` }) : null;
    this.element = make("div", { class: "column-chart", "data-column": column.name }, this.head.element, ...this.rows.map((row) => row.element), rest ?? "");
  }

  update(counts, limit) {
    this.rows.forEach((row, index) => {
      if (counts) {
        row.bar.lastChild.style.width = `${(100 * counts[index]) / this.max}%`;
        row.number.textContent = formatNumber(counts[index]);
      }
      row.input.checked = limit?.values.includes(row.value) ?? false;
    });
    this.element.classList.toggle("limited", limit !== null);
    this.head.button.hidden = !limit;
  }
}
