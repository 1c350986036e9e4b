// A page of rows, as tiles or as a table.
import { make, makeButton, prefersStillness } from "./dom.js";
import { formatDuration, formatTitle, formatValue, getCaptions } from "./browse_text.js";

const PREVIEW_DELAY = 250; // milliseconds that the pointer rests on a tile before it plays
const MIN_ASPECT = 0.45, MAX_ASPECT = 2.4;

export const OUTCOMES = { kept: "kept", dropped: "dropped", cut: "cut away", unreadable: "unreadable" };

/** Return a word for what became of a row; null for a clip that is trained on. */
export function describeOutcome(row) {
  if (row.outcome !== "kept") return OUTCOMES[row.outcome] ?? row.outcome;
  return row.chosen === false ? "not chosen" : null;
}

export const getReason = (row) => row.reason || row.why || "";
export const getCaption = (row, names) => getCaptions(row, names)[0]?.[1] ?? "";
export const getBaseName = (name) => (name ?? "").split("/").at(-1);
export const isImage = (row) => row.frames === 1;

/** Return a thumbnail that is loaded when it comes into view, in a box of the clip's aspect ratio. */
function makeThumbnail(source, row) {
  const box = make("div", { class: "picture" });
  const address = row.media && source.getAddress("thumbnail", row);
  if (!address) {
    box.classList.add("absent");
    box.append(make("span", { textContent: getReason(row) || "No clip is stored." }));
    return box;
  }
  const fail = () => {
    box.classList.add("absent");
    box.replaceChildren(make("span", { textContent: "No picture could be made." }));
  };
  box.append(make("img", { src: address, alt: "", loading: "lazy", decoding: "async", on: { error: fail } }));
  return box;
}

/** Stop loading thumbnails: they use all connections of a browser, and rows would wait for them. */
export function stopThumbnails(list) {
  for (const image of list.querySelectorAll("img")) {
    if (image.complete) continue;
    image.dataset.address = image.src;
    image.removeAttribute("src");
  }
}

/** Load the thumbnails that were stopped. */
export function resumeThumbnails(list) {
  for (const image of list.querySelectorAll("img:not([src])")) image.src = image.dataset.address;
}

/** Play the clip over its thumbnail while the pointer rests on it. */
function addPreview(tile, box, source, row) {
  const address = row.media && !isImage(row) && source.getAddress("original", row);
  if (!address || prefersStillness()) return;
  let video = null, timer = 0;
  tile.addEventListener("pointerenter", (event) => {
    if (event.pointerType !== "mouse") return;
    timer = setTimeout(() => {
      video = make("video", { src: address, muted: true, loop: true, playsInline: true, tabIndex: -1, "aria-hidden": "true" });
      const shown = video;
      video.addEventListener("playing", () => shown.videoWidth && shown.classList.add("playing"));
      box.append(video);
      video.play().catch(() => {});
    }, PREVIEW_DELAY);
  });
  tile.addEventListener("pointerleave", () => {
    clearTimeout(timer);
    video?.remove();
    video = null;
  });
}

/** Return tiles as wide as their clips. */
export function makeTiles(source, rows, { captions, sort, onOpen }) {
  return make("ul", { class: "tiles" }, ...rows.map((row, index) => {
    const box = makeThumbnail(source, row), outcome = describeOutcome(row);
    const aspect = row.width && row.height ? Math.min(Math.max(row.width / row.height, MIN_ASPECT), MAX_ASPECT) : 1.5;
    const facts = isImage(row) ? ["image"] : row.seconds !== null && row.frames ? [formatDuration(row.seconds)] : [];
    if (row.width) facts.push(`${row.width}×${row.height}`);
    if (outcome) box.append(make("span", { class: "badge out", textContent: outcome }));
    if (sort && !["name", "reason", ...captions].includes(sort) && row[sort] !== null && row[sort] !== undefined) {
      box.append(make("span", { class: "badge value-badge", textContent: `${formatValue(row[sort])} ${formatTitle(sort)}` }));
    }
    const caption = getCaption(row, captions);
    const text = make("span", { class: "tile-text" }, make("span", { class: caption ? "prompt" : "prompt muted", textContent: caption || getBaseName(row.name) || "unnamed" }), make("span", { class: "small", textContent: facts.join(" · ") }));
    const button = make("button", { type: "button", class: "tile", title: row.name ?? "", on: { click: () => onOpen(index) } }, box, text);
    const item = make("li", { class: aspect < 1 ? "tall" : "" }, button);
    item.style.setProperty("--aspect", aspect);
    addPreview(button, box, source, row);
    return item;
  }), make("li", { class: "filler", "aria-hidden": "true" }));
}

/** Return a table; a click on a column's title sorts by it. */
export function makeTable(source, rows, { captions, columns, kinds, sort, descending, onSort, onOpen }) {
  const head = columns.map((name) => {
    const order = name === sort ? (descending ? "descending" : "ascending") : "none";
    const mark = make("span", { class: "order", "aria-hidden": "true", textContent: { none: "↕", ascending: "↑", descending: "↓" }[order] });
    const title = name === "captions" ? "caption" : formatTitle(name);
    const button = makeButton(title, () => onSort(name), { class: "sort" });
    button.append(mark);
    return make("th", { scope: "col", "aria-sort": order, class: kinds.get(name) === "number" ? "number" : `is-${name}` }, button);
  });
  const body = rows.map((row, index) => {
    const open = make("button", { type: "button", class: "open-row", "aria-label": `Open ${row.name ?? "row"}`, on: { click: () => onOpen(index) } }, makeThumbnail(source, row));
    const cells = columns.map((name) => {
      const value = name === "captions" ? getCaption(row, captions) || null : row[name];
      const text = name === "outcome" ? describeOutcome(row) ?? "kept" : formatValue(value);
      const kind = kinds.get(name) === "number" ? "number" : name === "outcome" ? `outcome ${describeOutcome(row) ? "out" : "in"}` : `text is-${name}`;
      return make("td", { class: value === null || value === undefined ? `${kind} none` : kind }, make("span", { textContent: text, title: kind.startsWith("text") ? text : "" }));
    });
    return make("tr", { on: { click: (event) => event.target.closest("button") || onOpen(index) } }, make("td", { class: "thumb" }, open), ...cells);
  });
  const table = make("table", { class: "rows" }, make("thead", {}, make("tr", {}, make("th", { class: "thumb" }, make("span", { class: "unseen", textContent: "Clip" })), ...head)), make("tbody", {}, ...body));
  return make("div", { class: "table-frame", tabIndex: 0, role: "region", "aria-label": "Rows" }, table);
}
