// The page of a training run, which follows it: what differs in a newer page is put in place, and all else stays as it is.

const POLL_MS = 4000;
const MAX_LOAD = 0.1; // largest share of the time in which the server, perhaps on the training's machine, makes pages
const VIEW = { width: 520, height: 400 }; // largest size of a viewed grid in CSS pixels
const THUMB = { width: 150, height: 120 };

const byId = (id) => document.getElementById(id);
const prefersStillness = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

// Update of the page. `sources` holds the HTML that an element was made of, as scripts change elements afterwards.
const sources = new WeakMap();

function recordSources(element) {
  if ("keyed" in element.dataset) for (const child of element.children) recordSources(child);
  else sources.set(element, element.outerHTML);
}

function place(fresh) {
  const element = document.importNode(fresh, true);
  recordSources(element);
  return element;
}

function syncAttributes(element, fresh) {
  // Whether details are open is the reader's choice.
  for (const { name, value } of fresh.attributes) if (name !== "open" && element.getAttribute(name) !== value) element.setAttribute(name, value);
}

function update(element, fresh) {
  if ("keyed" in fresh.dataset) {
    syncAttributes(element, fresh);
    updateChildren(element, fresh);
  } else if ("own" in fresh.dataset) {
    if (element.dataset.version !== fresh.dataset.version) element.replaceWith(place(fresh));
  } else if (sources.get(element) !== fresh.outerHTML) {
    const focused = element.contains(document.activeElement) ? document.activeElement.id || element.id : null;
    const tile = element.querySelector("select")?.value;
    const replacement = place(fresh);
    element.replaceWith(replacement);
    if (tile !== undefined && replacement.querySelector("select")) replacement.querySelector("select").value = tile;
    if (focused) byId(focused)?.focus({ preventScroll: true });
  }
}

function updateChildren(element, fresh) {
  const known = new Map([...element.children].map((child) => [child.id, child]));
  let next = element.firstElementChild;
  for (const child of [...fresh.children]) {
    const own = known.get(child.id);
    known.delete(child.id);
    if (own === undefined) {
      element.insertBefore(place(child), next);
      continue;
    }
    if (own === next) next = next.nextElementSibling;
    else element.insertBefore(own, next);
    update(own, child);
  }
  for (const gone of known.values()) gone.remove();
}

