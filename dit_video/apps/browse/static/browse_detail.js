// A dialog with one row: its clip, captions, measures, where it came from and what became of it.
import { copyText, formatBytes, make, makeButton, openDialog, prefersStillness } from "./dom.js";
import { describeOutcome, getBaseName, getCaption, getReason, isImage } from "./browse_rows.js";
import { formatNumber, formatTitle, formatValue, getCaptions } from "./browse_text.js";

const PICTURE = ["width", "height", "frames", "fps", "seconds", "codec", "transfer"];
const ORIGIN = ["source", "source_bytes", "source_sha256", "start_us", "duration_us", "split", "id", "payload", "payload_bytes"];
const OUTCOME = ["outcome", "reason", "transient", "chosen", "why"];
const UNSHOWN = new Set(["row", "kept", "media", "files", "name", "captions", "file", "offset", "length", "crc32"]);
const NOT_PLAYED = "This browser does not play the file as it is stored: this is a copy in H.264.";

/** Return a player of a clip as it is stored, or of a copy if the browser cannot play that. */
function makePlayer(source, row, captionColumns) {
  const box = make("div", { class: "player" });
  const say = (text) => box.append(make("p", { class: "note", textContent: text }));
  if (!row.media) {
    box.classList.add("absent");
    say(getReason(row) || "No clip is stored.");
    return box;
  }
  const [original, copy] = [source.getAddress("original", row), source.getAddress(isImage(row) ? "picture" : "clip", row)];
  if (!original && !copy) {
    box.append(make("img", { src: source.getAddress("thumbnail", row), alt: row.name }));
    say("The clips were not exported with this page.");
    return box;
  }
  const fail = () => {
    box.replaceChildren();
    box.classList.add("absent");
    say("The clip cannot be decoded.");
  };
  const show = (address, onError) => {
    if (!address) return fail();
    if (isImage(row)) return box.replaceChildren(make("img", { src: address, alt: getCaption(row, captionColumns) || row.name, on: { error: onError } }));
    const video = make("video", { controls: true, autoplay: !prefersStillness(), loop: true, muted: true, playsInline: true, "aria-label": row.name });
    video.addEventListener("error", onError);
    // Some browsers play the sound alone of a codec that they do not know.
    video.addEventListener("loadedmetadata", () => video.videoWidth || onError());
    video.src = address;
    box.replaceChildren(video);
  };
  let isCopy = false;
  show(original, () => {
    if (isCopy) return;
    isCopy = true;
    show(copy, fail);
    if (copy && !box.classList.contains("absent")) say(NOT_PLAYED);
  });
  return box;
}

/** Return a list of names and values; nothing if there is none. */
function makeFacts(title, pairs) {
  if (!pairs.length) return null;
  const facts = pairs.map(([name, value]) => make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value, title: value.length > 24 ? value : "" })));
  return make("section", {}, make("h3", { textContent: title }), make("dl", { class: "facts" }, ...facts));
}

const formatFact = (name, value) => {
  if (name.endsWith("_bytes")) return `${formatBytes(value)} (${formatNumber(value)} bytes)`;
  if (name === "source_sha256" || name === "payload") return `${String(value).slice(0, 16)}…`;
  return formatValue(value);
};

function formatSpan(row) {
  if (row.start_us === undefined || row.start_us === null) return [];
  const [start, end] = [row.start_us / 1e6, (row.start_us + (row.duration_us ?? 0)) / 1e6];
  return [["span", `${start.toFixed(3)} s – ${end.toFixed(3)} s`]];
}

/** Show the rows of a page, from one on, with the captions in the columns of these names. */
export function openDetail(source, rows, index, captionColumns) {
  const body = make("div", { class: "detail" });
  const previous = makeButton("‹", () => move(-1), { "aria-label": "Previous row" });
  const next = makeButton("›", () => move(1), { "aria-label": "Next row" });
  const dialog = openDialog("", { class: "detail-dialog" }, body);
  const heading = dialog.querySelector("h2");
  dialog.querySelector(".dialog-head .close").before(make("span", { class: "steps" }, previous, next));
  const move = (step) => {
    if (index + step < 0 || index + step >= rows.length) return;
    index += step;
    show();
  };
  const show = async () => {
    const row = rows[index];
    [previous.disabled, next.disabled] = [index === 0, index === rows.length - 1];
    heading.textContent = getBaseName(row.name) || "Unnamed row";
    heading.title = row.name ?? "";
    body.replaceChildren(makePlayer(source, row, captionColumns), make("div", { class: "detail-text" }, make("p", { class: "muted", textContent: "…" })));
    let values;
    try {
      values = await source.getRow(row.row);
    } catch (error) {
      body.lastChild.replaceChildren(make("p", { class: "error", role: "alert", textContent: error.message }));
      return;
    }
    if (rows[index] === row) body.lastChild.replaceChildren(...describe(values, captionColumns));
  };
  dialog.addEventListener("keydown", (event) => {
    if (event.target.tagName === "VIDEO") return; // it seeks
    if (event.key === "ArrowLeft") move(-1);
    if (event.key === "ArrowRight") move(1);
  });
  show();
}

function describe(row, captionColumns) {
  const outcome = describeOutcome(row);
  const head = make("p", { class: "verdict-line" }, make("span", { class: outcome ? "pill out" : "pill in", textContent: outcome ?? "kept" }), getReason(row) ? make("span", { textContent: getReason(row) }) : "");
  const captions = getCaptions(row, captionColumns);
  const quotes = captions.length
    ? captions.map(([name, caption]) => make("blockquote", {}, caption, name === "captions" ? null : make("cite", { textContent: formatTitle(name) })))
    : [make("p", { class: "muted", textContent: "No caption: the clip trains the unconditional model." })];
  const named = new Set([...PICTURE, ...ORIGIN, ...OUTCOME, ...UNSHOWN, ...captionColumns]);
  const pairs = (names) => names.filter((name) => row[name] !== undefined && row[name] !== null).map((name) => [formatTitle(name), formatFact(name, row[name])]);
  const others = Object.keys(row).filter((name) => !named.has(name) && !name.startsWith("audio_") && name !== "hash");
  const audio = pairs(Object.keys(row).filter((name) => name.startsWith("audio_"))).map(([name, value]) => [name.replace("audio ", ""), value]);
  const copy = makeButton("Copy name", () => copyText(row.name, copy));
  return [
    head,
    make("section", {}, make("h3", { textContent: captions.length > 1 ? "Captions" : "Caption" }), ...quotes),
    makeFacts("Measures", pairs(others)),
    makeFacts("Picture", pairs(PICTURE)),
    audio.length ? makeFacts("Sound", audio) : row.outcome === "kept" && !isImage(row) ? makeFacts("Sound", [["track", "none"]]) : null,
    makeFacts("Origin", [...(row.name ? [["name", row.name]] : []), ...formatSpan(row), ...pairs(ORIGIN.filter((name) => !name.endsWith("_us")))]),
    makeFacts("Outcome", pairs(OUTCOME)),
    row.name ? make("p", { class: "actions" }, copy) : null,
  ].filter(Boolean);
}
