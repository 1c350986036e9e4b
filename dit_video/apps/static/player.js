// Videos in the formats that a browser plays, small ones enlarged by a whole number.
import { make, makeButton, prefersStillness } from "./dom.js";

const TYPES = { mp4: "video/mp4", webm: "video/webm" };
const NEITHER = "This browser plays neither the MP4 nor the WebM file; this is a GIF, with fewer colours.";

/** Keep an element as large as fits into a box, enlarged without smoothing by a whole number. */
export function fitInto(box, element, width, height) {
  const fit = () => {
    if (!box.clientWidth || !box.clientHeight) return;
    const ratio = Math.min(box.clientWidth / width, box.clientHeight / height);
    const scale = ratio > 1 ? Math.floor(ratio) : ratio;
    element.classList.toggle("pixels", scale > 1);
    element.style.width = `${width * scale}px`;
    element.style.height = `${height * scale}px`;
  };
  fit();
  const observer = new ResizeObserver(() => (element.parentElement === box ? fit() : observer.disconnect()));
  observer.observe(box);
}

/** Return a video of the files; `onFailure` is called if the browser plays none of them. */
function makeVideo({ files, width, height }, properties, onFailure) {
  const video = make("video", { loop: true, muted: true, playsInline: true, width, height, ...properties });
  const sources = Object.entries(TYPES).filter(([format]) => files[format]);
  for (const [format, type] of sources) video.append(make("source", { src: files[format], type }));
  const drop = (source) => {
    source?.remove();
    if (!video.querySelector("source")) onFailure();
    return video.querySelector("source");
  };
  for (const source of video.children) source.addEventListener("error", () => drop(source));
  // A file that begins well and cannot be decoded further.
  video.addEventListener("error", (event) => {
    if (event.target === video && video.error) {
      if (drop([...video.children].find((source) => source.src === video.currentSrc))) video.load();
    }
  });
  return video;
}

/** Return a picture of the files that moves without a video decoder, and what to say of it. */
function makeImage({ files, width, height }, label) {
  const src = prefersStillness() ? files.png : (files.gif ?? files.png);
  return make("img", { src, alt: label, width, height });
}

/** Return a player that starts by itself, unless the user prefers stillness, in a box that gives its size. */
export function makePlayer(media, label) {
  const box = make("div", { class: "screen" });
  const show = (element) => {
    box.replaceChildren(element);
    fitInto(box, element, media.width, media.height);
  };
  const isImage = !media.files.mp4 && !media.files.webm;
  if (isImage) {
    show(make("img", { src: media.files.apng ?? media.files.png, alt: label, width: media.width, height: media.height }));
    return box;
  }
  const properties = { controls: true, autoplay: !prefersStillness(), poster: media.files.png ?? "", "aria-label": label };
  const video = makeVideo(media, properties, () => {
    show(makeImage(media, label));
    box.append(make("p", { class: "note", textContent: NEITHER }));
  });
  show(video);
  return box;
}

/** Return a still picture that becomes a video while it is played. It has no controls. */
export function makeTile(media, label) {
  const box = make("div", { class: "screen" });
  const still = make("img", { src: media.files.png, alt: label, width: media.width, height: media.height, loading: "lazy", decoding: "async" });
  let moving = null;
  const show = (element) => {
    box.replaceChildren(still, ...(element ? [element] : []));
    if (element) fitInto(box, element, media.width, media.height);
  };
  const play = () => {
    if (moving || (!media.files.mp4 && !media.files.webm)) return;
    moving = makeVideo(media, { preload: "auto", tabIndex: -1, "aria-hidden": "true" }, () => {
      if (moving) show((moving = make("img", { src: media.files.gif ?? media.files.png, alt: "" })));
    });
    show(moving);
    moving.play?.().catch(() => {});
  };
  const pause = () => {
    if (!moving) return;
    moving.pause?.();
    moving = null; // without the element, its decoder is freed
    show(null);
  };
  show(null);
  fitInto(box, still, media.width, media.height);
  return { box, play, pause };
}

const MAX_PLAYING = 16;

/** Plays the tiles that are in view, up to a number. */
export class TilePlayer {
  constructor() {
    this.tiles = new Map();
    this.visible = new Set();
    this.isPaused = prefersStillness();
    this.observer = new IntersectionObserver(
      (entries) => {
        for (const { target, isIntersecting } of entries) isIntersecting ? this.visible.add(target) : this.visible.delete(target);
        this.update();
      },
      { threshold: 0.4 },
    );
  }

  /** Watch a tile, and play it while the pointer or the focus is on its card, too. */
  add(tile, card) {
    this.tiles.set(tile.box, tile);
    this.observer.observe(tile.box);
    if (prefersStillness()) return;
    for (const event of ["pointerenter", "focusin"]) card.addEventListener(event, () => tile.play());
    for (const event of ["pointerleave", "focusout"]) card.addEventListener(event, () => this.update());
  }

  remove(tile) {
    tile.pause();
    this.observer.unobserve(tile.box);
    this.tiles.delete(tile.box);
    this.visible.delete(tile.box);
  }

  update() {
    const playing = new Set(this.isPaused ? [] : [...this.visible].slice(0, MAX_PLAYING));
    for (const [box, tile] of this.tiles) playing.has(box) ? tile.play() : tile.pause();
  }

  /** Return a button that stops and starts all. */
  makeButton() {
    const button = makeButton("", () => {
      this.isPaused = !this.isPaused;
      label();
      this.update();
    });
    const label = () => {
      button.textContent = this.isPaused ? "Play all" : "Pause all";
    };
    label();
    return button;
  }
}