// Ages of files.
function formatAge(seconds) {
  if (seconds < 5) return "just now";
  if (seconds < 90) return `${Math.round(seconds)} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  if (seconds < 48 * 3600) return `${Math.round(seconds / 3600)} h ago`;
  return `${Math.round(seconds / 86400)} days ago`;
}

function showAges() {
  for (const element of document.querySelectorAll("#run time")) {
    const date = new Date(element.dateTime);
    element.textContent = formatAge((Date.now() - date) / 1000);
    element.title = date.toLocaleString();
  }
}

// Samples and reconstructions.
let isPaused = prefersStillness();
const visible = new WeakSet();

function play(video) {
  if (!isPaused && visible.has(video)) video.play().catch(() => {});
  else video.pause();
}

const observer = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) {
        visible.add(target);
        if (!target.src) target.src = target.dataset.src;
      } else visible.delete(target);
      if (target.tagName === "VIDEO") play(target);
    }
  },
  { rootMargin: "150px" },
);

function makeMedia(item, label) {
  const media = document.createElement("video" in item.dataset ? "video" : "img");
  media.dataset.src = item.dataset.src;
  if (media.tagName === "VIDEO") {
    Object.assign(media, { loop: true, muted: true, playsInline: true, preload: "auto" });
    media.setAttribute("aria-label", label);
  } else media.alt = label;
  observer.observe(media);
  return media;
}

/** Show one clip of a grid, or all of it, in a frame of at most this size; small ones are enlarged by a whole number. */
function fit(frame, series, largest) {
  const { height, width, tileHeight, tileWidth } = series.dataset;
  const media = frame.firstElementChild;
  frame.classList.toggle("natural", !width);
  if (!width) {
    frame.style.width = `${largest.width}px`;
    return;
  }
  const option = series.querySelector("[data-role=tile]")?.selectedOptions[0];
  const isWhole = !option || option.value === "";
  const [h, w] = isWhole ? [+height, +width] : [+tileHeight, +tileWidth];
  const [left, top] = isWhole ? [0, 0] : [+option.dataset.left, +option.dataset.top];
  const ratio = Math.min(largest.width / w, largest.height / h);
  const scale = ratio > 1 ? Math.floor(ratio) : ratio;
  frame.classList.toggle("pixels", scale > 1);
  frame.style.width = `${w * scale}px`;
  frame.style.aspectRatio = `${w} / ${h}`;
  media.style.width = `${(100 * width) / w}%`;
  media.style.transform = `translate(${(-100 * left) / width}%, ${(-100 * top) / height}%)`;
}

const formatStep = (item) => `step ${Number(item.dataset.step).toLocaleString("en-US")}`;

function makeFrame(item, series) {
  const frame = document.createElement("span");
  frame.className = "grid-frame";
  frame.append(makeMedia(item, `${series.dataset.kind}, ${formatStep(item)}`));
  return frame;
}

function makeThumb(item, series) {
  const button = document.createElement("button");
  button.type = "button";
  button.dataset.role = "thumb";
  const text = document.createElement("span");
  text.textContent = formatStep(item);
  button.append(makeFrame(item, series), text);
  item.replaceChildren(button);
}

const chosen = new WeakMap(); // step that is viewed, by series; without one the newest is

function showSeries(series) {
  const items = [...series.querySelectorAll(".strip > li")].reverse(); // by step
  const newest = items.at(-1);
  let index = items.findIndex((item) => item.dataset.step === chosen.get(series));
  if (index < 0) index = items.length - 1;
  const current = items[index];
  const range = series.querySelector("[data-role=step]");
  Object.assign(range, { max: items.length - 1, value: index });
  range.setAttribute("aria-valuetext", formatStep(current));
  series.querySelector("output").textContent = formatStep(current);
  series.querySelector(".stepper").hidden = false;
  range.parentElement.hidden = items.length < 2;
  const hasVideos = items.some((item) => "video" in item.dataset);
  const pause = series.querySelector("[data-role=pause]");
  pause.hidden = !hasVideos;
  pause.textContent = isPaused ? "Play" : "Pause";
  pause.setAttribute("aria-pressed", String(isPaused));

  const viewer = series.querySelector(".viewer");
  const shown = current === newest ? [current] : [current, newest];
  const sources = shown.map((item) => item.dataset.src).join(" ");
  if (viewer.dataset.sources !== sources) {
    viewer.dataset.sources = sources;
    viewer.replaceChildren(
      ...shown.map((item) => {
        const figure = document.createElement("figure");
        const caption = document.createElement("figcaption");
        caption.textContent = item === newest ? `${formatStep(item)}, the newest` : formatStep(item);
        figure.append(makeFrame(item, series), caption);
        return figure;
      }),
    );
    const videos = [...viewer.querySelectorAll("video")];
    if (videos.length > 1) {
      // Both begin together, so that they can be compared.
      let waiting = videos.length;
      const begin = () => {
        if (--waiting === 0) for (const video of videos) video.currentTime = 0;
      };
      for (const video of videos) video.addEventListener("canplay", begin, { once: true });
    }
  }
  const largest = { ...VIEW, width: Math.min(VIEW.width, series.clientWidth || VIEW.width) };
  for (const frame of viewer.querySelectorAll(".grid-frame")) fit(frame, series, largest);
  for (const item of items) {
    if (!item.querySelector("button")) makeThumb(item, series);
    item.firstElementChild.setAttribute("aria-pressed", String(item === current));
    fit(item.querySelector(".grid-frame"), series, THUMB);
  }
}

function showAll() {
  showAges();
  for (const series of document.querySelectorAll(".series")) showSeries(series);
}

function choose(series, item) {
  const strip = series.querySelector(".strip");
  if (item === strip.firstElementChild) chosen.delete(series);
  else chosen.set(series, item.dataset.step);
  showSeries(series);
}

document.addEventListener("input", ({ target }) => {
  const series = target.closest(".series");
  if (target.dataset.role === "step") choose(series, [...series.querySelectorAll(".strip > li")].at(-1 - target.value));
  if (target.dataset.role === "tile") showSeries(series);
});

document.addEventListener("click", ({ target }) => {
  const button = target.closest("button");
  if (button?.dataset.role === "thumb") choose(button.closest(".series"), button.closest("li"));
  if (button?.dataset.role === "pause") {
    isPaused = !isPaused;
    for (const video of document.querySelectorAll("#run video")) play(video);
    showAll();
  }
});

addEventListener("resize", showAll);
document.addEventListener("toggle", showAll, true); // of details, in which nothing had a width

// Following the run.
let version = null;
let isPolling = false;
let timer = 0;

async function fetchText(path) {
  const response = await fetch(path, { cache: "no-store" });
  if (!response.ok) throw new Error(`${response.status}`);
  return response.text();
}

async function poll() {
  if (isPolling || document.hidden) return; // it goes on when the page is visible again
  isPolling = true;
  clearTimeout(timer);
  const start = performance.now();
  const connection = byId("connection");
  try {
    const state = JSON.parse(await fetchText("run/state"));
    if (state.version !== version) {
      const fresh = new DOMParser().parseFromString(await fetchText("run"), "text/html");
      document.title = fresh.title;
      updateChildren(byId("run"), fresh.getElementById("run"));
      version = state.version;
    }
    connection.hidden = true;
  } catch {
    connection.textContent = "The server does not answer; the page shows what it said last.";
    connection.hidden = false;
  } finally {
    isPolling = false;
    showAll();
    timer = setTimeout(poll, Math.max(POLL_MS, (performance.now() - start) / MAX_LOAD));
  }
}

recordSources(byId("run"));
showAll();
poll();
document.addEventListener("visibilitychange", poll);
