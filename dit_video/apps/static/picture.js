// Fields of clips and images: a file that is sent, or an item of the gallery.
import { getUpload, postUpload } from "./api.js";
import { announce, formatBytes, formatSize, make, makeButton, makeId } from "./dom.js";
import { Field } from "./fields.js";
import { fitInto, makeTile } from "./player.js";

const ACCEPTED = { clip: "video/*,image/gif,image/png,image/apng,image/webp,.mkv", image: "image/*" };
const NOUNS = { clip: "clip", image: "picture" };

/** A field of a clip or an image. `studio` has the gallery's items, its picker, and the limits of the server. */
export class PictureField extends Field {
  constructor(description, studio) {
    super(description);
    this.studio = studio;
    this.chosen = null;
    this.sending = null;
    this.body = make("div", { class: "drop" });
    this.input = make("input", { type: "file", hidden: true, accept: ACCEPTED[this.kind], "aria-label": description.title });
    this.input.addEventListener("change", () => {
      if (this.input.files.length) this.send(this.input.files[0]);
      this.input.value = ""; // the same file may be chosen again
    });
    this.layOutGroup(this.input, this.body);
    this.listenToDrops();
    this.show();
  }

  listenToDrops() {
    const hasFile = (event) => [...event.dataTransfer.types].includes("Files");
    this.element.addEventListener("dragover", (event) => {
      if (!hasFile(event)) return;
      event.preventDefault();
      this.body.classList.add("over");
    });
    this.element.addEventListener("dragleave", (event) => {
      if (!this.element.contains(event.relatedTarget)) this.body.classList.remove("over");
    });
    this.element.addEventListener("drop", (event) => {
      this.body.classList.remove("over");
      if (!event.dataTransfer.files.length) return;
      event.preventDefault();
      this.send(event.dataTransfer.files[0]);
    });
  }

  get controls() {
    return [...this.body.querySelectorAll("button")].slice(0, 1);
  }

  get value() {
    if (!this.chosen) return null;
    const { item, upload, frame } = this.chosen;
    if (upload) return { upload: upload.upload };
    return this.kind === "image" ? { item: item.id, frame } : { item: item.id };
  }

  /** Files, name and used size of what is chosen; null for nothing. */
  get media() {
    if (!this.chosen) return null;
    const { item, upload } = this.chosen;
    if (item) return { files: item.files, name: item.title || item.tab_title, frames: item.frames, height: item.height, width: item.width, fps: item.fps };
    return { files: upload.files, name: upload.name, ...upload.used, fps: upload.fps };
  }

  async set(value) {
    this.stop();
    if (!value) return this.choose(null);
    if (value.item) {
      const item = await this.studio.getItem(value.item);
      this.choose(item ? { item, frame: value.frame ?? 0 } : null);
      if (!item) this.showError("The clip that was here is no longer in the gallery. Choose another one.");
      return;
    }
    try {
      this.choose({ upload: await getUpload(value.upload) });
    } catch (error) {
      this.choose(null);
      this.showError(error.status ? "The file that was here is no longer on the server. Choose it again." : error.message);
    }
  }

  /** Take {upload}, {item, frame}, or null for nothing. */
  choose(chosen) {
    this.chosen = chosen && { frame: 0, ...chosen };
    if (this.chosen?.item && this.chosen.frame < 0) this.chosen.frame += this.chosen.item.frames;
    this.show();
    this.change();
  }

  reset() {
    return this.set(null);
  }

  check() {
    return this.sending ? "The file is being sent. Wait for it, or stop it." : super.check();
  }

  focus() {
    this.body.querySelector("button")?.focus();
  }

  /** Send a file to the server, and choose it. */
  async send(file) {
    const limit = this.studio.limits.upload_bytes;
    if (file.size > limit) return this.showError(`${file.name} has ${formatBytes(file.size)}; at most ${formatBytes(limit)} are accepted. Use a shorter or smaller one.`);
    if (!file.size) return this.showError(`${file.name} is empty. Use another file.`);
    this.stop();
    const stop = new AbortController();
    this.sending = { stop, file, progress: this.showProgress(file, stop) };
    this.showError("");
    const sending = this.sending;
    try {
      const upload = await postUpload(file, this.kind, { signal: stop.signal, onProgress: (fraction) => sending.progress(fraction) });
      if (this.sending !== sending) return;
      this.sending = null;
      this.choose({ upload });
      announce(`${upload.name} is ready. ${upload.note}`);
    } catch (error) {
      if (this.sending !== sending && error.name !== "AbortError") return;
      if (this.sending === sending) this.sending = null;
      this.show();
      if (error.name !== "AbortError") {
        this.showError(error.message);
        announce(error.message);
      }
    }
  }

  stop() {
    this.sending?.stop.abort();
    this.sending = null;
  }

  showProgress(file, stop) {
    const id = makeId("sending");
    const bar = make("progress", { max: 1, value: 0, "aria-labelledby": id });
    const state = make("span", { class: "muted", textContent: formatBytes(file.size) });
    const button = makeButton("Stop", () => stop.abort());
    this.replace(make("div", { class: "sending" }, make("span", { id, class: "name", textContent: `Sending ${file.name}` }), bar, state, button));
    return (fraction) => {
      bar.value = fraction;
      state.textContent = fraction < 1 ? `${Math.round(100 * fraction)} % of ${formatBytes(file.size)}` : "The server reads it …";
    };
  }

  show() {
    this.chosen ? this.showChosen() : this.showEmpty();
  }

  /** Show other contents; the focus stays in the field, if it was there. */
  replace(...children) {
    const hadFocus = this.element.contains(document.activeElement);
    this.body.replaceChildren(...children);
    if (hadFocus) this.focus();
  }

  makeButtons(first) {
    const title = this.description.title;
    return make(
      "div",
      { class: "actions" },
      makeButton(first, () => this.input.click(), { "aria-label": `${first}: ${title}` }),
      makeButton("Gallery", () => this.pick(), { "aria-label": `Gallery: choose the ${title.toLowerCase()} from it` }),
      this.chosen && makeButton("Remove", () => this.remove(), { "aria-label": `Remove: ${title}` }),
    );
  }

  showEmpty() {
    const hint = make("p", { class: "hint" }, `Drop a ${NOUNS[this.kind]} here, or paste one.`);
    this.replace(hint, this.makeButtons("Choose a file"));
  }

  showChosen() {
    const media = this.media;
    const { upload, item } = this.chosen;
    const isFrame = this.kind === "image" && item && item.frames > 1;
    const picture = isFrame ? this.makeFrame(media) : this.makeMoving(media);
    const about = make(
      "div",
      { class: "about" },
      make("p", { class: "name", textContent: media.name }),
      make("p", { class: "muted", textContent: formatSize(isFrame || this.kind === "image" ? { ...media, frames: 1 } : media) }),
      upload?.note && make("p", { class: "note", textContent: upload.note }),
      isFrame && this.makeFrameSlider(media),
    );
    this.replace(make("div", { class: "chosen" }, picture, about), this.makeButtons("Replace"));
  }

  makeMoving(media) {
    const tile = makeTile(media, `First frame of ${media.name}`);
    tile.box.addEventListener("pointerenter", () => tile.play());
    tile.box.addEventListener("pointerleave", () => tile.pause());
    return tile.box;
  }

  /** Show one frame of a video, which stands there. */
  makeFrame(media) {
    const box = make("div", { class: "screen" });
    const video = make("video", { muted: true, playsInline: true, preload: "auto", poster: media.files.png, "aria-label": `The frame of ${media.name} that is used` });
    for (const format of ["mp4", "webm"]) if (media.files[format]) video.append(make("source", { src: media.files[format], type: `video/${format}` }));
    this.seek = () => (video.currentTime = (this.chosen.frame + 0.5) / media.fps);
    video.addEventListener("loadeddata", () => this.seek());
    box.append(video);
    fitInto(box, video, media.width, media.height);
    return box;
  }

  makeFrameSlider(media) {
    const id = makeId("frame");
    const text = make("label", { htmlFor: id });
    const slider = make("input", { type: "range", id, min: 0, max: media.frames - 1, step: 1, value: this.chosen.frame });
    const label = () => {
      text.textContent = `Frame ${this.chosen.frame + 1} of ${media.frames}`;
      slider.setAttribute("aria-valuetext", text.textContent);
    };
    slider.addEventListener("input", () => {
      this.chosen.frame = Number(slider.value);
      label();
      this.seek();
      this.change();
    });
    label();
    return make("div", { class: "frame-choice" }, text, slider);
  }

  async pick() {
    const item = await this.studio.pickItem(this.description);
    if (item) this.choose({ item });
    this.focus();
  }

  remove() {
    this.choose(null);
    this.focus();
  }
}
